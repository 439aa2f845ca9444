// Products with weights, row by row: dot products of a few rows of weights and a few rows of activations.
//
// Weights are read once, in order, and prefetched: with few rows of activations (decode) their stream from memory is all
// that costs. RxM dot products run at once: R rows of weights are decoded in registers and meet M rows of activations, which
// lie in L1 already in the form that this needs (`Activations`).
//
// f32, bf16: floats. int8, int4: the activations are turned into 16-bit integers, a scale for each block of 128; products
// with the weights' own integers are then exact in 32 bits, and one instruction makes twice as many of them as of floats. An
// activation is off by at most 1/65278 of the largest of its block, below 1/100 of what bf16 rounds off that one.
#pragma once

#include "common/fixed.h"
#include "common/tile.h"
#include "kernels/linear.h"

namespace foveal::FOVEAL_ISA {

constexpr int BLOCK = 128;  // activations that share a scale
constexpr float MOST_FIXED = 32639;  // what the largest of them becomes: 127 * 256 + 127, two numbers of eight bits
constexpr int FEW = 8;      // rows of activations for which weights are streamed, if not by tiles (linear_tiles.h)
constexpr int ROWS_AT_ONCE = 4;
constexpr int STREAM_AHEAD = 1024;  // bytes that are fetched before they are read, where rows follow one another

// bf16 pairs are multiplied as such where the machine can, otherwise they are split into even and odd numbers.
#if defined(FOVEAL_BF16)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif

// Rows of activations, ready for weights of one coding.
struct Activations {
  int64_t padded;    // numbers in a row: inputs, then zeros
  int64_t blocks;    // scales in a row
  int64_t groups;    // sums in a row, padded to whole registers
  int16_t* fixed;    // int8, int4: [rows, padded]
  float* scales;     // int8, int4: [rows, blocks]
  float* sums;       // int4: [rows, groups]: the sum of each group
  Word* words;       // f32, bf16: [rows, words]
  int64_t words_stride;
};

FOVEAL_INLINE bool is_fixed(Coding coding) { return coding == Coding::int8 || coding == Coding::int4; }

FOVEAL_INLINE Activations layout(const Weight& weight) {
  Activations a{};
  if (is_fixed(weight.coding)) {
    a.padded = round_up(weight.inputs, BLOCK);
    a.blocks = a.padded / BLOCK;
    a.groups = weight.coding == Coding::int4 ? round_up(weight.inputs / weight.group, F32::width) : 0;
  } else {
    a.padded = round_up(weight.inputs, 2 * F32::width);
    a.words_stride = weight.coding == Coding::bf16 && PAIRS ? a.padded / 2 : a.padded;
  }
  return a;
}

FOVEAL_INLINE int64_t bytes_of(const Activations& a, int64_t rows) {
  return rows * (a.padded * 2 + (a.blocks + a.groups) * 4) + a.words_stride * rows * 4 + 4 * 64;
}

// Gives the rows their places in `memory`, which has bytes_of.
FOVEAL_INLINE void place(Activations& a, char* memory, int64_t rows) {
  auto take = [&](int64_t bytes) {
    char* piece = memory;
    memory += round_up(bytes, 64);
    return piece;
  };
  if (a.words_stride) {
    a.words = reinterpret_cast<Word*>(take(rows * a.words_stride * 4));
    return;
  }
  a.fixed = reinterpret_cast<int16_t*>(take(rows * a.padded * 2));
  a.scales = reinterpret_cast<float*>(take(rows * a.blocks * 4));
  a.sums = reinterpret_cast<float*>(take(rows * a.groups * 4));
}

// One block in fixed point; returns its scale. What is not finite makes the scale NaN, and so every product.
template <class Number>
FOVEAL_INLINE float fix_block(const Number* x, int64_t n, int16_t* out) {
  F32 most = zero(), check = zero();
  for (int i = 0; i < BLOCK; i += F32::width) {
    const F32 value = load_up_to(x + i, n - i);
    most = max(most, max(value, zero() - value));
    check = fma(value, zero(), check);
  }
  const float largest = maximum(most);
  const bool used = largest > 1e-30f;  // below it the inverse would overflow
  const F32 inverse = set1(used ? MOST_FIXED / largest : 0.0f);
  for (int i = 0; i < BLOCK; i += F32::width) store_fixed(out + i, load_up_to(x + i, n - i) * inverse);
  return (used ? largest / MOST_FIXED : 0.0f) + sum(check);
}

template <class Number>
void fix_row(const Weight& weight, const Number* x, const Activations& a, int64_t row) {
  int16_t* fixed = a.fixed + row * a.padded;
  for (int64_t b = 0; b < a.blocks; ++b)
    a.scales[row * a.blocks + b] = fix_block(x + b * BLOCK, weight.inputs - b * BLOCK, fixed + b * BLOCK);
  if (weight.coding != Coding::int4) return;
  float* sums = a.sums + row * a.groups;
  const int16_t ones_of[FIXED] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                  1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  const Fixed ones = load_fixed(ones_of);
  for (int64_t g = 0; g < a.groups; ++g) {
    const int64_t start = g * weight.group;
    Sums total = no_sums();
    if (start < weight.inputs)
      for (int i = 0; i < weight.group; i += FIXED) total = multiply_add(load_fixed(fixed + start + i), ones, total);
    const float scale = start < weight.inputs ? a.scales[row * a.blocks + start / BLOCK] : 0.0f;
    sums[g] = static_cast<float>(sum(total)) * scale;
  }
}

// The even numbers of 2 width bf16, and the odd ones: cheaper to decode than their order.
struct Halves {
  F32 even, odd;
};
#if defined(FOVEAL_AVX512)
FOVEAL_INLINE Halves split(const bf16* p) {
  const __m512i words = _mm512_loadu_si512(p);
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000))))}};
}
#elif defined(FOVEAL_AVX2)
FOVEAL_INLINE Halves split(const bf16* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000))))}};
}
#else
FOVEAL_INLINE Halves split(const bf16* p) {
  IntLanes words;  // the even number in the lower half: every machine that torch runs on is little-endian
  std::memcpy(&words, p, sizeof words);
  return {{(FloatLanes)(words << 16)}, {(FloatLanes)(words & static_cast<int32_t>(0xffff0000))}};
}
#endif
FOVEAL_INLINE Halves split_up_to(const bf16* p, int64_t n) {
  if (n >= 2 * F32::width) return split(p);
  bf16 buffer[2 * F32::width] = {};
  std::memcpy(buffer, p, n * sizeof(bf16));
  return split(buffer);
}

