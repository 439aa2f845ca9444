// Products of int8 and int4 weights with several rows of activations, by tiles of AMX (common/amx.h).
//
// Tiles multiply integers of 8 bits, and activations are of 16 (linear_rows.h): each row is two columns, x = 256 upper
// + lower, so that the 16 columns of a panel are 8 rows. Sums of tiles are exact, and end where a scale does: with a
// block of activations or a group of weights. They are scaled and added as floats, in registers for 16 outputs and one
// panel; the two columns of a row are added last. Nothing is rounded that a single row does not round.
//
// DEPTH inputs of 16 rows of weights are opened to bytes and meet the panels of all rows one after another. The next 16
// are opened while the first panel is multiplied: that is vectors' work, which tiles leave time for.
#pragma once

#include "common/pack.h"
#include "kernels/linear_rows.h"

namespace foveal::FOVEAL_ISA {

#if defined(FOVEAL_AMX)

// Rows of activations from which tiles win: vectors take four at a time, so that five cost them twice as much.
constexpr int64_t FEWEST_TILED = 5;

inline bool by_fixed_tiles(const Weight& weight, int64_t rows) {
  return is_fixed(weight.coding) && rows >= FEWEST_TILED;
}

constexpr int PANEL_ROWS = AMX / 2;           // rows of activations of a panel
constexpr int64_t DEPTH = 2048;               // inputs at a time
constexpr int64_t OPEN_STRIDE = DEPTH + 64;   // of opened rows: a power of two would put all of them into one set of L1
constexpr int64_t MOST_GROUPS = DEPTH / 32;

// 16 rows of weights, DEPTH of their inputs.
struct Opened {
  int8_t* values;  // [AMX, OPEN_STRIDE]
  float* scales;   // int4: [AMX, MOST_GROUPS]
  float* lows;     // int4: [AMX, MOST_GROUPS]
};

// PANEL_ROWS rows of activations as columns: of each row the upper parts, then of each the lower ones.
struct Panel {
  Word* words;    // [inputs / 4, AMX]; groups of 32 have a gap of zeros between two, see `multiply_block`
  float* scales;  // [blocks, AMX]
  float* sums;    // int4: [groups, AMX], zeros for the lower parts
};

template <int GROUP>
constexpr int64_t block_words = AMX * (GROUP == 32 ? 48 : BLOCK / 4);

// Floats of memory that they take.
constexpr int64_t OPENED_FLOATS = AMX * (OPEN_STRIDE / 4 + 2 * MOST_GROUPS);
constexpr int64_t PANEL_FLOATS = DEPTH / BLOCK * (block_words<32> + AMX) + MOST_GROUPS * AMX;

FOVEAL_INLINE Opened opened_at(float* memory) {
  float* scales = memory + AMX * OPEN_STRIDE / 4;
  return {reinterpret_cast<int8_t*>(memory), scales, scales + AMX * MOST_GROUPS};
}
FOVEAL_INLINE Panel panel_at(float* memory) {
  float* scales = memory + DEPTH / BLOCK * block_words<32>;
  return {reinterpret_cast<Word*>(memory), scales, scales + DEPTH / BLOCK * AMX};
}

// The upper and the lower parts of 32 activations.
struct Parts {
  Words upper, lower;
};
FOVEAL_INLINE Parts split_fixed(const int16_t* p) {
  const __m512i x = _mm512_loadu_si512(p), upper = _mm512_srai_epi16(_mm512_add_epi16(x, _mm512_set1_epi16(128)), 8);
  return {{_mm256_castsi256_ps(_mm512_cvtepi16_epi8(upper))}, {_mm256_castsi256_ps(_mm512_cvtepi16_epi8(x))}};
}

// 32 activations of `rows` rows as 8 words of 16 columns.
FOVEAL_INLINE void pack_parts(const int16_t* x, int64_t stride, int64_t rows, Word* out) {
  Words upper[PACK], lower[PACK];
#pragma GCC unroll 8
  for (int r = 0; r < PACK; ++r) {
    const Parts parts = r < rows ? split_fixed(x + r * stride) : Parts{no_words(), no_words()};
    upper[r] = parts.upper, lower[r] = parts.lower;
  }
  transpose(upper), transpose(lower);
#pragma GCC unroll 8
  for (int w = 0; w < PACK; ++w) store_words(out + w * AMX, upper[w]), store_words(out + w * AMX + PACK, lower[w]);
}

// Inputs [from, from + n) of up to PANEL_ROWS rows of activations.
template <int GROUP>
void pack_panel(const Activations& a, int64_t row, int64_t rows, int64_t from, int64_t n, const Panel& panel) {
  Word* out = panel.words;
  for (int64_t i = 0; i < n; i += FIXED, out += FIXED / 4 * AMX) {
    pack_parts(a.fixed + row * a.padded + from + i, a.padded, rows, out);
    if (GROUP == 32 && i % 64 == 0) std::memset(out += FIXED / 4 * AMX, 0, FIXED / 4 * AMX * sizeof(Word));
  }
  for (int64_t b = 0; b < n / BLOCK; ++b)
    for (int64_t r = 0; r < PANEL_ROWS; ++r) {
      const float scale = r < rows ? a.scales[(row + r) * a.blocks + from / BLOCK + b] : 0.0f;
      panel.scales[b * AMX + r] = 256 * scale, panel.scales[b * AMX + PANEL_ROWS + r] = scale;
    }
  if constexpr (GROUP > 0)
    for (int64_t g = 0; g < n / GROUP; ++g) {
      store(panel.sums + g * AMX, zero());
      for (int64_t r = 0; r < rows && from / GROUP + g < a.groups; ++r)
        panel.sums[g * AMX + r] = a.sums[(row + r) * a.groups + from / GROUP + g];
    }
}

// 128 nibbles, those of each 32 in their order.
FOVEAL_INLINE void open_nibbles(__m512i x, int8_t* out) {
  const __m512i mask = _mm512_set1_epi8(15);
  const __m512i low = _mm512_and_si512(x, mask), high = _mm512_and_si512(_mm512_srli_epi16(x, 4), mask);
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi64(low, first, high));
  _mm512_storeu_si512(out + 64, _mm512_permutex2var_epi64(low, second, high));
}

