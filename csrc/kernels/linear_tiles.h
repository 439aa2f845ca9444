// Products of f32 and bf16 weights with many rows of activations: tiles of packed panels (common/tile.h).
//
// K_BLOCK words of N_PANELS panels of weights are packed into a part of L2 and meet all rows of activations of the item; one
// panel of them, and a few rows of activations, lie in L1 meanwhile. Tiles of AMX take rows of weights as they lie in memory
// for their left side: where rows of activations are the fewer, these are packed instead, and the result is turned.
#pragma once

#include "common/pack.h"
#include "kernels/linear_rows.h"

namespace foveal::FOVEAL_ISA {

constexpr int K_BLOCK = 512, N_PANELS = 4;
constexpr int K_STRIDE = K_BLOCK + 16;  // rows that lie a power of two apart would share a set of L1

// `n` words of one row of weights, then zeros up to a multiple of 2 width.
FOVEAL_INLINE void take_words(const float* row, int64_t inputs, int64_t from, int n, Word* out) {
  for (int i = 0; i < n; i += F32::width)
    store(reinterpret_cast<float*>(out) + i, load_up_to(row + from + i, inputs - from - i));
}
FOVEAL_INLINE void take_words(const bf16* row, int64_t inputs, int64_t from, int n, Word* out) {
  if (PAIRS) {
    const int64_t left = inputs - 2 * from, copied = left < 2 * n ? left : 2 * n;
    std::memset(out, 0, n * sizeof(Word));
    std::memcpy(out, row + 2 * from, copied * sizeof(bf16));
    return;
  }
  float* floats = reinterpret_cast<float*>(out);
  for (int i = 0; i < n; i += 2 * F32::width) {
    const Halves halves = split_up_to(row + from + i, inputs - from - i);
    store(floats + i, halves.even);
    store(floats + i + F32::width, halves.odd);
  }
}

// Words [from, from + n) of `count` rows of weights as panels; rows that are lacking are zeros.
template <class Number>
void pack_panels(const Weight& weight, int64_t first, int64_t count, int64_t from, int n, Word* rows, Word* panels) {
  for (int64_t p = 0; p < count; p += PANEL, panels += static_cast<int64_t>(n) * PANEL) {
    for (int r = 0; r < PANEL; ++r) {
      if (p + r < count)
        take_words(static_cast<const Number*>(weight.values) + (first + p + r) * weight.inputs, weight.inputs, from, n,
                  rows + r * K_STRIDE);
      else
        std::memset(rows + r * K_STRIDE, 0, n * sizeof(Word));
    }
    for (int w = 0; w < n; w += 8)
      for (int r = 0; r < PANEL; r += 8) transpose8(rows + r * K_STRIDE + w, K_STRIDE, panels + w * PANEL + r, PANEL);
  }
}

constexpr int64_t TILE_SCRATCH = static_cast<int64_t>(PANEL) * K_STRIDE + static_cast<int64_t>(K_BLOCK) * PANEL * N_PANELS;

#if defined(FOVEAL_AMX)
// Rows of activations up to which these are packed rather than the weights.
constexpr int64_t ROWS_TURNED = 2 * PANEL;

FOVEAL_INLINE bool is_turned(const Weight& weight, int64_t rows) {
  return weight.coding == Coding::bf16 && rows <= ROWS_TURNED && weight.inputs % (2 * AMX) == 0;
}

// Rows of activations for which weights are streamed row by row.
inline int64_t few_rows(const Weight& weight) { return is_turned(weight, FEW) ? FEW / 2 : FEW; }

// c[m, o] = turned[o, m] for m < rows and o < PANEL.
inline void turn_back(const float* turned, int64_t rows, float* c, int64_t c_stride) {
  for (int64_t m = 0; m < rows; m += 8)
    for (int64_t o = 0; o < PANEL; o += 8) {
      Word block[8 * 8];
      transpose8(reinterpret_cast<const Word*>(turned + o * PANEL + m), PANEL, block, 8);
      for (int64_t i = 0; i < 8 && m + i < rows; ++i) std::memcpy(c + (m + i) * c_stride + o, block + 8 * i, 8 * sizeof(Word));
    }
}

// As `tiles`, the weights on the left side.
inline void turned_tiles(const Weight& weight, const Activations& a, int64_t row, int64_t rows, int64_t first, int64_t count,
                         float* c, int64_t c_stride, Word* panel) {
  const Word* weights = static_cast<const Word*>(weight.values) + first * (weight.inputs / 2);
  alignas(64) float turned[PANEL * PANEL];
  for (int64_t m = 0; m < rows; m += PANEL) {
    const int64_t some = rows - m < PANEL ? rows - m : PANEL;
    const bf16* columns[PANEL];
    for (int64_t i = 0; i < some; ++i) columns[i] = reinterpret_cast<const bf16*>(a.words + (row + m + i) * a.words_stride);
    pack_columns<Bf16Dot>(columns, static_cast<int>(some), static_cast<int>(2 * a.words_stride), panel);
    for (int64_t o = 0; o < count; o += PANEL) {
      const int here = static_cast<int>(count - o < PANEL ? count - o : PANEL);
      multiply_by_tiles<Bf16Dot>(here, weights + o * (weight.inputs / 2), weight.inputs / 2, panel, static_cast<int>(a.words_stride),
                        turned, PANEL, false);
      turn_back(turned, some, c + m * c_stride + o, c_stride);
    }
  }
}
#else
inline int64_t few_rows(const Weight&) { return FEW; }
#endif

// Words of scratch that `tiles` needs.
inline int64_t tile_scratch(const Weight& weight, const Activations& a, int64_t rows) {
#if defined(FOVEAL_AMX)
  // Fewer rows than these may come too.
  if (is_turned(weight, rows < ROWS_TURNED ? rows : ROWS_TURNED) && a.words_stride * PANEL > TILE_SCRATCH)
    return a.words_stride * PANEL;
#else
  static_cast<void>(weight), static_cast<void>(a), static_cast<void>(rows);
#endif
  return TILE_SCRATCH;
}

// As `product`; c has room for whole panels.
template <class Number, class Dot>
void tiles(const Weight& weight, const Activations& a, int64_t row, int64_t rows, int64_t first, int64_t count, float* c,
           int64_t c_stride, Word* scratch) {
  const Tiles tiles_of_this_thread;
#if defined(FOVEAL_AMX)
  if (is_turned(weight, rows)) return turned_tiles(weight, a, row, rows, first, count, c, c_stride, scratch);
#endif
  const Word* x = a.words + row * a.words_stride;
  Word* panels = scratch + PANEL * K_STRIDE;
  for (int64_t o = 0; o < count; o += PANEL * N_PANELS) {
    const int64_t here = count - o < PANEL * N_PANELS ? count - o : PANEL * N_PANELS;
    for (int64_t k = 0; k < a.words_stride; k += K_BLOCK) {
      const int n = static_cast<int>(a.words_stride - k < K_BLOCK ? a.words_stride - k : K_BLOCK);
      pack_panels<Number>(weight, first + o, here, k, n, scratch, panels);
      multiply<Dot>(static_cast<int>(rows), static_cast<int>((here + PANEL - 1) / PANEL), n, x + k, a.words_stride, panels,
                    c + o, c_stride, k > 0);
    }
  }
}

}  // namespace foveal::FOVEAL_ISA
