// The lightning indexer beside a block's attention: foveal/nn/indexer.py.
#pragma once

#include "kernels/block_parts.h"
#include "kernels/quantise.h"
#include "kernels/rope.h"
#include "kernels/select.h"

namespace foveal::FOVEAL_ISA {

// Layer norm in float32, rounded to the format (foveal/nn/norm.py).
template <class Number>
inline void norm_key(const BlockIndexer& indexer, Number* key) {
  const int64_t size = indexer.size;
  float mean = 0, squares = 0;
  Scratch scratch(size * sizeof(float));
  float* wide = scratch.take<float>(size);
  for (int64_t i = 0; i < size; i += F32::width) {
    const int n = static_cast<int>(size - i < F32::width ? size - i : F32::width);
    const F32 x = load_up_to(key + i, n);
    store_partial(wide + i, x, n);
    mean += sum(x);
  }
  mean /= static_cast<float>(size);
  for (int64_t i = 0; i < size; ++i) squares += (wide[i] - mean) * (wide[i] - mean);
  const float scale = 1.0f / __builtin_sqrtf(squares / static_cast<float>(size) + indexer.epsilon);
  for (int64_t i = 0; i < size; ++i) wide[i] = (wide[i] - mean) * scale * indexer.key_weight[i] + indexer.key_bias[i];
  for (int64_t i = 0; i < size; i += F32::width) {
    const int n = static_cast<int>(size - i < F32::width ? size - i : F32::width);
    store_partial(key + i, load_up_to(wide + i, n), n);
  }
}

inline void turn_index(const BlockNorm& norm, const BlockIndexer& indexer, const BlockStep& step, const CachedStep& cache,
                       char* x, int heads) {
  const int64_t row = heads * indexer.size;
  rope({x, row, indexer.size, x, row, indexer.size, cache.index_turns, step.tokens, heads, indexer.size, indexer.pairs,
        indexer.interleaved, norm.format, step.threads});
}

inline bool has_eight_bits(const CachedRows& keys) { return keys.format == Format::e4m3 || keys.format == Format::int8; }

inline void keep_index_keys(const BlockNorm& norm, const BlockIndexer& indexer, const BlockStep& step,
                            const CachedStep& cache, const char* hidden) {
  const Format format = norm.format;
  Scratch scratch(step.tokens * indexer.size * bytes_of(format));
  char* keys = scratch.take<char>(step.tokens * indexer.size * bytes_of(format));
  apply(indexer.keys, hidden, keys, norm, step);
  for (int64_t t = 0; t < step.tokens; ++t) {
    char* key = at(keys, t * indexer.size, format);
    format == Format::f32 ? norm_key(indexer, reinterpret_cast<float*>(key)) : norm_key(indexer, reinterpret_cast<bf16*>(key));
  }
  turn_index(norm, indexer, step, cache, keys, 1);
  if (has_eight_bits(cache.index))
    return quantise_index({keys, indexer.size, format, cache.index.format, step.tokens, indexer.size, cache.rows,
                           reinterpret_cast<uint8_t*>(cache.index.data), nullptr, cache.index.stride, step.threads});
  for (int64_t t = 0; t < step.tokens; ++t)
    convert(at(keys, t * indexer.size, format), format, cache.index.data + cache.rows[t] * cache.index.stride,
            cache.index.format, indexer.size);
}

// Weights of the index heads, float32 [tokens, heads].
inline void weigh_heads(const BlockNorm& norm, const BlockIndexer& indexer, const BlockStep& step, const char* hidden,
                        float* weights) {
  const int64_t numbers = step.tokens * norm.hidden;
  Scratch scratch(numbers * sizeof(float));
  float* wide = scratch.take<float>(numbers);
  convert(hidden, norm.format, wide, Format::f32, numbers);
  linear({wide, norm.hidden, indexer.weights.weight, indexer.weights.bias, weights, step.tokens, Format::f32,
          step.threads});
  for (int64_t i = 0; i < step.tokens * indexer.heads; ++i) weights[i] *= indexer.scale;
}

inline void choose(const BlockNorm& norm, const BlockIndexer& indexer, const BlockStep& step, const CachedStep& cache,
                   const char* hidden, const char* latent) {
  const Format format = norm.format;
  const bool eight_bits = has_eight_bits(cache.index);
  const int64_t rows = step.tokens * indexer.heads, numbers = rows * indexer.size;
  Scratch scratch(numbers * (bytes_of(format) + 1) + 2 * rows * sizeof(float) + 4 * 64);
  char* q = scratch.take<char>(numbers * bytes_of(format));
  float* weights = scratch.take<float>(rows);
  apply(indexer.queries, latent, q, norm, step);
  turn_index(norm, indexer, step, cache, q, indexer.heads);
  weigh_heads(norm, indexer, step, hidden, weights);
  if (eight_bits) {
    uint8_t* rounded = scratch.take<uint8_t>(numbers);
    float* scales = scratch.take<float>(rows);
    quantise_index({q, indexer.size, format, cache.index.format, rows, indexer.size, nullptr, rounded, scales, 0,
                    step.threads});
    for (int64_t i = 0; i < rows; ++i) weights[i] *= scales[i];
    q = reinterpret_cast<char*>(rounded);
  }
  select({reinterpret_cast<const uint8_t*>(q), eight_bits ? cache.index.format : format, weights, indexer.heads,
          indexer.size, {reinterpret_cast<const uint8_t*>(cache.index.data), cache.index.format, cache.index.stride},
          cache.sequences, indexer.topk, cache.selection->room, step.threads});
  cache.selection->places = cache.selection->room;
}

// Keeps index keys, and selects where a sequence is longer than a selection.
inline void glance(const BlockNorm& norm, const BlockIndexer& indexer, const BlockStep& step, const CachedStep& cache,
                   const char* hidden, const char* latent) {
  keep_index_keys(norm, indexer, step, cache, hidden);
  bool longer = false;
  for (int64_t s = 0; s < cache.sequences.count; ++s) longer = longer || cache.sequences.lengths[s] > indexer.topk;
  cache.selection->topk = longer ? indexer.topk : 0;
  if (longer) choose(norm, indexer, step, cache, hidden, latent);
}

}  // namespace foveal::FOVEAL_ISA
