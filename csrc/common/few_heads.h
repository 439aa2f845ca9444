// What attention with few query heads to a key shares: scores are dot products along a row and values are added up, a few
// heads at a time in registers, so that each number that is read is used by all of them.
#pragma once

#include "common/simd.h"

namespace foveal::FOVEAL_ISA {

// Two registers of a row at once. bf16 come as their even and their odd numbers, which takes half as many instructions as
// widening them in order; queries are loaded in the same way, and `in_order` puts the sums right at the end.
struct Pair {
  F32 a, b;
};
constexpr int PAIR = 2 * F32::width;

FOVEAL_INLINE Pair load_pair(const float* p) { return {load(p), load(p + F32::width)}; }
FOVEAL_INLINE Pair load_pair(const bf16* p) {
  const F32 words = load(reinterpret_cast<const float*>(p));
  return {low_halves(words), high_halves(words)};
}
template <class Number>
FOVEAL_INLINE Pair load_pair_of(const Number* p, int left) {
  if (left >= PAIR) return load_pair(p);
  Number buffer[PAIR] = {};
  std::memcpy(buffer, p, left * sizeof(Number));
  return load_pair(buffer);
}

FOVEAL_INLINE void in_order(float*, int64_t, float*) {}
FOVEAL_INLINE void in_order(bf16*, int64_t n, float* row) {
  for (int64_t i = 0; i < n; i += PAIR) {
    float both[PAIR];
    std::memcpy(both, row + i, sizeof both);
    for (int j = 0; j < F32::width; ++j) row[i + 2 * j] = both[j], row[i + 2 * j + 1] = both[F32::width + j];
  }
}

constexpr int KEYS = 4;  // whose products with a few heads are summed at the same time
#if defined(FOVEAL_AVX512)
constexpr int MOST_ROWS = 4;
#else
constexpr int MOST_ROWS = 3;
#endif

// Some heads of a group: how many at a time, of those that are left.
FOVEAL_INLINE int rows_of(int left) { return left == MOST_ROWS + 1 ? (left + 1) / 2 : left < MOST_ROWS ? left : MOST_ROWS; }

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls function(first head, Constant<count>) for a few heads at a time.
template <class Function>
FOVEAL_INLINE void each_rows(int heads, Function function) {
  for (int h = 0, rows; h < heads; h += rows) {
    rows = rows_of(heads - h);
    switch (rows) {
      case 1: function(h, Constant<1>()); break;
      case 2: function(h, Constant<2>()); break;
      case 3: function(h, Constant<3>()); break;
      default: function(h, Constant<MOST_ROWS>());
    }
  }
}

}  // namespace foveal::FOVEAL_ISA
