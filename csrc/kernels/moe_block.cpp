// A mixture of experts as a block: see block.h. Choosing is done token by token; it is little beside the experts.
#include <cmath>

#include "kernels/block_parts.h"
#include "kernels/experts.h"

namespace foveal::FOVEAL_ISA {
namespace {

// Scores of all experts from their logits, in place.
void score(const Router& router, float* logits, int64_t count) {
  if (router.sigmoid) {
    for (int64_t e = 0; e < count; ++e) logits[e] = 1.0f / (1.0f + __builtin_expf(-logits[e]));
    return;
  }
  float highest = logits[0], total = 0;
  for (int64_t e = 1; e < count; ++e) highest = logits[e] > highest ? logits[e] : highest;
  for (int64_t e = 0; e < count; ++e) total += logits[e] = __builtin_expf(logits[e] - highest);
  for (int64_t e = 0; e < count; ++e) logits[e] /= total;
}

// The places of the `wanted` highest numbers, highest first, ties to the lower place. taken: [count] scratch.
void highest_places(const float* numbers, int64_t count, int64_t wanted, bool* taken, int64_t* places) {
  for (int64_t i = 0; i < count; ++i) taken[i] = false;
  for (int64_t k = 0; k < wanted; ++k) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; ++i)
      if (!taken[i] && (best < 0 || numbers[i] > numbers[best])) best = i;
    taken[best] = true;
    places[k] = best;
  }
}

float group_score(const Router& router, const float* choices, int64_t size) {
  float best = choices[0], second = -INFINITY;
  for (int64_t e = 1; e < size; ++e) {
    if (choices[e] > best) {
      second = best;
      best = choices[e];
    } else if (choices[e] > second) {
      second = choices[e];
    }
  }
  return router.top_two && size > 1 ? best + second : best;
}

// Scratch of one token's choice.
struct Choice {
  float *choices, *groups;
  bool* taken;
  int64_t* kept;
};

void mask_groups(const Router& router, int64_t count, const Choice& memory) {
  const int64_t size = count / router.groups;
  for (int g = 0; g < router.groups; ++g) memory.groups[g] = group_score(router, memory.choices + g * size, size);
  highest_places(memory.groups, router.groups, router.groups_kept, memory.taken, memory.kept);
  for (int64_t e = 0; e < count; ++e)
    if (!memory.taken[e / size]) memory.choices[e] = router.masked;
}

// logits [experts] of one token become its experts and their weights, [per_token].
void route(const MoeBlock& block, float* logits, const Choice& memory, float* weights, int64_t* chosen) {
  const Router& router = block.router;
  const int64_t count = block.experts;
  score(router, logits, count);
  for (int64_t e = 0; e < count; ++e) memory.choices[e] = logits[e] + (router.bias ? router.bias[e] : 0.0f);
  if (router.groups > 1) mask_groups(router, count, memory);
  highest_places(memory.choices, count, block.per_token, memory.taken, chosen);
  float total = 0;
  for (int64_t a = 0; a < block.per_token; ++a) total += weights[a] = logits[chosen[a]];
  for (int64_t a = 0; a < block.per_token; ++a)
    weights[a] = (router.normalise ? weights[a] / (total + 1e-20f) : weights[a]) * router.scale;
}

void choose(const MoeBlock& block, const BlockStep& step, const void* hidden, float* weights, int64_t* chosen) {
  const int64_t count = block.experts, groups = block.router.groups;
  Scratch scratch((step.tokens * count + count + groups) * sizeof(float) + count + groups + groups * sizeof(int64_t) + 6 * 64);
  float* logits = scratch.take<float>(step.tokens * count);
  const Choice memory{scratch.take<float>(count), scratch.take<float>(groups), scratch.take<bool>(count),
                      scratch.take<int64_t>(groups)};
  linear({hidden, block.norm.hidden, block.router.weight, nullptr, logits, step.tokens, block.norm.format, step.threads, 0,
          true});
  for (int64_t t = 0; t < step.tokens; ++t)
    route(block, logits + t * count, memory, weights + t * block.per_token, chosen + t * block.per_token);
}

// Multiplies each token by the sigmoid of its gate; both are rounded.
template <class Number>
void gate_tokens(const BlockNorm& norm, const BlockStep& step, const Number* gates, Number* x) {
  for (int64_t t = 0; t < step.tokens; ++t) {
    Number rounded[F32::width];
    store(rounded, sigmoid(load_up_to(gates + t, 1)));
    float gate[F32::width];
    store(gate, load(rounded));
    for (int64_t i = 0; i < norm.hidden; i += F32::width) {
      const int n = static_cast<int>(norm.hidden - i < F32::width ? norm.hidden - i : F32::width);
      store_partial(x + t * norm.hidden + i, load_up_to(x + t * norm.hidden + i, n) * set1(gate[0]), n);
    }
  }
}

// Adds the expert of all tokens to `out`.
void add_shared(const MoeBlock& block, const BlockStep& step, const void* hidden, void* out) {
  const BlockNorm& norm = block.norm;
  const int64_t width = block.shared_down.weight.inputs, bytes = bytes_of(norm.format) * step.tokens;
  Scratch scratch((norm.hidden + 3 * width + 1) * bytes + 5 * 64);
  char* shared = scratch.take<char>(norm.hidden * bytes);
  char* both = scratch.take<char>(2 * width * bytes);
  char* inner = scratch.take<char>(width * bytes);
  apply(block.shared_gate_up, hidden, both, norm, step);
  gated({both, 2 * width, inner, step.tokens, width, Activation::silu, norm.format, step.threads});
  apply(block.shared_down, inner, shared, norm, step);
  if (is_there(block.shared_gate)) {
    char* gates = scratch.take<char>(bytes);
    apply(block.shared_gate, hidden, gates, norm, step);
    if (norm.format == Format::f32)
      gate_tokens(norm, step, reinterpret_cast<const float*>(gates), reinterpret_cast<float*>(shared));
    else
      gate_tokens(norm, step, reinterpret_cast<const bf16*>(gates), reinterpret_cast<bf16*>(shared));
  }
  add(out, shared, out, step.tokens * norm.hidden, norm.format);
}

}  // namespace

void moe_block(const MoeBlock& block, const BlockStep& step) {
  const BlockNorm& norm = block.norm;
  const int64_t bytes = norm.hidden * bytes_of(norm.format) * step.tokens, pairs = step.tokens * block.per_token;
  Scratch scratch(2 * bytes + pairs * (sizeof(float) + sizeof(int64_t)) + 5 * 64);
  char* hidden = scratch.take<char>(bytes);
  char* out = scratch.take<char>(bytes);
  float* weights = scratch.take<float>(pairs);
  int64_t* chosen = scratch.take<int64_t>(pairs);
  apply_norm(norm, step, hidden);
  choose(block, step, hidden, weights, chosen);
  experts({hidden, norm.hidden, weights, chosen, block.gate_up, block.down, block.experts, out, step.tokens, block.per_token,
           norm.format, step.threads});
  if (is_there(block.shared_down)) add_shared(block, step, hidden, out);
  add_residual(norm, step, out);
}

}  // namespace foveal::FOVEAL_ISA
