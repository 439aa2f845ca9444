// The product of prepared activations and any part of a weight, for one thread. linear.cpp and experts.cpp divide the work.
#pragma once

#include "kernels/linear_fixed_tiles.h"
#include "kernels/linear_tiles.h"

namespace foveal::FOVEAL_ISA {

constexpr int64_t STRIP_BYTES = 128 << 10;  // of weights that stay in L2 while several rows of activations meet them

#if defined(FOVEAL_AVX512)
template <class Kind, int M>
constexpr int ROWS_FOR = M == 1 ? Kind::ROWS_ALONE : 4;
#else
template <class Kind, int M>
constexpr int ROWS_FOR = M == 1 ? Kind::ROWS_ALONE : M == 2 ? 4 : 2;
#endif

template <class Kind>
inline void weights_of_any(const Corner& at, int64_t count, int64_t rows) {
  switch (rows) {
    case 1:
      return weights_of<Kind, ROWS_FOR<Kind, 1>, 1>(at, count);
    case 2:
      return weights_of<Kind, ROWS_FOR<Kind, 2>, 2>(at, count);
    case 3:
      return weights_of<Kind, ROWS_FOR<Kind, 3>, 3>(at, count);
    default:
      return weights_of<Kind, ROWS_FOR<Kind, 4>, 4>(at, count);
  }
}

// Strips of weights, each for all rows of activations.
template <class Kind>
void strips(const Corner& at, int64_t count, int64_t rows) {
  const int64_t strip = (STRIP_BYTES / row_bytes(at.weight) / ROWS_AT_ONCE + 1) * ROWS_AT_ONCE;
  for (int64_t o = 0; o < count; o += strip) {
    const int64_t here = o + strip < count ? strip : count - o;
    for (int64_t m = 0; m < rows; m += 4) {
      Corner part = at;
      part.first += o;
      part.row += m;
      part.c += m * at.c_stride + o;
      weights_of_any<Kind>(part, here, rows - m < 4 ? rows - m : 4);
    }
  }
}

// Floats of scratch that `product` of so many rows needs.
inline int64_t product_scratch(const Weight& weight, const Activations& a, int64_t rows) {
  if (by_fixed_tiles(weight, rows)) {
    const int64_t tiles = fixed_tile_scratch(rows), few = ROWS_AT_ONCE * a.groups;  // fewer rows may come too
    return tiles > few ? tiles : few;
  }
  if (is_fixed(weight.coding)) return ROWS_AT_ONCE * a.groups;
  return rows > few_rows(weight) ? tile_scratch(weight, a, rows) : 0;
}

// c[m * c_stride + o] = activations[row + m] . weight[first + o], for m < rows and o < count. c_stride is a multiple of PANEL:
// what stands between `count` and the next multiple is overwritten.
inline void product(const Weight& weight, const Activations& a, int64_t row, int64_t rows, int64_t first, int64_t count,
                    float* c, int64_t c_stride, float* scratch) {
  const Corner at{weight, a, first, row, c, c_stride, 0, scratch};
  Word* words = reinterpret_cast<Word*>(scratch);
  if (by_fixed_tiles(weight, rows)) return multiply_fixed_tiles(at, rows, count, scratch);
  switch (weight.coding) {
    case Coding::f32:
      if (rows > few_rows(weight)) return tiles<float, FloatDot>(weight, a, row, rows, first, count, c, c_stride, words);
      return strips<WordRows<Floats>>(at, count, rows);
    case Coding::bf16:
      if (rows > few_rows(weight)) return tiles<bf16, Bf16Dot>(weight, a, row, rows, first, count, c, c_stride, words);
      return strips<WordRows<Bf16s>>(at, count, rows);
    case Coding::int8:
      return strips<Int8s>(at, count, rows);
    case Coding::int4:
      if (weight.group == 32) return strips<Int4s<32>>(at, count, rows);
      if (weight.group == 64) return strips<Int4s<64>>(at, count, rows);
      return strips<Int4s<128>>(at, count, rows);
  }
}

}  // namespace foveal::FOVEAL_ISA
