// Matrix products on packed panels: what attention, index scores and linear layers are made of.
//
// The unit is a 4-byte word: one float, or two bf16 that are multiplied and added at once (where the machine can). A product
// is C[rows, columns] = sum over words of A[row, word] . B[word, column]:
//   A  row-major words, one row after another (queries; activations)
//   B  packed panels of PANEL columns: for each word the PANEL columns' words side by side, so that one row of A is
//      broadcast against whole registers
//   C  float, row-major
// ROWS x COLUMN_REGISTERS accumulators stay in registers while all words are read; more would spill. With AMX, pairs of bf16
// are multiplied by tiles (amx.h) in the same order of memory, WORDS_AT_ONCE words at a time.
#pragma once

#include "common/amx.h"
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
#if defined(FOVEAL_AMX)
  template <int C, int A, int B>
  static FOVEAL_INLINE void multiply_tile() {
    multiply_bf16<C, A, B>();
  }
#endif
};
#else
using Bf16Dot = FloatDot;  // bf16 operands are widened when they are packed
#endif

// Whether products of such words are made by tiles of AMX.
#if defined(FOVEAL_AMX)
template <class Dot>
constexpr bool BY_TILES = Dot::numbers > 1;
#else
template <class Dot>
constexpr bool BY_TILES = false;
#endif

// Words that a product takes at once: rows and panels are padded to a multiple with zeros.
template <class Dot>
constexpr int WORDS_AT_ONCE = BY_TILES<Dot> ? 16 : 1;

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

#if defined(FOVEAL_AMX)
struct NoStep {
  void operator()() const {}
};

// A tile of A, which passes by once while B stays in the level-one cache (`streamed`), or is wanted for other columns too.
template <int T, bool streamed>
FOVEAL_INLINE void load_left(const Word* a, int64_t stride) {
  streamed ? stream_tile<T>(a, stride * 4) : load_tile<T>(a, stride * 4);
}

// C[16 BLOCKS, 16 N] (+)= A . B, sums of floats, or of whole numbers. B: for each word, its 16 N columns side by side.
// Calls each_step() after every BLOCKS N products, which leave time for other work.
template <class Dot, int BLOCKS, int N, bool streamed = false, class Sum, class Step = NoStep>
FOVEAL_INLINE void multiply_tiles(const Word* a, int64_t a_stride, const Word* b, int words, Sum* c, int64_t c_stride, bool add,
                                  Step each_step = {}) {
  static_assert(BLOCKS <= 2 && N <= 2, "four tiles of sums");
  constexpr int columns = N * AMX;
  Sum* lower = c + AMX * c_stride;
  if (add) {
    load_tile<0>(c, c_stride * 4);
    if (N == 2) load_tile<1>(c + AMX, c_stride * 4);
    if (BLOCKS == 2) load_tile<2>(lower, c_stride * 4);
    if (BLOCKS == 2 && N == 2) load_tile<3>(lower + AMX, c_stride * 4);
  } else {
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  }
  for (int w = 0; w < words; w += AMX, b += AMX * columns) {
    load_left<4, streamed>(a + w, a_stride), load_tile<6>(b, columns * 4);
    Dot::template multiply_tile<0, 4, 6>();
    if (N == 2) load_tile<7>(b + AMX, columns * 4), Dot::template multiply_tile<1, 4, 7>();
    if (BLOCKS == 2) load_left<5, streamed>(a + AMX * a_stride + w, a_stride), Dot::template multiply_tile<2, 5, 6>();
    if (BLOCKS == 2 && N == 2) Dot::template multiply_tile<3, 5, 7>();
    each_step();
  }
  store_tile<0>(c, c_stride * 4);
  if (N == 2) store_tile<1>(c + AMX, c_stride * 4);
  if (BLOCKS == 2) store_tile<2>(lower, c_stride * 4);
  if (BLOCKS == 2 && N == 2) store_tile<3>(lower + AMX, c_stride * 4);
}

// Fewer than 16 rows: whole tiles of copies, so that nothing beyond the rows is read or written. Summed in the same order.
template <class Dot>
inline void multiply_last_tile(int rows, const Word* a, int64_t a_stride, const Word* panel, int words, float* c,
                               int64_t c_stride, bool add) {
  alignas(64) Word left[AMX * AMX] = {};
  alignas(64) float sums[AMX * PANEL] = {};
  for (int r = 0; add && r < rows; ++r) std::memcpy(sums + r * PANEL, c + r * c_stride, PANEL * sizeof(float));
  for (int w = 0; w < words; w += AMX, panel += AMX * PANEL) {
    for (int r = 0; r < rows; ++r) std::memcpy(left + r * AMX, a + r * a_stride + w, AMX * sizeof(Word));
    multiply_tiles<Dot, 1, COLUMN_REGISTERS>(left, AMX, panel, AMX, sums, PANEL, add || w > 0);
  }
  for (int r = 0; r < rows; ++r) std::memcpy(c + r * c_stride, sums + r * PANEL, PANEL * sizeof(float));
}

template <class Dot>
inline void multiply_by_tiles(int rows, const Word* a, int64_t a_stride, const Word* panel, int words, float* c,
                              int64_t c_stride, bool add) {
  int row = 0;
  for (; row + 2 * AMX <= rows; row += 2 * AMX)
    multiply_tiles<Dot, 2, COLUMN_REGISTERS>(a + row * a_stride, a_stride, panel, words, c + row * c_stride, c_stride, add);
  if (row + AMX <= rows) {
    multiply_tiles<Dot, 1, COLUMN_REGISTERS>(a + row * a_stride, a_stride, panel, words, c + row * c_stride, c_stride, add);
    row += AMX;
  }
  if (row < rows)
    multiply_last_tile<Dot>(rows - row, a + row * a_stride, a_stride, panel, words, c + row * c_stride, c_stride, add);
}
#endif

// C[rows, panels * PANEL] (+)= A[rows, words] . B, words a multiple of WORDS_AT_ONCE. Strides of A in words, of C in floats.
template <class Dot>
inline void multiply(int rows, int panels, int words, const Word* a, int64_t a_stride, const Word* b, float* c,
                     int64_t c_stride, bool add) {
  for (int p = 0; p < panels; ++p) {
    const Word* panel = b + static_cast<int64_t>(p) * words * PANEL;
    float* out = c + p * PANEL;
#if defined(FOVEAL_AMX)
    if constexpr (BY_TILES<Dot>) {
      multiply_by_tiles<Dot>(rows, a, a_stride, panel, words, out, c_stride, add);
      continue;
    }
#endif
    int row = 0;
    for (; row + TILE_ROWS <= rows; row += TILE_ROWS)
      multiply_rows<Dot, TILE_ROWS>(a + row * a_stride, a_stride, panel, words, out + row * c_stride, c_stride, add);
    if (row < rows)
      multiply_last_rows<Dot, TILE_ROWS - 1>(
          rows - row, a + row * a_stride, a_stride, panel, words, out + row * c_stride, c_stride, add);
  }
}

}  // namespace foveal::FOVEAL_ISA