// 64 bytes from p: past the end of a row, but not past `end`, where zeros take their place.
FOVEAL_INLINE __m512i load_bytes(const char* p, const char* end) {
  if (end - p >= 64) return _mm512_loadu_si512(p);
  char buffer[64];
  for (int64_t i = 0; i < 64; ++i) buffer[i] = i < end - p ? p[i] : 0;
  return _mm512_loadu_si512(buffer);
}

// `count` bf16 of one row of scales or lows, and others up to a whole register, as floats.
FOVEAL_INLINE void open_groups(const bf16* p, int64_t count, const bf16* end, int64_t ahead, float* out) {
  for (int64_t g = 0; g < count; g += F32::width) {
    prefetch(p + g, ahead);
    store(out + g, load_up_to(p + g, end - p - g));
  }
}

// 16 rows of weights from input `from` on, to be opened block by block. In place of rows that are lacking, the last.
// What is read past the end of a row, of the next one, meets activations that are zero.
template <int GROUP>
struct Opening {
  static constexpr int64_t block_bytes = GROUP ? BLOCK / 2 : BLOCK;
  const Weight& weight;
  int64_t first, from;
  Opened opened;

  FOVEAL_INLINE int64_t row(int64_t r) const { return first + r < weight.outputs ? first + r : weight.outputs - 1; }

  FOVEAL_INLINE void open(int64_t block) const {
    const int64_t stride = row_bytes(weight);
    const char *values = static_cast<const char*>(weight.values), *end = values + weight.outputs * stride;
    for (int64_t r = 0; r < AMX; ++r) {
      const char* p = values + row(r) * stride + from * block_bytes / BLOCK + block * block_bytes;
      int8_t* out = opened.values + r * OPEN_STRIDE + block * BLOCK;
      prefetch(p, AMX * stride);
      if constexpr (GROUP == 0) {
        prefetch(p, AMX * stride + 64);
        _mm512_storeu_si512(out, load_bytes(p, end));
        _mm512_storeu_si512(out + 64, load_bytes(p + 64, end));
      } else {
        open_nibbles(load_bytes(p, end), out);
      }
    }
  }

