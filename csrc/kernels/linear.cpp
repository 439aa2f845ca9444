// x W^T + b. The activations are prepared once, then items of outputs are taken by the threads: each multiplies its rows of
// weights by all activations into a strip of floats that stays in its cache, adds the bias and rounds.
#include "kernels/linear.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "kernels/linear_product.h"

namespace foveal::FOVEAL_ISA {
namespace {

constexpr int64_t ITEM_BYTES = 64 << 10;  // of weights: less is not worth another thread
constexpr int64_t ITEM_ROWS = 256;        // of activations, and
constexpr int64_t ITEM_OUTPUTS = 128;     // of their products: as many as L2 holds beside what they are made of
constexpr int64_t PACKED_OUTPUTS = 512;   // where all activations are packed for each item

template <class Number, class Out>
void finish(const Linear& call, const float* c, int64_t c_stride, int64_t row, int64_t rows, int64_t first, int64_t count) {
  const int64_t stride = call.out_stride ? call.out_stride : call.weight.outputs;
  for (int64_t m = 0; m < rows; ++m) {
    Out* out = static_cast<Out*>(call.out) + (row + m) * stride + first;
    const Number* bias = call.bias ? static_cast<const Number*>(call.bias) + first : nullptr;
    for (int64_t o = 0; o < count; o += F32::width) {
      const int n = static_cast<int>(count - o < F32::width ? count - o : F32::width);
      F32 value = load(c + m * c_stride + o);
      if (bias) value = value + load_up_to(bias + o, n);
      n == F32::width ? store(out + o, value) : store_partial(out + o, value, n);
    }
  }
}

// Outputs of an item: whole registers, whole panels.
int64_t item_outputs(const Linear& call) {
  const int64_t outputs = call.weight.outputs;
  if (call.rows > FEW) {
    if (!by_fixed_tiles(call.weight, call.rows)) return ITEM_OUTPUTS;
    const int64_t share = round_up((outputs + call.threads - 1) / call.threads, 32);
    return share < PACKED_OUTPUTS ? share : PACKED_OUTPUTS;
  }
  if (call.threads == 1) return round_up(outputs, 32);
  const int64_t least = ITEM_BYTES / row_bytes(call.weight) + 1, share = outputs / (4 * call.threads) + 1;
  return round_up(least > share ? least : share, 32);
}

template <class Number, class Out>
void run(const Linear& call) {
  const Weight& weight = call.weight;
  Activations a = layout(weight);
  const int64_t prepared = bytes_of(a, call.rows), count = item_outputs(call);
  const int64_t rows = call.rows < ITEM_ROWS ? call.rows : ITEM_ROWS;
  const int64_t each = rows * count + product_scratch(weight, a, rows) + 32;  // floats of a thread
  Scratch scratch(prepared + call.threads * (each * 4 + 64) + 128);
  place(a, scratch.take<char>(prepared), call.rows);
  float* memory = scratch.take<float>(call.threads * each);
  auto prepare_row = [&](int row, int) {
    prepare(weight, static_cast<const Number*>(call.x) + row * call.x_stride, a, row);
  };
  parallel(call.rows > FEW ? call.threads : 1, static_cast<int>(call.rows), prepare_row);
  const int64_t parts = (weight.outputs + count - 1) / count, blocks = (call.rows + rows - 1) / rows;
  auto multiply = [&](int item, int thread) {
    const int64_t row = item / parts * rows, first = item % parts * count;
    const int64_t rows_here = call.rows - row < rows ? call.rows - row : rows;
    const int64_t count_here = weight.outputs - first < count ? weight.outputs - first : count;
    float* c = memory + thread * each;
    product(weight, a, row, rows_here, first, count_here, c, count, c + rows * count + 16);
    finish<Number, Out>(call, c, count, row, rows_here, first, count_here);
  };
  parallel(call.threads, static_cast<int>(parts * blocks), multiply);
}

}  // namespace

void linear(const Linear& call) {
  if (call.rows == 0 || call.weight.outputs == 0) return;
  if (call.format == Format::f32) return run<float, float>(call);
  call.wide ? run<bf16, float>(call) : run<bf16, bf16>(call);
}

}  // namespace foveal::FOVEAL_ISA