FOVEAL_INLINE void word_row(const Weight& weight, const float* x, const Activations& a, int64_t row) {
  float* out = reinterpret_cast<float*>(a.words + row * a.words_stride);
  for (int64_t i = 0; i < a.padded; i += F32::width) store(out + i, load_up_to(x + i, weight.inputs - i));
}

FOVEAL_INLINE void word_row(const Weight& weight, const bf16* x, const Activations& a, int64_t row) {
  Word* out = a.words + row * a.words_stride;
  if (PAIRS) {
    std::memset(out + a.words_stride - F32::width, 0, F32::width * 4);
    std::memcpy(out, x, weight.inputs * sizeof(bf16));
    return;
  }
  float* floats = reinterpret_cast<float*>(out);
  for (int64_t i = 0; i < a.padded; i += 2 * F32::width) {
    const Halves halves = split_up_to(x + i, weight.inputs - i);
    store(floats + i, halves.even);
    store(floats + i + F32::width, halves.odd);
  }
}

// Row `row` of the activations from x. f32 and bf16 weights take x of their own format.
template <class Number>
void prepare(const Weight& weight, const Number* x, const Activations& a, int64_t row) {
  is_fixed(weight.coding) ? fix_row(weight, x, a, row) : word_row(weight, x, a, row);
}

