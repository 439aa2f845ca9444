// What the two forms of flash attention share. flash.cpp cuts a call into pieces for either: single queries (one query of a
// sequence, all heads, a range of its keys) and tiles (several queries, the heads of one group, all their keys).
#pragma once

#include "common/scratch.h"
#include "common/simd.h"
#include "kernels/flash.h"

namespace foveal::FOVEAL_ISA {

constexpr float LN2 = 0.693147181f;
constexpr float NOTHING = -__builtin_inff();

FOVEAL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FOVEAL_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// What one query sees: positions [0, sinks) and [start, stop), sinks <= start <= stop.
struct Visible {
  int64_t sinks, start, stop;
  int64_t count() const { return sinks + stop - start; }
  // The i-th position that is seen.
  int64_t position(int64_t i) const { return i < sinks ? i : i - sinks + start; }
};

FOVEAL_INLINE Visible visible(const Flash& flash, int64_t s, int64_t query) {
  const int64_t length = flash.sequences.lengths[s], end = flash.sequences.first_positions[s] + query + 1;
  const int64_t stop = flash.causal ? larger(0, smaller(end, length)) : length;
  const int64_t start = flash.window ? smaller(larger(end - flash.window, 0), stop) : 0;
  if (flash.sinks >= start) return {0, 0, stop};
  return {flash.sinks, start, stop};
}

FOVEAL_INLINE int64_t query_count(const Flash& flash, int64_t s) {
  return flash.sequences.query_offsets[s + 1] - flash.sequences.query_offsets[s];
}

// The softmax so far, in base 2: of scores x, e^(scale x) = 2^(factor x).
struct SoftmaxState {
  float highest;  // of the raw scores; NOTHING before the first
  float sum;      // of 2^(factor (x - highest))
};

// 2^(factor (highest - base)): what a state's weights are multiplied by where the maximum is `base`.
FOVEAL_INLINE float power(float highest, float base, float factor) {
  float lanes[F32::width];
  store(lanes, exp2(set1(highest == base ? 0.0f : (highest - base) * factor)));
  return lanes[0];
}

// Takes n (a multiple of the width) raw scores into the state and turns them into weights relative to its new maximum,
// rounded to Weight in place. Returns what older weights have to be multiplied by. -inf: not seen.
template <class Weight>
FOVEAL_INLINE float add_scores(SoftmaxState& state, float* scores, int64_t n, float factor) {
  F32 highest = set1(state.highest);
  for (int64_t i = 0; i < n; i += F32::width) highest = max(load(scores + i), highest);
  const float before = state.highest, now = maximum(highest);
  const float base = now == NOTHING ? 0.0f : now * factor;
  F32 total = zero();
  Weight* weights = reinterpret_cast<Weight*>(scores);
  for (int64_t i = 0; i < n; i += F32::width) {
    const F32 weight = exp2(fma(load(scores + i), set1(factor), set1(-base)));
    total = total + weight;
    store(weights + i, weight);
  }
  const float older = power(before, now, factor);
  state = {now, state.sum * older + sum(total)};
  return older;
}

FOVEAL_INLINE void multiply_row(float* row, int64_t n, float factor) {
  for (int64_t i = 0; i < n; i += F32::width) store(row + i, load(row + i) * set1(factor));
}

// Writes one output row, divided by the sum, and its log-sum-exp.
template <class Number>
FOVEAL_INLINE void finish_row(const Flash& flash, int64_t row, int head, const float* sums, SoftmaxState state) {
  const int64_t place = row * flash.heads + head;
  Number* out = static_cast<Number*>(flash.out) + place * flash.value_dim;
  const F32 inverse = set1(state.sum == 0.0f ? 0.0f : 1.0f / state.sum);
  for (int i = 0; i < flash.value_dim; i += F32::width) {
    const int n = flash.value_dim - i;
    n >= F32::width ? store(out + i, load(sums + i) * inverse) : store_partial(out + i, load(sums + i) * inverse, n);
  }
  if (flash.lse) flash.lse[place] = state.highest * flash.scale + __builtin_logf(state.sum);
}

// One query of a sequence in parts: ranges of its visible keys (flash_single.cpp).
int64_t single_parts(const Flash& flash, int64_t s);
int64_t single_result_size(const Flash& flash);  // floats of one part's result
int64_t single_scratch_bytes(const Flash& flash);
// Writes the output where there is only one part, otherwise the part's result.
void run_single(const Flash& flash, int64_t s, int64_t part, int64_t parts, float* result, char* scratch);
// The output from the results of all parts, which are used up.
void combine_single(const Flash& flash, int64_t s, int64_t parts, float* results);

// Several queries against the heads of one group (flash_tile.cpp).
int64_t tile_queries(const Flash& flash);
int64_t tile_scratch_bytes(const Flash& flash);
void run_tile(const Flash& flash, int64_t s, int group, int64_t first_query, int64_t queries, char* scratch);

}  // namespace foveal::FOVEAL_ISA
