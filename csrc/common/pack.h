// Rows of numbers packed into the operands of tile.h's products.
//
// Rows along words (queries, and keys as columns): `pack_row` and `pack_columns`; rows across words (values, which are summed
// over): `pack_words`. Words are padded to a multiple of 8 along a row (of WORDS_AT_ONCE, if that is more), and what is missing
// is zero.
#pragma once

#include "common/tile.h"

namespace foveal::FOVEAL_ISA {

constexpr int PACK = 8;

// PACK words of a row, and how PACK such rows are turned into columns.
#if defined(FOVEAL_AVX512) || defined(FOVEAL_AVX2)

struct Words {
  __m256 v;
};
FOVEAL_INLINE Words no_words() { return {_mm256_setzero_ps()}; }
FOVEAL_INLINE Words load_words(FloatDot, const float* p) { return {_mm256_loadu_ps(p)}; }
FOVEAL_INLINE Words load_words(FloatDot, const bf16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
FOVEAL_INLINE void store_words(Word* p, Words x) { _mm256_storeu_ps(reinterpret_cast<float*>(p), x.v); }
FOVEAL_INLINE void transpose(Words* x) {
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_ps(x[2 * i].v, x[2 * i + 1].v);
    a[2 * i + 1] = _mm256_unpackhi_ps(x[2 * i].v, x[2 * i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    x[i + 4].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

#else

struct Words {
  Word v[PACK];
};
FOVEAL_INLINE Words no_words() { return {}; }
FOVEAL_INLINE Words load_words(FloatDot, const float* p) {
  Words x;
  std::memcpy(x.v, p, sizeof x.v);
  return x;
}
FOVEAL_INLINE Words load_words(FloatDot, const bf16* p) {
  Words x;
  for (int i = 0; i < PACK; ++i) x.v[i] = static_cast<Word>(p[i].bits) << 16;
  return x;
}
FOVEAL_INLINE void store_words(Word* p, Words x) { std::memcpy(p, x.v, sizeof x.v); }
FOVEAL_INLINE void transpose(Words* x) {
  for (int i = 0; i < PACK; ++i)
    for (int j = 0; j < i; ++j) {
      const Word other = x[i].v[j];
      x[i].v[j] = x[j].v[i];
      x[j].v[i] = other;
    }
}

#endif

#if defined(FOVEAL_BF16)
FOVEAL_INLINE Words load_words(Bf16Dot, const bf16* p) { return {_mm256_loadu_ps(reinterpret_cast<const float*>(p))}; }
#endif

// out[c * out_stride + r] = in[r * in_stride + c] for 8 x 8 words.
FOVEAL_INLINE void transpose8(const Word* in, int64_t in_stride, Word* out, int64_t out_stride) {
  Words block[PACK];
#pragma GCC unroll 8
  for (int r = 0; r < PACK; ++r) block[r] = load_words(FloatDot(), reinterpret_cast<const float*>(in + r * in_stride));
  transpose(block);
#pragma GCC unroll 8
  for (int c = 0; c < PACK; ++c) store_words(out + c * out_stride, block[c]);
}

// Words that hold `size` numbers of a row.
template <class Dot>
constexpr int row_words(int size) {
  constexpr int words = PACK > WORDS_AT_ONCE<Dot> ? PACK : WORDS_AT_ONCE<Dot>;
  return (size + words * Dot::numbers - 1) / (words * Dot::numbers) * words;
}

// PACK words from p, of whose numbers only the first `left` are there.
template <class Dot, class Number>
FOVEAL_INLINE Words load_words_of(const Number* p, int left) {
  constexpr int all = PACK * Dot::numbers;
  if (left >= all) return load_words(Dot(), p);
  if (left <= 0) return no_words();
  Number buffer[all] = {};
  std::memcpy(buffer, p, left * sizeof(Number));
  return load_words(Dot(), buffer);
}

// One row along words.
template <class Dot, class Number>
FOVEAL_INLINE void pack_row(const Number* row, int size, Word* out) {
  const int padded = row_words<Dot>(size) * Dot::numbers;
  for (int i = 0; i < padded; i += PACK * Dot::numbers, out += PACK)
    store_words(out, load_words_of<Dot>(row + i, size - i));
}

// One panel: up to COLUMNS rows, as columns. panel[row_words(size), COLUMNS].
template <class Dot, int COLUMNS = PANEL, class Number>
FOVEAL_INLINE void pack_columns(const Number* const* rows, int count, int size, Word* panel) {
  const int padded = row_words<Dot>(size) * Dot::numbers;
  for (int column = 0; column < COLUMNS; column += PACK) {
    Word* out = panel + column;
    for (int i = 0; i < padded; i += PACK * Dot::numbers, out += PACK * COLUMNS) {
      Words words[PACK];
#pragma GCC unroll 8
      for (int j = 0; j < PACK; ++j)
        words[j] = column + j < count ? load_words_of<Dot>(rows[column + j] + i, size - i) : no_words();
      transpose(words);
#pragma GCC unroll 8
      for (int j = 0; j < PACK; ++j) store_words(out + j * COLUMNS, words[j]);
    }
  }
}

// F32::width words that are summed over the rows of one word: the numbers of one row, or pairs of two rows' numbers.
template <class Number>
FOVEAL_INLINE void store_across(FloatDot, Word* out, const Number* const* rows, int, int at, int left) {
  const F32 x = left >= F32::width ? load(rows[0] + at) : load_partial(rows[0] + at, left);
  store(reinterpret_cast<float*>(out), x);
}
#if defined(FOVEAL_BF16)
FOVEAL_INLINE __m512i half_words(const bf16* p, int left) {
  bf16 buffer[F32::width] = {};
  if (left < F32::width) {
    std::memcpy(buffer, p, left * sizeof(bf16));
    p = buffer;
  }
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FOVEAL_INLINE void store_across(Bf16Dot, Word* out, const bf16* const* rows, int count, int at, int left) {
  __m512i words = half_words(rows[0] + at, left);
  if (count > 1) words = _mm512_or_si512(words, _mm512_slli_epi32(half_words(rows[1] + at, left), 16));
  _mm512_storeu_si512(out, words);
}
#endif

// Dot::numbers rows (or as many as there are) as word `word` of panels that lie `panel_stride` words apart.
template <class Dot, class Number>
FOVEAL_INLINE void pack_words(const Number* const* rows, int count, int size, Word* panels, int64_t panel_stride, int word) {
  for (int p = 0; p * PANEL < size; ++p) {
    Word* out = panels + p * panel_stride + word * PANEL;
#pragma GCC unroll 4
    for (int n = 0; n < COLUMN_REGISTERS; ++n) {
      const int at = p * PANEL + n * F32::width;
      if (at < size)
        store_across(Dot(), out + n * F32::width, rows, count, at, size - at);
      else
        store(reinterpret_cast<float*>(out + n * F32::width), zero());
    }
  }
}

}  // namespace foveal::FOVEAL_ISA
