// Grouped-query attention and the dense feed-forward as blocks: see block.h. The scratch of a few tokens (a projection or two, hidden states) stays in level-two cache
// between the parts; what comes from memory is weights, read once, and the keys of the context.
#include "kernels/block_indexer.h"
#include "kernels/flash.h"
#include "kernels/sparse.h"

namespace foveal::FOVEAL_ISA {
namespace {

// The heads of one token, in place.
void norm_heads(const GqaBlock& block, void* heads, const void* weight, int count) {
  const int64_t size = block.head_dim;
  rms_norm({heads, size, nullptr, nullptr, weight, heads, count, size, block.norm.epsilon, block.norm.format, 1});
}

// Norms and turns the queries and keys of a fused projection, in place.
void place_heads(const GqaBlock& block, const BlockStep& step, const float* turns, void* qkv) {
  const Format format = block.norm.format;
  const int64_t width = block.qkv.weight.outputs, dim = block.head_dim;
  if (block.q_norm)
    for (int64_t t = 0; t < step.tokens; ++t) {
      norm_heads(block, at(qkv, t * width, format), block.q_norm, block.heads);
      norm_heads(block, at(qkv, t * width + block.heads * dim, format), block.k_norm, block.groups);
    }
  if (block.pairs)
    rope({qkv, width, dim, qkv, width, dim, turns, step.tokens, block.heads + block.groups, dim, block.pairs,
          block.interleaved, format, step.threads});
}

// Copies the keys and values of a fused projection to their rows of the cache.
void keep(const GqaBlock& block, const BlockStep& step, const CachedStep& cache, const void* qkv) {
  const Format format = block.norm.format;
  const int64_t width = block.qkv.weight.outputs, row = static_cast<int64_t>(block.groups) * block.head_dim;
  const int64_t queries = static_cast<int64_t>(block.heads) * block.head_dim, bytes = row * bytes_of(format);
  for (int64_t t = 0; t < step.tokens; ++t) {
    const void* keys = at(qkv, t * width + queries, format);
    std::memcpy(at(cache.first.data, cache.rows[t] * row, format), keys, bytes);
    std::memcpy(at(cache.second.data, cache.rows[t] * row, format), at(keys, row, format), bytes);
  }
}

void attend_selection(const GqaBlock& block, const BlockStep& step, const CachedStep& cache, const void* qkv, void* out) {
  const Format format = block.norm.format;
  const int64_t width = block.qkv.weight.outputs, dim = block.head_dim, queries = block.heads * dim;
  Scratch scratch(step.tokens * queries * bytes_of(format));
  char* q = scratch.take<char>(step.tokens * queries * bytes_of(format));
  for (int64_t t = 0; t < step.tokens; ++t)
    std::memcpy(at(q, t * queries, format), at(qkv, t * width, format), queries * bytes_of(format));
  sparse_attention({q, cache.first.data, cache.second.data, out, format, block.heads, block.groups, dim, dim, block.scale,
                    cache.sequences, cache.selection->places, cache.selection->topk, step.threads});
}

void attend(const GqaBlock& block, const BlockStep& step, const CachedStep& cache, const void* qkv, void* out) {
  if (block.sparse && cache.selection->topk) return attend_selection(block, step, cache, qkv, out);
  const int64_t dim = block.head_dim, row = block.groups * dim;
  Flash flash{};
  flash.q = qkv;
  flash.q_row = block.qkv.weight.outputs;
  flash.k = cache.first.data;
  flash.v = cache.second.data;
  flash.k_row = flash.v_row = row;
  flash.q_head = flash.k_head = flash.v_head = dim;
  flash.out = out;
  flash.sequences = cache.sequences;
  flash.heads = block.heads;
  flash.groups = block.groups;
  flash.key_dim = flash.value_dim = block.head_dim;
  flash.scale = block.scale;
  flash.causal = true;
  flash.window = block.window;
  flash.format = block.norm.format;
  flash.threads = step.threads;
  foveal::FOVEAL_ISA::flash(flash);
}

}  // namespace

void gqa_block(const GqaBlock& block, const BlockStep& step, const CachedStep& cache) {
  const BlockNorm& norm = block.norm;
  const int64_t width = block.qkv.weight.outputs, attended = static_cast<int64_t>(block.heads) * block.head_dim;
  const int64_t bytes = bytes_of(norm.format) * step.tokens;
  Scratch scratch((norm.hidden + width + attended) * bytes + 3 * 64);
  char* hidden = scratch.take<char>(norm.hidden * bytes);  // the normed input, later what is added to the input
  char* qkv = scratch.take<char>(width * bytes);
  char* out = scratch.take<char>(attended * bytes);
  apply_norm(norm, step, hidden);
  if (block.indexer.topk) glance(norm, block.indexer, step, cache, hidden, hidden);
  apply(block.qkv, hidden, qkv, norm, step);
  place_heads(block, step, cache.turns, qkv);
  keep(block, step, cache, qkv);
  attend(block, step, cache, qkv, out);
  apply(block.out, out, hidden, norm, step);
  add_residual(norm, step, hidden);
}

void mlp_block(const MlpBlock& block, const BlockStep& step) {
  const BlockNorm& norm = block.norm;
  const int64_t width = block.down.weight.inputs, bytes = bytes_of(norm.format) * step.tokens;
  Scratch scratch((norm.hidden + 3 * width) * bytes + 3 * 64);
  char* hidden = scratch.take<char>(norm.hidden * bytes);
  char* both = scratch.take<char>(2 * width * bytes);
  char* inner = scratch.take<char>(width * bytes);
  apply_norm(norm, step, hidden);
  apply(block.gate_up, hidden, both, norm, step);
  gated({both, 2 * width, inner, step.tokens, width, block.activation, norm.format, step.threads});
  apply(block.down, inner, hidden, norm, step);
  add_residual(norm, step, hidden);
}

}  // namespace foveal::FOVEAL_ISA
