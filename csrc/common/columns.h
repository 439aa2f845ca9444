// Products whose columns are (query, head) pairs, as attention over one key for all heads needs them: the result of one
// product is a panel again, and can be the right side of the next without being transposed.
//
// A panel holds N registers of columns: for each word (or row of the result) N * F32::width numbers side by side.
#pragma once

#include "common/tile.h"

namespace foveal::FOVEAL_ISA {

// The left side: A[row, word] = words[row * row_step + word * word_step].
struct Left {
  const Word* words;
  int64_t row_step, word_step;
};

// Rows whose sums stay in registers beside N registers of columns: enough to keep the multipliers busy, and few enough
// not to spill; 64 keys divide well into them.
template <int N>
constexpr int block_rows() {
#if defined(FOVEAL_AVX512)
  return N == 1 ? 16 : 8;
#elif defined(FOVEAL_AVX2)
  return N == 1 ? 8 : 6;
#else
  return 4;
#endif
}

template <class Dot, int M, int N>
FOVEAL_INLINE void multiply_block(Left a, const Word* panel, int words, float* c, bool add) {
  constexpr int columns = N * F32::width;
  F32 sum[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[m][n] = add ? load(c + m * columns + n * F32::width) : zero();
  const Word* left = a.words;
  for (int w = 0; w < words; ++w, panel += columns, left += a.word_step) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n)
        sum[m][n] = Dot::multiply_add(left + m * a.row_step, panel + n * F32::width, sum[m][n]);
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) store(c + m * columns + n * F32::width, sum[m][n]);
}

template <class Dot, int M, int N>
FOVEAL_INLINE void multiply_blocks(Left a, int rows, const Word* panel, int words, float* c, bool add) {
  for (; rows >= M; rows -= M, a.words += M * a.row_step, c += M * N * F32::width)
    multiply_block<Dot, M, N>(a, panel, words, c, add);
  if constexpr (M > 1) multiply_blocks<Dot, M == 6 ? 4 : M / 2, N>(a, rows, panel, words, c, add);
}

// C[rows, columns of the panel] (+)= A[rows, words] . panel.
template <class Dot, int N>
FOVEAL_INLINE void multiply_columns(Left a, int rows, const Word* panel, int words, float* c, bool add) {
  multiply_blocks<Dot, block_rows<N>(), N>(a, rows, panel, words, c, add);
}

#if defined(FOVEAL_BF16)
// Words of two bf16: `low` first in memory.
FOVEAL_INLINE void store_pairs(Word* p, F32 low, F32 high) {
  const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow_bf16(high)), 16);
  _mm512_storeu_si512(p, _mm512_or_si512(_mm512_cvtepu16_epi32(narrow_bf16(low)), upper));
}
FOVEAL_INLINE void store_pairs(Word* p, const bf16* low, const bf16* high) {
  const __m512i lower = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
  const __m512i upper = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)));
  _mm512_storeu_si512(p, _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16)));
}
#endif

}  // namespace foveal::FOVEAL_ISA
