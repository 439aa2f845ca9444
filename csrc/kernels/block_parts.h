// What the blocks of block.h have in common.
#pragma once

#include <cstring>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "kernels/block.h"
#include "kernels/norm.h"

namespace foveal::FOVEAL_ISA {

inline int64_t bytes_of(Format format) {
  return format == Format::f32 ? sizeof(float) : format == Format::bf16 ? sizeof(bf16) : 1;
}

inline char* at(void* numbers, int64_t place, Format format) {
  return static_cast<char*>(numbers) + place * bytes_of(format);
}
inline const char* at(const void* numbers, int64_t place, Format format) {
  return static_cast<const char*>(numbers) + place * bytes_of(format);
}

inline void apply(const Layer& layer, const void* x, void* out, const BlockNorm& norm, const BlockStep& step) {
  linear({x, layer.weight.inputs, layer.weight, layer.bias, out, step.tokens, norm.format, step.threads});
}

inline void apply_norm(const BlockNorm& norm, const BlockStep& step, void* out) {
  rms_norm({step.x, norm.hidden, nullptr, nullptr, norm.weight, out, step.tokens, norm.hidden, norm.epsilon, norm.format,
            step.threads});
}

template <class Number>
void add_numbers(const Number* x, const Number* y, Number* out, int64_t count) {
  int64_t i = 0;
  for (; i + F32::width <= count; i += F32::width) store(out + i, load(x + i) + load(y + i));
  if (const int rest = static_cast<int>(count - i))
    store_partial(out + i, load_partial(x + i, rest) + load_partial(y + i, rest), rest);
}

// out = x + y, rounded; out may be either.
inline void add(const void* x, const void* y, void* out, int64_t count, Format format) {
  if (format == Format::f32)
    add_numbers(static_cast<const float*>(x), static_cast<const float*>(y), static_cast<float*>(out), count);
  else
    add_numbers(static_cast<const bf16*>(x), static_cast<const bf16*>(y), static_cast<bf16*>(out), count);
}

// The step's output: its input and what the operation made of it.
inline void add_residual(const BlockNorm& norm, const BlockStep& step, const void* y) {
  add(step.x, y, step.out, step.tokens * norm.hidden, norm.format);
}

template <class From, class To>
void convert_numbers(const From* x, To* out, int64_t count) {
  for (int64_t i = 0; i < count; i += F32::width) {
    const int n = static_cast<int>(count - i);
    n >= F32::width ? store(out + i, load(x + i)) : store_partial(out + i, load_partial(x + i, n), n);
  }
}

// Copies numbers of one format, f32 or bf16, as those of another.
inline void convert(const void* x, Format from, void* out, Format to, int64_t count) {
  if (from == to)
    std::memcpy(out, x, count * bytes_of(from));
  else if (from == Format::f32)
    convert_numbers(static_cast<const float*>(x), static_cast<bf16*>(out), count);
  else
    convert_numbers(static_cast<const bf16*>(x), static_cast<float*>(out), count);
}

}  // namespace foveal::FOVEAL_ISA
