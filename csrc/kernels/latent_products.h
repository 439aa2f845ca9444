// The two products of latent attention, a panel of N registers of columns at a time, and the second one's sums.
//
// Usually the lanes of sums are columns, as those of scores are, and weights need not be transposed:
//   sums[value, column] += values^T[value, key] . weights[key, column]
// Tiles of AMX (common/amx.h) want rows of the left side as they lie in memory, and turning the values would cost more than
// turning the weights. There, in blocks of 16 columns and 16 values that lie one after another:
//   sums[column, value] += weights^T[column, key] . values[key, value]
#pragma once

#include "common/columns.h"
#include "common/pack.h"

namespace foveal::FOVEAL_ISA {

// Keys of a tile of latents.
constexpr int LATENT_TILE = 64;

template <class Dot>
struct Products {
  // Keys that are scored at a time.
  template <int N>
  static constexpr int keys_at_once = 2 * block_rows<N>();

  // scores: [rows, columns]; rows: at most keys_at_once of the tile's.
  template <int N>
  static FOVEAL_INLINE void score(Left keys, int rows, const Word* q, int words, float* scores) {
    multiply_columns<Dot, N>(keys, rows, q, words, scores, false);
  }

  // Floats of sums for each column.
  static int64_t size(int64_t rank) { return rank; }

  // weights: [words, columns]; values: [rank, words].
  template <int N>
  static FOVEAL_INLINE void add(Left values, int words, const Word* weights, int64_t rank, float* sums, bool first) {
    multiply_columns<Dot, N>(values, static_cast<int>(rank), weights, words, sums, !first);
  }

  // Sums of 16 columns times a factor each: those of register n, of a panel of so many columns.
  static FOVEAL_INLINE void scale(float* sums, int64_t rank, int columns, int n, F32 factor) {
    for (int64_t v = 0; v < rank; ++v) {
      float* sum = sums + v * columns + n * F32::width;
      store(sum, load(sum) * factor);
    }
  }

  // Likewise sums += part * factor.
  static FOVEAL_INLINE void add_scaled(float* sums, const float* part, int64_t rank, int columns, int n, F32 factor) {
    for (int64_t v = 0; v < rank; ++v) {
      const int64_t place = v * columns + n * F32::width;
      store(sums + place, fma(load(part + place), factor, load(sums + place)));
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
template <>
struct Products<Bf16Dot> {
  static constexpr int WORDS = LATENT_TILE / 2;
  static_assert(WORDS == 2 * AMX, "two tiles of words");

  template <int N>
  static constexpr int keys_at_once = 2 * AMX;

  // A tile has room for whole blocks of keys: what lies behind its last one is scored too, and not looked at.
  template <int N>
  static FOVEAL_INLINE void score(Left keys, int, const Word* q, int words, float* scores) {
    multiply_tiles<Bf16Dot, 2, N>(keys.words, keys.row_step, q, words, scores, N * AMX, false);
  }

  static int64_t size(int64_t rank) { return round_up(rank, AMX); }

  // weights: [WORDS, columns]; values: pairs of keys' values, [WORDS, values.word_step]. What is missing is zero.
  template <int N>
  static FOVEAL_INLINE void add(Left values, int, const Word* weights, int64_t rank, float* sums, bool first) {
    alignas(64) Word turned[N * AMX * WORDS];  // [columns, WORDS]
    for (int word = 0; word < WORDS; word += PACK)
      for (int column = 0; column < N * AMX; column += PACK)
        transpose8(weights + word * N * AMX + column, N * AMX, turned + column * WORDS + word, WORDS);
    load_tile<4>(turned, WORDS * 4), load_tile<5>(turned + AMX, WORDS * 4);
    if (N == 2) load_tile<6>(turned + AMX * WORDS, WORDS * 4), load_tile<7>(turned + AMX * WORDS + AMX, WORDS * 4);
    const Word* right = values.words;
    for (int64_t v = 0; v < rank; v += AMX, right += AMX, sums += N * AMX * AMX) {
      if (first) {
        zero_tile<0>();
        if (N == 2) zero_tile<1>();
      } else {
        load_tile<0>(sums, 64);
        if (N == 2) load_tile<1>(sums + AMX * AMX, 64);
      }
      load_tile<2>(right, values.word_step * 4), load_tile<3>(right + AMX * values.word_step, values.word_step * 4);
      multiply_bf16<0, 4, 2>();
      if (N == 2) multiply_bf16<1, 6, 2>();
      multiply_bf16<0, 5, 3>();
      if (N == 2) multiply_bf16<1, 7, 3>();
      store_tile<0>(sums, 64);
      if (N == 2) store_tile<1>(sums + AMX * AMX, 64);
    }
  }

  static FOVEAL_INLINE void scale(float* sums, int64_t rank, int columns, int n, F32 factor) {
    float factors[AMX];
    store(factors, factor);
    for (int64_t v = 0; v < rank; v += AMX)
      for (int column = 0; column < AMX; ++column) {
        float* sum = sums + v * columns + (n * AMX + column) * AMX;
        store(sum, load(sum) * set1(factors[column]));
      }
  }

  static FOVEAL_INLINE void add_scaled(float* sums, const float* part, int64_t rank, int columns, int n, F32 factor) {
    float factors[AMX];
    store(factors, factor);
    for (int64_t v = 0; v < rank; v += AMX)
      for (int column = 0; column < AMX; ++column) {
        const int64_t place = v * columns + (n * AMX + column) * AMX;
        store(sums + place, fma(load(part + place), set1(factors[column]), load(sums + place)));
      }
  }

  static FOVEAL_INLINE F32 values_of(const float* sums, int64_t, int columns, int column, int64_t v) {
    return load(sums + v * columns + column * AMX);
  }
};
#endif

}  // namespace foveal::FOVEAL_ISA
