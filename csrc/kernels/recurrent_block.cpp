// Mamba and Mamba-2 as blocks: see block.h. States are copied out of their slots and back: little beside the weights.
#include "kernels/block_parts.h"
#include "kernels/conv.h"
#include "kernels/scan.h"

namespace foveal::FOVEAL_ISA {
namespace {

FOVEAL_INLINE F32 silu(F32 x) { return x / (set1(1.0f) + exp(zero() - x)); }

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
void widen(const void* x, int64_t stride, Format format, float* out, int64_t rows, int64_t count) {
  for (int64_t t = 0; t < rows; ++t) convert(at(x, t * stride, format), format, out + t * count, Format::f32, count);
}

template <class Number>
void silu_in_place(Number* x, int64_t count) {
  for_registers(count, [=](int64_t i, int n) { store_partial(x + i, silu(load_up_to(x + i, n)), n); });
}

// The states of the step's sequences side by side: in their slot itself, where there is one sequence.
char* read_states(const CachedRows& slots, const StateStep& step, int64_t bytes, char* room) {
  if (step.sequences.count == 1 && !step.fresh[0]) return slots.data + step.in[0] * slots.stride;
  for (int64_t s = 0; s < step.sequences.count; ++s) {
    if (step.fresh[s])
      std::memset(room + s * bytes, 0, bytes);
    else
      std::memcpy(room + s * bytes, slots.data + step.in[s] * slots.stride, bytes);
  }
  return room;
}

void write_states(const CachedRows& slots, const StateStep& step, int64_t bytes, const char* states) {
  for (int64_t s = 0; s < step.sequences.count; ++s)
    std::memcpy(slots.data + step.out[s] * slots.stride, states + s * bytes, bytes);
}

// The convolution of `channels` of each token and its activation.
void convolve(const BlockNorm& norm, const BlockConv& conv, const BlockStep& step, const StateStep& states, const char* x,
              int64_t x_stride, int64_t channels, char* out) {
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

// Runs the scan from and to the slots. `size`: numbers of a state.
template <class Kernel>
void scan_slots(const StateStep& states, int64_t size, Scan scan, Kernel kernel) {
  const int64_t bytes = size * static_cast<int64_t>(sizeof(float)), count = states.sequences.count;
  Scratch scratch(2 * count * bytes + 2 * 64);
  scan.state_in = reinterpret_cast<const float*>(read_states(states.states, states, bytes, scratch.take<char>(count * bytes)));
  scan.state_out = scratch.take<float>(count * size);
  kernel(scan);
  write_states(states.states, states, bytes, reinterpret_cast<const char*>(scan.state_out));
}

// One of dt, B and C of Mamba: `count` numbers of each token, normed where there is a norm, side by side.
void take_part(const MambaBlock& block, const BlockStep& step, const char* from, const void* weight, int64_t count, char* out) {
  const Format format = block.norm.format;
  const int64_t stride = block.rank + 2 * block.state;
  for (int64_t t = 0; t < step.tokens; ++t) {
    const char* part = at(from, t * stride, format);
    char* to = at(out, t * count, format);
    if (weight)
      rms_norm({part, stride, nullptr, nullptr, weight, to, 1, count, block.norm.epsilon, format, 1});
    else
      std::memcpy(to, part, count * bytes_of(format));
  }
}

// y = (y + D u) silu(gate), for the channels of one token that share a D.
void gate_channels(float* y, const float* d, int64_t d_step, const float* u, const float* gate, int64_t count) {
  for_registers(count, [=](int64_t i, int n) {
    const F32 skip = d_step ? load_up_to(d + i, n) : set1(*d);
    store_partial(y + i, fma(skip, load_up_to(u + i, n), load_up_to(y + i, n)) * silu(load_up_to(gate + i, n)), n);
  });
}

// Each group of a token's numbers divided by its root mean square and weighed.
void norm_groups(const Mamba2Block& block, float* y, int64_t inner) {
  const int64_t size = inner / block.groups;
  for (int64_t g = 0; g < block.groups; ++g) {
    F32 squares = zero();
    float* group = y + g * size;
    for_registers(size, [&](int64_t i, int n) {
      const F32 x = load_up_to(group + i, n);
      squares = fma(x, x, squares);
    });
    const float mean = sum(squares) / static_cast<float>(size);
    const F32 scale = set1(1.0f / __builtin_sqrtf(mean + block.norm.epsilon));
    for_registers(size, [&](int64_t i, int n) {
      const F32 weight = block.norm.format == Format::f32 ? load_up_to(static_cast<const float*>(block.out_norm) + g * size + i, n)
                                                          : load_up_to(static_cast<const bf16*>(block.out_norm) + g * size + i, n);
      store_partial(group + i, load_up_to(group + i, n) * scale * weight, n);
    });
  }
}

}  // namespace

void mamba_block(const MambaBlock& block, const BlockStep& step, const StateStep& states) {
  const Format format = block.norm.format;
  const int64_t tokens = step.tokens, inner = block.inner, state = block.state, rank = block.rank;
  const int64_t each = bytes_of(format) * tokens, width = rank + 2 * state, wide = sizeof(float) * tokens;
  Scratch scratch((block.norm.hidden + 4 * inner + width + rank + 2 * state) * each + (4 * inner + 2 * state) * wide + 16 * 64);
  auto take = [&](int64_t numbers) { return scratch.take<char>(numbers * each); };
  auto take_wide = [&](int64_t numbers) { return scratch.take<float>(numbers * tokens); };
  char *hidden = take(block.norm.hidden), *both = take(2 * inner), *u = take(inner), *parts = take(width);
  char *dt_in = take(rank), *b = take(state), *c = take(state), *dt = take(inner);
  float *wide_u = take_wide(inner), *wide_dt = take_wide(inner), *wide_b = take_wide(state), *wide_c = take_wide(state);
  float *y = take_wide(inner), *gate = take_wide(inner);

  apply_norm(block.norm, step, hidden);
  apply(block.in, hidden, both, block.norm, step);
  convolve(block.norm, block.conv, step, states, both, 2 * inner, inner, u);
  apply(block.x, u, parts, block.norm, step);
  take_part(block, step, parts, block.dt_norm, rank, dt_in);
  take_part(block, step, at(parts, rank, format), block.b_norm, state, b);
  take_part(block, step, at(parts, rank + state, format), block.c_norm, state, c);
  apply(block.dt, dt_in, dt, block.norm, step);
  widen(u, inner, format, wide_u, tokens, inner);
  widen(dt, inner, format, wide_dt, tokens, inner);
  widen(b, state, format, wide_b, tokens, state);
  widen(c, state, format, wide_c, tokens, state);
  widen(at(both, inner, format), 2 * inner, format, gate, tokens, inner);
  for_registers(tokens * inner, [=](int64_t i, int n) { store_partial(wide_dt + i, softplus(load_up_to(wide_dt + i, n)), n); });
  const Scan scan{{wide_u, inner}, {wide_dt, inner}, {wide_b, state}, {wide_c, state}, block.a, nullptr, nullptr, y, 1, inner,
                  1, state, states.sequences, step.threads};
  scan_slots(states, inner * state, scan, selective_scan);
  for (int64_t t = 0; t < tokens; ++t)
    gate_channels(y + t * inner, block.d, 1, wide_u + t * inner, gate + t * inner, inner);
  convert(y, Format::f32, u, format, tokens * inner);
  apply(block.out, u, hidden, block.norm, step);
  add_residual(block.norm, step, hidden);
}

void mamba2_block(const Mamba2Block& block, const BlockStep& step, const StateStep& states) {
  const Format format = block.norm.format;
  const int64_t tokens = step.tokens, heads = block.heads, dim = block.head_dim, inner = heads * dim;
  const int64_t shared = block.groups * block.state, mixed = inner + 2 * shared, total = inner + mixed + heads;
  const int64_t each = bytes_of(format) * tokens, wide = sizeof(float) * tokens;
  Scratch scratch((block.norm.hidden + total + mixed) * each + (mixed + heads + 2 * inner) * wide + 8 * 64);
  char* hidden = scratch.take<char>(block.norm.hidden * each);
  char* all = scratch.take<char>(total * each);
  char* convolved = scratch.take<char>(mixed * each);
  float* x = scratch.take<float>(mixed * tokens);
  float* dt = scratch.take<float>(heads * tokens);
  float* y = scratch.take<float>(inner * tokens);
  float* gate = scratch.take<float>(inner * tokens);

  apply_norm(block.norm, step, hidden);
  apply(block.in, hidden, all, block.norm, step);
  convolve(block.norm, block.conv, step, states, at(all, inner, format), total, mixed, convolved);
  widen(convolved, mixed, format, x, tokens, mixed);
  widen(all, total, format, gate, tokens, inner);
  widen(at(all, inner + mixed, format), total, format, dt, tokens, heads);
  for (int64_t t = 0; t < tokens; ++t)
    for_registers(heads, [&](int64_t h, int n) {
      float* own = dt + t * heads + h;
      const F32 step_size = softplus(load_up_to(own, n) + load_up_to(block.dt_bias + h, n));
      store_partial(own, min(max(step_size, set1(block.dt_least)), set1(block.dt_most)), n);
    });
  const Scan scan{{x, mixed}, {dt, heads}, {x + inner, mixed}, {x + inner + shared, mixed}, block.a, nullptr, nullptr, y,
                  heads, dim, block.groups, block.state, states.sequences, step.threads};
  scan_slots(states, inner * block.state, scan, ssd);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t place = h * dim;
      gate_channels(y + t * inner + place, block.d + h, 0, x + t * mixed + place, gate + t * inner + place, dim);
    }
    norm_groups(block, y + t * inner, inner);
  }
  convert(y, Format::f32, convolved, format, tokens * inner);
  apply(block.out, convolved, hidden, block.norm, step);
  add_residual(block.norm, step, hidden);
}

}  // namespace foveal::FOVEAL_ISA
