// Mamba and Mamba-2 as blocks: see block.h.
#include "kernels/recurrent_parts.h"
#include "kernels/scan.h"

namespace foveal::FOVEAL_ISA {
namespace {

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
  recur(states, inner * state, scan, selective_scan);
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
  recur(states, inner * block.state, scan, ssd);
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
