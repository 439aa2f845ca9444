// Gated activation: one pass over both halves of a row, computed in float32 and rounded once.
#include "kernels/activation.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace foveal::FOVEAL_ISA {
namespace {

// Results for one thread at a time; fewer are not worth waking a second thread.
constexpr int64_t RESULTS = 1 << 13;

template <Activation activation>
FOVEAL_INLINE F32 activate(F32 x) {
  if constexpr (activation == Activation::silu) return silu(x);
  // x (1 + tanh(y)) / 2 = x sigmoid(2 y), y = sqrt(2 / pi) (x + 0.044715 x^3) (arXiv 1606.08415)
  if constexpr (activation == Activation::gelu_tanh)
    return times_sigmoid(x, x * fma(x * x, set1(2.0f * 0.79788456f * 0.044715f), set1(2.0f * 0.79788456f)));
  return max(zero(), x);  // in this order a NaN stays
}

template <class Number, Activation activation>
void gate_numbers(const Number* gate, const Number* up, Number* out, int64_t count) {
  int64_t i = 0;
  for (; i + F32::width <= count; i += F32::width) store(out + i, activate<activation>(load(gate + i)) * load(up + i));
  if (const int rest = static_cast<int>(count - i))
    store_partial(out + i, activate<activation>(load_partial(gate + i, rest)) * load_partial(up + i, rest), rest);
}

template <class Number>
void gate_row(const Gated& gated, int64_t row) {
  const int64_t count = gated.size;
  const Number* gate = static_cast<const Number*>(gated.x) + row * gated.x_stride;
  const Number* up = gate + count;
  Number* out = static_cast<Number*>(gated.out) + row * count;
  switch (gated.activation) {
    case Activation::silu:
      return gate_numbers<Number, Activation::silu>(gate, up, out, count);
    case Activation::gelu_tanh:
      return gate_numbers<Number, Activation::gelu_tanh>(gate, up, out, count);
    case Activation::relu:
      return gate_numbers<Number, Activation::relu>(gate, up, out, count);
  }
}

}  // namespace

void gated(const Gated& gated) {
  const int64_t rows_at_once = gated.size < RESULTS ? RESULTS / (gated.size ? gated.size : 1) : 1;
  auto body = [&](int item, int) {
    const int64_t stop = (item + 1) * rows_at_once < gated.rows ? (item + 1) * rows_at_once : gated.rows;
    for (int64_t row = item * rows_at_once; row < stop; ++row)
      gated.format == Format::f32 ? gate_row<float>(gated, row) : gate_row<bf16>(gated, row);
  };
  parallel(gated.threads, static_cast<int>((gated.rows + rows_at_once - 1) / rows_at_once), body);
}

}  // namespace foveal::FOVEAL_ISA
