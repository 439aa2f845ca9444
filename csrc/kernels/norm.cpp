// RMS norm. A row is read twice: its squares are summed, then it is scaled; the second reading comes from the cache.
#include "kernels/norm.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace foveal::FOVEAL_ISA {
namespace {

// Rows for one thread at a time; fewer rows are not worth waking a second thread.
constexpr int ROWS = 16;

template <class Number>
void norm_row(const RmsNorm& norm, int64_t row) {
  const int64_t size = norm.size;
  const Number* x = static_cast<const Number*>(norm.x) + row * norm.x_stride;
  if (norm.residual) {
    const Number* residual = static_cast<const Number*>(norm.residual) + row * size;
    Number* sum = static_cast<Number*>(norm.sum) + row * size;
    for (int64_t i = 0; i < size; i += F32::width) {
      const int n = static_cast<int>(size - i);
      if (n >= F32::width)
        store(sum + i, load(x + i) + load(residual + i));
      else
        store_partial(sum + i, load_partial(x + i, n) + load_partial(residual + i, n), n);
    }
    x = sum;
  }
  F32 squares = zero();
  int64_t i = 0;
  for (; i + F32::width <= size; i += F32::width) {
    const F32 value = load(x + i);
    squares = fma(value, value, squares);
  }
  const int rest = static_cast<int>(size - i);
  if (rest) {
    const F32 value = load_partial(x + i, rest);
    squares = fma(value, value, squares);
  }
  const F32 scale = set1(1.0f / __builtin_sqrtf(foveal::FOVEAL_ISA::sum(squares) / static_cast<float>(size) + norm.epsilon));
  const Number* weight = static_cast<const Number*>(norm.weight);
  Number* out = static_cast<Number*>(norm.out) + row * size;
  for (i = 0; i + F32::width <= size; i += F32::width) store(out + i, load(x + i) * scale * load(weight + i));
  if (rest) store_partial(out + i, load_partial(x + i, rest) * scale * load_partial(weight + i, rest), rest);
}

}  // namespace

void rms_norm(const RmsNorm& norm) {
  auto body = [&](int item, int) {
    const int64_t stop = item * ROWS + ROWS < norm.rows ? item * ROWS + ROWS : norm.rows;
    for (int64_t row = item * ROWS; row < stop; ++row)
      norm.format == Format::f32 ? norm_row<float>(norm, row) : norm_row<bf16>(norm, row);
  };
  parallel(norm.threads, static_cast<int>((norm.rows + ROWS - 1) / ROWS), body);
}

}  // namespace foveal::FOVEAL_ISA