// Where dot products of R rows of weights and M rows of activations begin, and where they go: c[m * c_stride + r].
struct Corner {
  const Weight& weight;
  const Activations& a;
  int64_t first, row;
  float* c;
  int64_t c_stride;
  int64_t ahead;        // bytes between a weight and the one that is prefetched with it
  float* scales;        // scratch of int4: [ROWS_AT_ONCE, groups]
};

inline int64_t row_bytes(const Weight& weight) {
  switch (weight.coding) {
    case Coding::f32:
      return weight.inputs * 4;
    case Coding::bf16:
      return weight.inputs * 2;
    case Coding::int8:
      return weight.inputs;
    default:
      return weight.inputs / 2;
  }
}

FOVEAL_INLINE void prefetch(const void* p, int64_t ahead) { __builtin_prefetch(static_cast<const char*>(p) + ahead); }

// How f32 and bf16 weights are read: `step` of them at a time, against as many activations.
struct Floats {
  using Number = float;
  static constexpr int step = F32::width, words = F32::width;
  F32 values;
  static FOVEAL_INLINE Floats read(const float* p) { return {load(p)}; }
  static FOVEAL_INLINE Floats read(const float* p, int n) { return {load_partial(p, n)}; }
  FOVEAL_INLINE F32 multiply_add(const Word* x, F32 c) const {
    return fma(values, load(reinterpret_cast<const float*>(x)), c);
  }
};

#if defined(FOVEAL_BF16)
struct Bf16s {
  using Number = bf16;
  static constexpr int step = 2 * F32::width, words = F32::width;
  __m512i pairs;
  static FOVEAL_INLINE Bf16s read(const bf16* p) { return {_mm512_loadu_si512(p)}; }
  static FOVEAL_INLINE Bf16s read(const bf16* p, int n) {
    bf16 buffer[step] = {};
    std::memcpy(buffer, p, n * sizeof(bf16));
    return read(buffer);
  }
  FOVEAL_INLINE F32 multiply_add(const Word* x, F32 c) const {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)pairs, (__m512bh)_mm512_loadu_si512(x))};
  }
};
#else
struct Bf16s {
  using Number = bf16;
  static constexpr int step = 2 * F32::width, words = 2 * F32::width;
  Halves halves;
  static FOVEAL_INLINE Bf16s read(const bf16* p) { return {split(p)}; }
  static FOVEAL_INLINE Bf16s read(const bf16* p, int n) { return {split_up_to(p, n)}; }
  FOVEAL_INLINE F32 multiply_add(const Word* x, F32 c) const {
    const float* p = reinterpret_cast<const float*>(x);
    return fma(halves.odd, load(p + F32::width), fma(halves.even, load(p), c));
  }
};
#endif

template <int R, int M>
FOVEAL_INLINE void clear(F32 (&x)[R][M]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) x[r][m] = zero();
}

template <class Weights, int R, int M>
inline void dot_words(const Corner& at) {
  using Number = typename Weights::Number;
  const int64_t inputs = at.weight.inputs, stride = at.a.words_stride;
  const Number* w = static_cast<const Number*>(at.weight.values) + at.first * inputs;
  const Word* x = at.a.words + at.row * stride;
  F32 total[R][M];
  clear(total);
  int64_t i = 0;
  for (; i + Weights::step <= inputs; i += Weights::step, x += Weights::words) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      prefetch(w + r * inputs + i, at.ahead);
      const Weights values = Weights::read(w + r * inputs + i);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) total[r][m] = values.multiply_add(x + m * stride, total[r][m]);
    }
  }
  for (int r = 0; r < R && i < inputs; ++r) {
    const Weights values = Weights::read(w + r * inputs + i, static_cast<int>(inputs - i));
    for (int m = 0; m < M; ++m) total[r][m] = values.multiply_add(x + m * stride, total[r][m]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) at.c[m * at.c_stride + r] = sum(total[r][m]);
}

