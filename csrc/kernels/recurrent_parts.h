// What the blocks of recurrent mixers have in common. States are copied out of their slots and back: little beside the weights.
#pragma once

#include "kernels/block_parts.h"
#include "kernels/conv.h"

namespace foveal::FOVEAL_ISA {

// log(1 + e^x) = max(x, 0) + log(1 + z) for z = e^-|x|, and log(1 + z) = 2 atanh(z / (2 + z)), whose series ends below 2e-8.
FOVEAL_INLINE F32 softplus(F32 x) {
  const F32 above = max(zero(), x), z = exp(min(x, zero() - x)), s = z / (set1(2.0f) + z), squared = s * s;
  F32 series = set1(1.0f / 15);
  for (int n = 13; n > 0; n -= 2) series = fma(series, squared, set1(1.0f / static_cast<float>(n)));
  return fma(s + s, series, above);
}

// Calls each(i, n) for registers of n numbers.
template <class Each>
FOVEAL_INLINE void for_registers(int64_t count, Each each) {
  for (int64_t i = 0; i < count; i += F32::width) each(i, static_cast<int>(count - i < F32::width ? count - i : F32::width));
}

// `rows` rows of `count` numbers in the format, as floats that follow one another.
inline void widen(const void* x, int64_t stride, Format format, float* out, int64_t rows, int64_t count) {
  for (int64_t t = 0; t < rows; ++t) convert(at(x, t * stride, format), format, out + t * count, Format::f32, count);
}

template <class Number>
void silu_in_place(Number* x, int64_t count) {
  for_registers(count, [=](int64_t i, int n) { store_partial(x + i, silu(load_up_to(x + i, n)), n); });
}

// The states of the step's sequences side by side: in their slot itself, where there is one sequence.
inline char* read_states(const CachedRows& slots, const StateStep& step, int64_t bytes, char* room) {
  if (step.sequences.count == 1 && !step.fresh[0]) return slots.data + step.in[0] * slots.stride;
  for (int64_t s = 0; s < step.sequences.count; ++s) {
    if (step.fresh[s])
      std::memset(room + s * bytes, 0, bytes);
    else
      std::memcpy(room + s * bytes, slots.data + step.in[s] * slots.stride, bytes);
  }
  return room;
}

inline void write_states(const CachedRows& slots, const StateStep& step, int64_t bytes, const char* states) {
  for (int64_t s = 0; s < step.sequences.count; ++s)
    std::memcpy(slots.data + step.out[s] * slots.stride, states + s * bytes, bytes);
}

// The convolution of `channels` of each token and its activation.
inline void convolve(const BlockNorm& norm, const BlockConv& conv, const BlockStep& step, const StateStep& states,
                     const char* x, int64_t x_stride, int64_t channels, char* out) {
  const int64_t bytes = (conv.taps - 1) * channels * bytes_of(norm.format), count = states.sequences.count;
  Scratch scratch(2 * count * bytes + 2 * 64);
  const char* before = read_states(states.inputs, states, bytes, scratch.take<char>(count * bytes));
  char* after = scratch.take<char>(count * bytes);
  causal_conv({x, x_stride, conv.weight, conv.bias, before, after, out, channels, conv.taps, norm.format, states.sequences,
               step.threads});
  write_states(states.inputs, states, bytes, after);
  if (norm.format == Format::f32)
    silu_in_place(reinterpret_cast<float*>(out), step.tokens * channels);
  else
    silu_in_place(reinterpret_cast<bf16*>(out), step.tokens * channels);
}

// Runs a recurrence from and to the slots. `size`: numbers of a state.
template <class Call, class Kernel>
void recur(const StateStep& states, int64_t size, Call call, Kernel kernel) {
  const int64_t bytes = size * static_cast<int64_t>(sizeof(float)), count = states.sequences.count;
  Scratch scratch(2 * count * bytes + 2 * 64);
  call.state_in = reinterpret_cast<const float*>(read_states(states.states, states, bytes, scratch.take<char>(count * bytes)));
  call.state_out = scratch.take<float>(count * size);
  kernel(call);
  write_states(states.states, states, bytes, reinterpret_cast<const char*>(call.state_out));
}

}  // namespace foveal::FOVEAL_ISA