  FOVEAL_INLINE void open_scales(int64_t n) const {
    if constexpr (GROUP > 0) {
      const int64_t groups = weight.inputs / GROUP, all = weight.outputs * groups, ahead = AMX * groups * sizeof(bf16);
      const bf16 *scales = static_cast<const bf16*>(weight.scales), *lows = static_cast<const bf16*>(weight.lows);
      for (int64_t r = 0; r < AMX; ++r) {
        const int64_t start = row(r) * groups + from / GROUP;
        open_groups(scales + start, n / GROUP, scales + all, ahead, opened.scales + r * MOST_GROUPS);
        open_groups(lows + start, n / GROUP, lows + all, ahead, opened.lows + r * MOST_GROUPS);
      }
    }
  }
};

using TileSums = int32_t[AMX * AMX];

// One block of inputs: as many tiles of sums as there are groups in it. A tile is 64 inputs deep, two groups of 32:
// there the gap takes the place of the one that is not meant.
template <int GROUP>
FOVEAL_INLINE void multiply_block(const int8_t* w, const Word* x, TileSums* sums) {
  load_tile<4>(w, OPEN_STRIDE), load_tile<5>(w + 64, OPEN_STRIDE);
  zero_tile<0>(), load_tile<6>(x, 64), multiply_int8<0, 4, 6>();
  if constexpr (GROUP == 32) {
    zero_tile<1>(), load_tile<7>(x + 8 * AMX, 64), multiply_int8<1, 4, 7>();
    zero_tile<2>(), load_tile<6>(x + 24 * AMX, 64), multiply_int8<2, 5, 6>();
    zero_tile<3>(), load_tile<7>(x + 32 * AMX, 64), multiply_int8<3, 5, 7>();
    store_tile<0>(sums[0], 64), store_tile<1>(sums[1], 64);
    store_tile<2>(sums[2], 64), store_tile<3>(sums[3], 64);
  } else if constexpr (GROUP == 64) {
    zero_tile<1>(), load_tile<7>(x + 16 * AMX, 64), multiply_int8<1, 5, 7>();
    store_tile<0>(sums[0], 64), store_tile<1>(sums[1], 64);
  } else {
    load_tile<7>(x + 16 * AMX, 64), multiply_int8<0, 5, 7>();
    store_tile<0>(sums[0], 64);
  }
}

FOVEAL_INLINE F32 load_whole(const int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }

// What the groups' lows add, as the first of each total.
template <int GROUP>
FOVEAL_INLINE void start_totals(const Opened& opened, const Panel& panel, int64_t n, F32 (&total)[AMX]) {
#pragma GCC unroll 16
  for (int o = 0; o < AMX; ++o) total[o] = zero();
  if constexpr (GROUP > 0)
    for (int64_t g = 0; g < n / GROUP; ++g) {
      const F32 sum = load(panel.sums + g * AMX);
#pragma GCC unroll 16
      for (int o = 0; o < AMX; ++o) total[o] = fma(set1(opened.lows[o * MOST_GROUPS + g]), sum, total[o]);
    }
}

// n inputs of 16 outputs and of the columns of one panel; meanwhile the next rows are opened, if there are.
template <int GROUP>
inline void multiply_panel(const Opened& opened, const Panel& panel, int64_t n, const Opening<GROUP>* next,
                           F32 (&total)[AMX]) {
  constexpr int SUMS = GROUP ? BLOCK / GROUP : 1;
  alignas(64) TileSums sums[SUMS];
  start_totals<GROUP>(opened, panel, n, total);
  for (int64_t b = 0; b < n / BLOCK; ++b) {
    multiply_block<GROUP>(opened.values + b * BLOCK, panel.words + b * block_words<GROUP>, sums);
    if (next) next->open(b);
    const F32 scale = load(panel.scales + b * AMX);
    const float* scales = opened.scales + b * SUMS;
#pragma GCC unroll 16
    for (int o = 0; o < AMX; ++o) {
      F32 block = load_whole(sums[0] + o * AMX);
      if constexpr (GROUP > 0) {
        block = block * set1(scales[o * MOST_GROUPS]);
#pragma GCC unroll 4
        for (int s = 1; s < SUMS; ++s)
          block = fma(load_whole(sums[s] + o * AMX), set1(scales[o * MOST_GROUPS + s]), block);
      }
      total[o] = fma(block, scale, total[o]);
    }
  }
}

