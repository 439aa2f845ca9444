// The two products of latent attention, a panel of N registers of columns at a time, the weights between them, and the second
// one's sums.
//
// Usually the lanes of sums are columns, as those of scores are, and weights need not be transposed:
//   sums[value, column] += values^T[value, key] . weights[key, column]
// Tiles of AMX (common/amx.h) want rows of the left side as they lie in memory, and turning the values would cost more than
// turning the weights. There, in blocks of 16 columns and 16 values that lie one after another:
//   sums[column, value] += weights^T[column, key] . values[key, value]
// A tile of keys is larger there: sums come from the level-two cache and go back there once for each, which would otherwise
// take longer than the products.
#pragma once

#include "common/columns.h"
#include "common/pack.h"

namespace foveal::FOVEAL_ISA {

template <class Dot>
struct Products {
  static constexpr int KEYS = 64;  // of a tile
  static constexpr int KEYS_IN_STEP = 1;  // weights are needed for a multiple of so many keys
  // Keys that are scored at a time.
  template <int N>
  static constexpr int keys_at_once = 2 * block_rows<N>();

  // scores: [rows, columns]; rows: at most keys_at_once of the tile's.
  template <int N>
  static FOVEAL_INLINE void score(Left keys, int rows, const Word* q, int words, float* scores) {
    multiply_columns<Dot, N>(keys, rows, q, words, scores, false);
  }

  // Keys as pairs of their values: [KEYS / 2, stride].
  static FOVEAL_INLINE void pair_values(const bf16* even, const bf16* odd, int64_t rank, Word* values) {
#if defined(FOVEAL_BF16)
    for (int64_t v = 0; v < rank; v += F32::width) store_pairs(values + v, even + v, odd + v);
#endif
  }

  // Of scores [keys, columns], columns of register n: weights [words, columns], which may take the scores' place, and the sum.
  template <int N>
  static FOVEAL_INLINE F32 weigh(const float* scores, int keys, F32 most, int n, Word* weights) {
    constexpr int columns = N * F32::width;
    scores += n * F32::width, weights += n * F32::width;
    F32 sum = zero();
    if constexpr (Dot::numbers == 1) {
      for (int j = 0; j < keys; ++j) {
        const F32 weight = exp(load(scores + j * columns) - most);
        sum = sum + weight;
        store(reinterpret_cast<float*>(weights + j * columns), weight);
      }
    }
#if defined(FOVEAL_BF16)
    else {
      for (int j = 0; j < keys; j += 2) {
        const F32 even = exp(load(scores + j * columns) - most);
        const F32 odd = j + 1 < keys ? exp(load(scores + (j + 1) * columns) - most) : zero();
        sum = sum + even + odd;
        store_pairs(weights + j / 2 * columns, even, odd);
      }
    }
#endif
    return sum;
  }

  // Floats of sums for each column.
  static int64_t size(int64_t rank) { return rank; }

  // Steps in which `add` is made, besides itself calling `each_step`.
  static int steps_of_add(int64_t) { return 0; }

  // weights: [words, columns]; values: [rank, words].
  template <int N, class Step>
  static FOVEAL_INLINE void add(Left values, int words, const Word* weights, int64_t rank, float* sums, bool first, Step) {
    multiply_columns<Dot, N>(values, static_cast<int>(rank), weights, words, sums, !first);
  }

  // Sums of 16 columns times a factor each: those of register n, of a panel of so many columns.
  static FOVEAL_INLINE void scale(float* sums, int64_t rank, int columns, int n, F32 factor) {
    for (int64_t v = 0; v < rank; ++v) {
      float* sum = sums + v * columns + n * F32::width;
      store(sum, load(sum) * factor);
    }
  }

  // Likewise the sums of several parts times the shares of each, into the first part.
  static FOVEAL_INLINE void combine(float* const* parts, const F32* shares, int count, int64_t rank, int columns, int n) {
    for (int64_t v = 0; v < rank; ++v) {
      const int64_t place = v * columns + n * F32::width;
      F32 sum = load(parts[0] + place) * shares[0];
      for (int r = 1; r < count; ++r) sum = fma(load(parts[r] + place), shares[r], sum);
      store(parts[0] + place, sum);
    }
  }

  // A register of one column's values, from value v (a multiple of the width) on.
  static FOVEAL_INLINE F32 values_of(const float* sums, int64_t rank, int columns, int column, int64_t v) {
    float numbers[F32::width] = {};
    const int64_t left = rank - v;
    for (int i = 0; i < F32::width && i < left; ++i) numbers[i] = sums[(v + i) * columns + column];
    return load(numbers);
  }
};

#if defined(FOVEAL_AMX)
// 2^x for x <= 127, relative error below 1e-4, which bfloat16 does not see (a minimax polynomial); 0 for -inf. NaN stays NaN.
FOVEAL_INLINE F32 rough_exp2(F32 x) {
#if defined(FOVEAL_EMULATED)
  return exp2(x);
#else
  const F32 r = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};  // x less the whole number below
  F32 p = fma(set1(7.802452e-2f), r, set1(2.2606716e-1f));
  p = fma(p, r, set1(6.9583354e-1f));
  p = fma(p, r, set1(9.9992522e-1f));
  return {_mm512_scalef_ps(p.v, x.v)};
#endif
}

// As store_pairs, in fewer instructions.
FOVEAL_INLINE void store_weights(Word* p, F32 low, F32 high) {
#if defined(FOVEAL_EMULATED)
  store_pairs(p, low, high);
#else
  alignas(64) static constexpr uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), halves));
#endif
}

template <>
struct Products<Bf16Dot> {
  static constexpr int KEYS = 256, WORDS = KEYS / 2;
  static constexpr int KEYS_IN_STEP = 2 * AMX;
  static constexpr int VALUES = 2 * AMX;  // of two tiles: those with even numbers, then those with odd ones

