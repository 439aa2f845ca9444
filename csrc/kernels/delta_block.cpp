// The gated delta rule and Kimi Delta Attention as blocks: see block.h.
#include "kernels/delta.h"
#include "kernels/recurrent_parts.h"

namespace foveal::FOVEAL_ISA {
namespace {

// x[i] = function(x[i]) for registers.
template <class Function>
void map(float* x, int64_t count, Function function) {
  for_registers(count, [=](int64_t i, int n) { store_partial(x + i, function(load_up_to(x + i, n)), n); });
}

// scale x / sqrt(sum(x^2) + 1e-6), for each of `count` vectors that follow one another.
void make_units(float* x, int64_t count, int64_t size, float scale) {
  for (int64_t v = 0; v < count; ++v, x += size) {
    F32 squares = zero();
    for_registers(size, [&](int64_t i, int n) {
      const F32 numbers = load_up_to(x + i, n);
      squares = fma(numbers, numbers, squares);
    });
    const F32 factor = set1(scale / __builtin_sqrtf(sum(squares) + 1e-6f));
    map(x, size, [=](F32 numbers) { return numbers * factor; });
  }
}

// What the delta rule made, [tokens, heads, values], normed by head in the format and times the gates (floats).
void finish(const DeltaBlock& block, const BlockStep& step, float* out, const float* gates, char* rounded) {
  const Format format = block.norm.format;
  const int64_t rows = step.tokens * block.heads, numbers = rows * block.values;
  convert(out, Format::f32, rounded, format, numbers);
  rms_norm({rounded, block.values, nullptr, nullptr, block.out_norm, rounded, rows, block.values, block.norm.epsilon, format,
            step.threads});
  convert(rounded, format, out, Format::f32, numbers);
  for_registers(numbers, [=](int64_t i, int n) {
    store_partial(out + i, load_up_to(out + i, n) * load_up_to(gates + i, n), n);
  });
  convert(out, Format::f32, rounded, format, numbers);
}

// Floats of a step.
struct Gates {
  float *decay, *beta, *out;
};

// From what the convolution reads, [tokens, mixed], and the gates to the block's output.
void mix(const DeltaBlock& block, const BlockStep& step, const StateStep& states, const char* mixed, const Gates& gates,
         bool decay_by_key, char* hidden) {
  const Format format = block.norm.format;
  const int64_t tokens = step.tokens, keys = block.groups * block.keys, values = block.heads * block.values;
  const int64_t width = 2 * keys + values, each = bytes_of(format) * tokens;
  Scratch scratch(width * each + (width + values) * tokens * sizeof(float) + 3 * 64);
  char* convolved = scratch.take<char>(width * each);
  float* wide = scratch.take<float>(width * tokens);
  float* out = scratch.take<float>(values * tokens);
  convolve(block.norm, block.conv, step, states, mixed, width, width, convolved);
  widen(convolved, width, format, wide, tokens, width);
  for (int64_t t = 0; t < tokens; ++t) {
    make_units(wide + t * width, block.groups, block.keys, 1.0f / __builtin_sqrtf(static_cast<float>(block.keys)));
    make_units(wide + t * width + keys, block.groups, block.keys, 1.0f);
  }
  const PerToken<float> decay{gates.decay, decay_by_key ? block.heads * block.keys : block.heads};
  const LinearAttention call{{wide, width}, {wide + keys, width}, {wide + 2 * keys, width}, decay, {gates.beta, block.heads},
                             nullptr, nullptr, out, block.heads, block.groups, block.keys, block.values, decay_by_key,
                             states.sequences, step.threads};
  recur(states, block.heads * block.keys * block.values, call, delta_rule);
  finish(block, step, out, gates.out, convolved);
  apply(block.out, convolved, hidden, block.norm, step);
  add_residual(block.norm, step, hidden);
}

// The checkpoint's projections stand side by side for each key head: q, k, v, z and beta, dt.
void part_heads(const DeltaBlock& block, const BlockStep& step, const char* all, const char* ba, char* mixed, const Gates& gates) {
  const Format format = block.norm.format;
  const int64_t served = block.heads / block.groups, keys = block.keys, values = served * block.values;
  const int64_t all_keys = block.groups * keys, width = 2 * all_keys + block.heads * block.values;
  auto copy = [&](char* to, const char* from, int64_t count) { std::memcpy(to, from, count * bytes_of(format)); };
  for (int64_t t = 0; t < step.tokens; ++t)
    for (int64_t g = 0; g < block.groups; ++g) {
      const char* from = at(all, (t * block.groups + g) * 2 * (keys + values), format);
      char* to = at(mixed, t * width, format);
      copy(at(to, g * keys, format), from, keys);
      copy(at(to, all_keys + g * keys, format), at(from, keys, format), keys);
      copy(at(to, 2 * all_keys + g * values, format), at(from, 2 * keys, format), values);
      const int64_t first = t * block.heads + g * served;
      convert(at(from, 2 * keys + values, format), format, gates.out + first * block.values, Format::f32, values);
      const char* two = at(ba, (t * block.groups + g) * 2 * served, format);
      convert(two, format, gates.beta + first, Format::f32, served);
      convert(at(two, served, format), format, gates.decay + first, Format::f32, served);
    }
}

// decay = a softplus(dt + bias), `size` numbers for each head's a.
void make_decay(const DeltaBlock& block, const BlockStep& step, float* decay, int64_t size) {
  for (int64_t t = 0; t < step.tokens; ++t)
    for (int64_t h = 0; h < block.heads; ++h) {
      float* own = decay + (t * block.heads + h) * size;
      const float* bias = block.dt_bias + h * size;
      const F32 a = set1(block.a[h]);
      for_registers(size, [=](int64_t i, int n) {
        store_partial(own + i, a * softplus(load_up_to(own + i, n) + load_up_to(bias + i, n)), n);
      });
    }
}

}  // namespace

void delta_block(const DeltaBlock& block, const BlockStep& step, const StateStep& states) {
  const Format format = block.norm.format;
  const int64_t tokens = step.tokens, heads = block.heads, values = heads * block.values;
  const int64_t width = 2 * block.groups * block.keys + values, each = bytes_of(format) * tokens;
  Scratch scratch((block.norm.hidden + 2 * width + values + 2 * heads) * each + (2 * heads + values) * tokens * sizeof(float) +
                  7 * 64);
  char* hidden = scratch.take<char>(block.norm.hidden * each);
  char* all = scratch.take<char>((width + values) * each);
  char* ba = scratch.take<char>(2 * heads * each);
  char* mixed = scratch.take<char>(width * each);
  const Gates gates{scratch.take<float>(heads * tokens), scratch.take<float>(heads * tokens),
                    scratch.take<float>(values * tokens)};
  apply_norm(block.norm, step, hidden);
  apply(block.in, hidden, all, block.norm, step);
  apply(block.ba, hidden, ba, block.norm, step);
  part_heads(block, step, all, ba, mixed, gates);
  make_decay(block, step, gates.decay, 1);
  map(gates.beta, heads * tokens, sigmoid);
  map(gates.out, values * tokens, silu);
  mix(block, step, states, mixed, gates, false, hidden);
}

void kda_block(const DeltaBlock& block, const BlockStep& step, const StateStep& states) {
  const Format format = block.norm.format;
  const int64_t tokens = step.tokens, inner = block.heads * block.keys, narrow = block.f_a.weight.outputs;
  const int64_t each = bytes_of(format) * tokens;
  Scratch scratch((block.norm.hidden + 4 * inner + narrow + block.heads) * each +
                  (2 * inner + block.heads) * tokens * sizeof(float) + 8 * 64);
  char* hidden = scratch.take<char>(block.norm.hidden * each);
  char* mixed = scratch.take<char>(3 * inner * each);
  char* between = scratch.take<char>(narrow * each);
  char* made = scratch.take<char>(inner * each);
  char* beta = scratch.take<char>(block.heads * each);
  const Gates gates{scratch.take<float>(inner * tokens), scratch.take<float>(block.heads * tokens),
                    scratch.take<float>(inner * tokens)};
  apply_norm(block.norm, step, hidden);
  apply(block.in, hidden, mixed, block.norm, step);
  apply(block.f_a, hidden, between, block.norm, step);
  apply(block.f_b, between, made, block.norm, step);
  convert(made, format, gates.decay, Format::f32, inner * tokens);
  apply(block.g_a, hidden, between, block.norm, step);
  apply(block.g_b, between, made, block.norm, step);
  convert(made, format, gates.out, Format::f32, inner * tokens);
  apply(block.ba, hidden, beta, block.norm, step);
  convert(beta, format, gates.beta, Format::f32, block.heads * tokens);
  make_decay(block, step, gates.decay, block.keys);
  map(gates.beta, block.heads * tokens, sigmoid);
  map(gates.out, inner * tokens, sigmoid);
  mix(block, step, states, mixed, gates, true, hidden);
}

}  // namespace foveal::FOVEAL_ISA