// c[m, o] (+)= the upper and the lower part of total[o], for `rows` rows.
FOVEAL_INLINE void add_parts(const F32 (&total)[AMX], int64_t rows, float* c, int64_t c_stride, bool add) {
  Words turned[2][PACK];
#pragma GCC unroll 16
  for (int o = 0; o < AMX; ++o) turned[o / PACK][o % PACK] = {sum_of_halves(total[o])};
  transpose(turned[0]), transpose(turned[1]);
#pragma GCC unroll 8
  for (int m = 0; m < PACK; ++m)
    if (m < rows) {
      float* out = c + m * c_stride;
      const F32 sum = {_mm512_insertf32x8(_mm512_castps256_ps512(turned[0][m].v), turned[1][m].v, 1)};
      store(out, add ? load(out) + sum : sum);
    }
}

FOVEAL_INLINE int64_t up_to(int64_t left, int64_t most) { return left < most ? left : most; }

// The scales of int8 channels, which meet sums over all inputs. c has room for whole panels of outputs.
inline void scale_channels(const float* scales, int64_t rows, int64_t count, float* c, int64_t c_stride) {
  for (int64_t m = 0; m < rows; ++m, c += c_stride)
    for (int64_t o = 0; o < count; o += F32::width)
      store(c + o, load(c + o) * load_up_to(scales + o, count - o));
}

inline int64_t fixed_tile_scratch(int64_t rows) {
  return 2 * OPENED_FLOATS + (rows + PANEL_ROWS - 1) / PANEL_ROWS * PANEL_FLOATS;
}

// As `product`; c has room for whole panels of outputs.
template <int GROUP>
void fixed_tiles(const Corner& at, int64_t rows, int64_t count, float* scratch) {
  const Tiles tiles_of_this_thread;
  Opened opened = opened_at(scratch), other = opened_at(scratch + OPENED_FLOATS);
  auto panel = [&](int64_t m) { return panel_at(scratch + 2 * OPENED_FLOATS + m / PANEL_ROWS * PANEL_FLOATS); };
  for (int64_t from = 0; from < at.a.padded; from += DEPTH) {
    const int64_t n = up_to(at.a.padded - from, DEPTH);
    for (int64_t m = 0; m < rows; m += PANEL_ROWS)
      pack_panel<GROUP>(at.a, at.row + m, up_to(rows - m, PANEL_ROWS), from, n, panel(m));
    const Opening<GROUP> start{at.weight, at.first, from, opened};
    start.open_scales(n);
    for (int64_t b = 0; b < n / BLOCK; ++b) start.open(b);
    for (int64_t o = 0; o < count; o += AMX) {
      const Opening<GROUP> next{at.weight, at.first + o + AMX, from, other};
      const bool last = o + AMX >= count;
      if (!last) next.open_scales(n);
      for (int64_t m = 0; m < rows; m += PANEL_ROWS) {
        F32 total[AMX];
        multiply_panel<GROUP>(opened, panel(m), n, m > 0 || last ? nullptr : &next, total);
        add_parts(total, up_to(rows - m, PANEL_ROWS), at.c + m * at.c_stride + o, at.c_stride, from > 0);
      }
      const Opened done = opened;
      opened = other, other = done;
    }
  }
  if (GROUP == 0)
    scale_channels(static_cast<const float*>(at.weight.scales) + at.first, rows, count, at.c, at.c_stride);
}

inline void multiply_fixed_tiles(const Corner& at, int64_t rows, int64_t count, float* scratch) {
  if (at.weight.coding == Coding::int8) return fixed_tiles<0>(at, rows, count, scratch);
  if (at.weight.group == 32) return fixed_tiles<32>(at, rows, count, scratch);
  if (at.weight.group == 64) return fixed_tiles<64>(at, rows, count, scratch);
  fixed_tiles<128>(at, rows, count, scratch);
}

#else

inline bool by_fixed_tiles(const Weight&, int64_t) { return false; }
inline int64_t fixed_tile_scratch(int64_t) { return 0; }
inline void multiply_fixed_tiles(const Corner&, int64_t, int64_t, float*) {}

#endif

}  // namespace foveal::FOVEAL_ISA