// One row of weights and one of activations: a single stream, which memory gives a third faster than four side by side.
// Several sums, for an addition takes longer than the next weights need to come.
template <class Weights>
inline void dot_stream(const Corner& at) {
  using Number = typename Weights::Number;
  constexpr int SUMS = 4, LINE = 64 / sizeof(Number);
  const int64_t inputs = at.weight.inputs;
  const Number* w = static_cast<const Number*>(at.weight.values) + at.first * inputs;
  const Word* x = at.a.words + at.row * at.a.words_stride;
  F32 total[SUMS][1];
  clear(total);
  int64_t i = 0;
  for (; i + SUMS * Weights::step <= inputs; i += SUMS * Weights::step) {
#pragma GCC unroll 4
    for (int k = 0; k < SUMS * Weights::step; k += LINE) prefetch(w + i + k, at.ahead);
#pragma GCC unroll 4
    for (int s = 0; s < SUMS; ++s, x += Weights::words)
      total[s][0] = Weights::read(w + i + s * Weights::step).multiply_add(x, total[s][0]);
  }
  for (; i + Weights::step <= inputs; i += Weights::step, x += Weights::words)
    total[0][0] = Weights::read(w + i).multiply_add(x, total[0][0]);
  if (i < inputs) total[1][0] = Weights::read(w + i, static_cast<int>(inputs - i)).multiply_add(x, total[1][0]);
  *at.c = sum((total[0][0] + total[1][0]) + (total[2][0] + total[3][0]));
}

// int8: a block is summed as integers.

template <int R, int M>
FOVEAL_INLINE void add_fixed(const int8_t* w, int64_t w_stride, const int16_t* x, int64_t x_stride, Sums (&sums)[R][M]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const Fixed values = load_fixed(w + r * w_stride);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sums[r][m] = multiply_add(values, load_fixed(x + m * x_stride), sums[r][m]);
  }
}

template <int R, int M>
FOVEAL_INLINE void add_block(const Sums (&sums)[R][M], const float* scales, int64_t stride, F32 (&total)[R][M]) {
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    const F32 scale = set1(scales[m * stride]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) total[r][m] = fma(to_float(sums[r][m]), scale, total[r][m]);
  }
}

template <int R, int M>
inline void dot_int8(const Corner& at) {
  const int64_t inputs = at.weight.inputs, padded = at.a.padded;
  const int8_t* w = static_cast<const int8_t*>(at.weight.values) + at.first * inputs;
  const int16_t* x = at.a.fixed + at.row * padded;
  const float* scales = at.a.scales + at.row * at.a.blocks;
  F32 total[R][M];
  clear(total);
  int64_t i = 0;
  for (; i < inputs; i += BLOCK, ++scales) {
    Sums sums[R][M];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sums[r][m] = no_sums();
    const int64_t here = inputs - i < BLOCK ? inputs - i : BLOCK;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      prefetch(w + r * inputs + i, at.ahead);
      prefetch(w + r * inputs + i, at.ahead + 64);
    }
    int64_t k = 0;
#pragma GCC unroll 1
    for (; k + FIXED <= here; k += FIXED) add_fixed<R, M>(w + i + k, inputs, x + i + k, padded, sums);
    if (k < here) {
      int8_t last[R][FIXED] = {};
      for (int r = 0; r < R; ++r) std::memcpy(last[r], w + r * inputs + i + k, here - k);
      add_fixed<R, M>(last[0], FIXED, x + i + k, padded, sums);
    }
    add_block<R, M>(sums, scales, at.a.blocks, total);
  }
  const float* channel = static_cast<const float*>(at.weight.scales) + at.first;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) at.c[m * at.c_stride + r] = sum(total[r][m]) * channel[r];
}

// int4: a group is summed as integers, and a block as groups times their scales. The groups' lows meet the sums of the
// activations.