  template <int N>
  static constexpr int keys_at_once = 2 * AMX;

  // A tile has room for whole blocks of keys: what lies behind its last one is scored too, and not looked at.
  template <int N>
  static FOVEAL_INLINE void score(Left keys, int, const Word* q, int words, float* scores) {
    multiply_tiles<Bf16Dot, 2, N, true>(keys.words, keys.row_step, q, words, scores, N * AMX, false);
  }

  // Two shifts and two blends for 32 values: values in their order would need twice as much.
  static FOVEAL_INLINE void pair_values(const bf16* even, const bf16* odd, int64_t rank, Word* values) {
    for (int64_t v = 0; v < rank; v += VALUES) {
      const __m512i low = _mm512_loadu_si512(even + v), high = _mm512_loadu_si512(odd + v);
      const __mmask32 upper = 0xaaaaaaaa;
      _mm512_storeu_si512(values + v, _mm512_mask_blend_epi16(upper, low, _mm512_slli_epi32(high, 16)));
      _mm512_storeu_si512(values + v + AMX, _mm512_mask_blend_epi16(upper, _mm512_srli_epi32(low, 16), high));
    }
  }

  // Weights are [columns, WORDS].
  template <int N>
  static FOVEAL_INLINE F32 weigh(const float* scores, int keys, F32 most, int n, Word* weights) {
    constexpr int columns = N * AMX;
    scores += n * AMX, weights += n * AMX * WORDS;
    const F32 shift = zero() - most * set1(LOG2E);
    F32 sum = zero();
    for (int key = 0; key < keys; key += KEYS_IN_STEP, scores += KEYS_IN_STEP * columns, weights += AMX) {
      alignas(64) Word pairs[AMX * AMX];  // [words, columns]
      for (int word = 0; word < AMX; ++word) {
        const F32 even = rough_exp2(fma(load(scores + 2 * word * columns), set1(LOG2E), shift));
        const F32 odd = rough_exp2(fma(load(scores + (2 * word + 1) * columns), set1(LOG2E), shift));
        sum = sum + (even + odd);
        store_weights(pairs + word * AMX, even, odd);
      }
      for (int word = 0; word < AMX; word += PACK)
        for (int column = 0; column < AMX; column += PACK)
          transpose8(pairs + word * AMX + column, AMX, weights + column * WORDS + word, WORDS);
    }
    return sum;
  }

  static int64_t size(int64_t rank) { return round_up(rank, VALUES); }
  static int steps_of_add(int64_t rank) { return static_cast<int>(size(rank) / VALUES); }

  // values: pairs of keys' values, [words, values.word_step]; words: a multiple of AMX. Sums of 32 values lie together: those
  // of each 16 columns, even ones and odd ones.
  template <int N, class Step>
  static FOVEAL_INLINE void add(Left values, int words, const Word* weights, int64_t rank, float* sums, bool first,
                                Step each_step) {
    constexpr int BLOCK = AMX * AMX;
    const int64_t stride = values.word_step * 4;
    for (int64_t v = 0; v < rank; v += VALUES, sums += 2 * N * BLOCK) {
      each_step();
      if (first) {
        zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
      } else {
        load_tile<0>(sums, 64), load_tile<1>(sums + BLOCK, 64);
        if (N == 2) load_tile<2>(sums + 2 * BLOCK, 64), load_tile<3>(sums + 3 * BLOCK, 64);
      }
      const Word* right = values.words + v;
      for (int word = 0; word < words; word += AMX, right += AMX * values.word_step) {
        load_tile<4>(weights + word, WORDS * 4), load_tile<6>(right, stride);
        multiply_bf16<0, 4, 6>();
        load_tile<7>(right + AMX, stride);
        multiply_bf16<1, 4, 7>();
        if (N == 2) load_tile<5>(weights + AMX * WORDS + word, WORDS * 4), multiply_bf16<2, 5, 6>(), multiply_bf16<3, 5, 7>();
      }
      store_tile<0>(sums, 64), store_tile<1>(sums + BLOCK, 64);
      if (N == 2) store_tile<2>(sums + 2 * BLOCK, 64), store_tile<3>(sums + 3 * BLOCK, 64);
    }
  }

  static FOVEAL_INLINE void scale(float* sums, int64_t rank, int columns, int n, F32 factor) {
    combine(&sums, &factor, 1, rank, columns, n);
  }

  static FOVEAL_INLINE void combine(float* const* parts, const F32* shares, int count, int64_t rank, int columns, int n) {
    for (int64_t v = 0; v < rank; v += VALUES)
      for (int row = 0; row < 2 * AMX; ++row) {
        const int64_t place = v * columns + (n * 2 * AMX + row) * AMX;
        const auto share = [&](int r) { return set1(reinterpret_cast<const float*>(shares + r)[row % AMX]); };
        F32 sum = load(parts[0] + place) * share(0);
        for (int r = 1; r < count; ++r) sum = fma(load(parts[r] + place), share(r), sum);
        store(parts[0] + place, sum);
      }
  }

  static FOVEAL_INLINE F32 values_of(const float* sums, int64_t, int columns, int column, int64_t v) {
    const int64_t block = v / VALUES * VALUES, half = (v - block) / 2;
    const float* even = sums + block * columns + (column / AMX * 2 * AMX + column % AMX) * AMX + half;
    const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512 odd = _mm512_castps256_ps512(_mm256_loadu_ps(even + AMX * AMX));
    return {_mm512_permutex2var_ps(_mm512_castps256_ps512(_mm256_loadu_ps(even)), order, odd)};
  }
};
#endif

}  // namespace foveal::FOVEAL_ISA
