// Matrix products on packed panels: what attention, index scores and linear layers are made of.
//
// The unit is a 4-byte word: one float, or two bf16 that are multiplied and added at once (where the machine can). A product
// is C[rows, columns] = sum over words of A[row, word] . B[word, column]:
//   A  row-major words, one row after another (queries; activations)
//   B  packed panels of PANEL columns: for each word the PANEL columns' words side by side, so that one row of A is
//      broadcast against whole registers
//   C  float, row-major
// ROWS x COLUMN_REGISTERS accumulators stay in registers while all words are read; more would spill.
#pragma once

#include "common/simd.h"

namespace foveal::FOVEAL_ISA {

using Word = uint32_t;

#if defined(FOVEAL_AVX512)
constexpr int TILE_ROWS = 12, COLUMN_REGISTERS = 2;
#elif defined(FOVEAL_AVX2)
constexpr int TILE_ROWS = 6, COLUMN_REGISTERS = 2;
#else
constexpr int TILE_ROWS = 4, COLUMN_REGISTERS = 1;
#endif
constexpr int PANEL = COLUMN_REGISTERS * F32::width;

// A word is a float.
struct FloatDot {
  using Number = float;
  static constexpr int numbers = 1;
  static FOVEAL_INLINE F32 multiply_add(const Word* a, const Word* b, F32 c) {
    float x;
    std::memcpy(&x, a, 4);
    return fma(set1(x), load(reinterpret_cast<const float*>(b)), c);
  }
};

#if defined(FOVEAL_BF16)
// A word is two bf16.
struct Bf16Dot {
  using Number = bf16;
  static constexpr int numbers = 2;
  static FOVEAL_INLINE F32 multiply_add(const Word* a, const Word* b, F32 c) {
    int pair;
    std::memcpy(&pair, a, 4);
    const __m512i columns = _mm512_loadu_si512(b);
    return {_mm512_dpbf16_ps(c.v, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)columns)};
  }
};
#else
using Bf16Dot = FloatDot;  // bf16 operands are widened when they are packed
#endif

// C[M, PANEL] (+)= A[M, words] . one panel of B.
template <class Dot, int M>
FOVEAL_INLINE void multiply_rows(
    const Word* a, int64_t a_stride, const Word* panel, int words, float* c, int64_t c_stride, bool add) {
  F32 sum[M][COLUMN_REGISTERS];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < COLUMN_REGISTERS; ++n)
      sum[m][n] = add ? load(c + m * c_stride + n * F32::width) : zero();
  for (int w = 0; w < words; ++w, panel += PANEL) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < COLUMN_REGISTERS; ++n)
        sum[m][n] = Dot::multiply_add(a + m * a_stride + w, panel + n * F32::width, sum[m][n]);
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < COLUMN_REGISTERS; ++n) store(c + m * c_stride + n * F32::width, sum[m][n]);
}

template <class Dot, int M>
FOVEAL_INLINE void multiply_last_rows(
    int rows, const Word* a, int64_t a_stride, const Word* panel, int words, float* c, int64_t c_stride, bool add) {
  if (rows == M) return multiply_rows<Dot, M>(a, a_stride, panel, words, c, c_stride, add);
  if constexpr (M > 1) multiply_last_rows<Dot, M - 1>(rows, a, a_stride, panel, words, c, c_stride, add);
}

// C[rows, panels * PANEL] (+)= A[rows, words] . B. Strides of A in words, of C in floats.
template <class Dot>
inline void multiply(int rows, int panels, int words, const Word* a, int64_t a_stride, const Word* b, float* c,
                     int64_t c_stride, bool add) {
  for (int p = 0; p < panels; ++p) {
    const Word* panel = b + static_cast<int64_t>(p) * words * PANEL;
    float* out = c + p * PANEL;
    int row = 0;
    for (; row + TILE_ROWS <= rows; row += TILE_ROWS)
      multiply_rows<Dot, TILE_ROWS>(a + row * a_stride, a_stride, panel, words, out + row * c_stride, c_stride, add);
    if (row < rows)
      multiply_last_rows<Dot, TILE_ROWS - 1>(
          rows - row, a + row * a_stride, a_stride, panel, words, out + row * c_stride, c_stride, add);
  }
}

}  // namespace foveal::FOVEAL_ISA