// The scales as floats to scratch; the part of the lows as the first of each total. Whole registers are read, into the next
// row's scales where they end within one: those meet sums that are zero.
template <int R, int M>
FOVEAL_INLINE void start_groups(const Corner& at, F32 (&total)[R][M]) {
  const int64_t groups = at.weight.inputs / at.weight.group, padded = at.a.groups;
  const bf16* scales = static_cast<const bf16*>(at.weight.scales) + at.first * groups;
  const bf16* lows = static_cast<const bf16*>(at.weight.lows) + at.first * groups;
  const float* sums = at.a.sums + at.row * padded;
  const int64_t left = (at.weight.outputs - at.first) * groups;
  for (int64_t g = 0; g < groups; g += F32::width) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      store(at.scales + r * padded + g, load_up_to(scales + r * groups + g, left - r * groups - g));
      const F32 low = load_up_to(lows + r * groups + g, left - r * groups - g);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) total[r][m] = fma(low, load(sums + m * padded + g), total[r][m]);
    }
  }
}

template <int GROUP, int R, int M>
FOVEAL_INLINE void add_group(const uint8_t* w, int64_t w_stride, const int16_t* x, int64_t x_stride, const float* scales,
                             int64_t scales_stride, F32 (&block)[R][M]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    Sums sums[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sums[m] = no_sums();
#pragma GCC unroll 4
    for (int k = 0; k < GROUP; k += FIXED) {
      const Fixed values = load_nibbles(w + r * w_stride + k / 2);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sums[m] = multiply_add(values, load_fixed(x + m * x_stride + k), sums[m]);
    }
    const F32 scale = set1(scales[r * scales_stride]);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) block[r][m] = fma(to_float(sums[m]), scale, block[r][m]);
  }
}

template <int GROUP, int R, int M>
inline void dot_int4(const Corner& at) {
  const int64_t inputs = at.weight.inputs, stride = inputs / 2, padded = at.a.padded;
  const uint8_t* w = static_cast<const uint8_t*>(at.weight.values) + at.first * stride;
  const int16_t* x = at.a.fixed + at.row * padded;
  const float* x_scales = at.a.scales + at.row * at.a.blocks;
  F32 total[R][M];
  clear(total);
  start_groups<R, M>(at, total);
  for (int64_t i = 0; i < inputs; i += BLOCK, ++x_scales) {
    F32 block[R][M];
    clear(block);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) prefetch(w + r * stride + i / 2, at.ahead);
    const int64_t stop = i + BLOCK < inputs ? i + BLOCK : inputs;
#pragma GCC unroll 1
    for (int64_t k = i; k < stop; k += GROUP)
      add_group<GROUP, R, M>(w + k / 2, stride, x + k, padded, at.scales + k / GROUP, at.a.groups, block);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const F32 scale = set1(x_scales[m * at.a.blocks]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[r][m] = fma(block[r][m], scale, total[r][m]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) at.c[m * at.c_stride + r] = sum(total[r][m]);
}

// The dot products of each coding, under one name, and how many rows of weights a single row of activations meets at once.
template <class Weights>
struct WordRows {
  static constexpr int ROWS_ALONE = 1;
  template <int R, int M>
  static FOVEAL_INLINE void dot(const Corner& at) {
    if constexpr (R == 1 && M == 1)
      dot_stream<Weights>(at);
    else
      dot_words<Weights, R, M>(at);
  }
};
struct Int8s {
  static constexpr int ROWS_ALONE = 1;
  template <int R, int M>
  static FOVEAL_INLINE void dot(const Corner& at) {
    dot_int8<R, M>(at);
  }
};
template <int GROUP>
struct Int4s {
  static constexpr int ROWS_ALONE = ROWS_AT_ONCE;
  template <int R, int M>
  static FOVEAL_INLINE void dot(const Corner& at) {
    dot_int4<GROUP, R, M>(at);
  }
};

// M rows of activations and `count` of weights, R at once. Rows side by side are fetched while those before them are read:
// processors foresee a long stream, but not where a row ends.
template <class Kind, int R, int M>
void weights_of(Corner at, int64_t count) {
  at.ahead = R == 1 ? STREAM_AHEAD : R * row_bytes(at.weight);
  for (; count >= R; count -= R, at.first += R, at.c += R) Kind::template dot<R, M>(at);
  for (; count > 0; --count, ++at.first, ++at.c) Kind::template dot<1, M>(at);
}

}  // namespace foveal::FOVEAL_ISA
