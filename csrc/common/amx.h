// AMX: registers of 16 rows of 16 words, and products that make 16 x 16 sums of them at once. One instruction does the work of
// 16 vdpbf16ps (bf16) or vpdpbusd (int8): on the Intel machines that have it, some 25 times as much a second.
//
// A tile of the left side is 16 rows of 16 words; one of the right side is 16 words of 16 columns, which is half a panel of
// tile.h. Sums are 16 rows of 16 columns. Tiles have to be set up in each thread before they are used: `Tiles`, while it lives.
#pragma once

#include "common/simd.h"

namespace foveal::FOVEAL_ISA {

#if defined(FOVEAL_AMX)

constexpr int AMX = 16;  // rows, columns and words of a tile

#if defined(FOVEAL_EMULATED)

struct Tiles {
  Tiles() {}
  ~Tiles() {}
};
inline thread_local uint32_t tile_words[8][AMX][AMX];

template <int T>
FOVEAL_INLINE void load_tile(const void* p, int64_t stride) {
  for (int r = 0; r < AMX; ++r) std::memcpy(tile_words[T][r], static_cast<const char*>(p) + r * stride, 64);
}
template <int T>
FOVEAL_INLINE void stream_tile(const void* p, int64_t stride) {
  load_tile<T>(p, stride);
}
template <int T>
FOVEAL_INLINE void store_tile(void* p, int64_t stride) {
  for (int r = 0; r < AMX; ++r) std::memcpy(static_cast<char*>(p) + r * stride, tile_words[T][r], 64);
}
template <int T>
FOVEAL_INLINE void zero_tile() {
  std::memset(tile_words[T], 0, sizeof tile_words[T]);
}
template <int C, int A, int B>
FOVEAL_INLINE void multiply_bf16() {
  auto number = [](uint32_t word, int half) {
    const uint32_t bits = half ? word & 0xffff0000u : word << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  };
  for (int m = 0; m < AMX; ++m)
    for (int n = 0; n < AMX; ++n) {
      float sum;
      std::memcpy(&sum, &tile_words[C][m][n], 4);
      for (int k = 0; k < AMX; ++k)
        for (int half = 0; half < 2; ++half)
          sum += number(tile_words[A][m][k], half) * number(tile_words[B][k][n], half);
      std::memcpy(&tile_words[C][m][n], &sum, 4);
    }
}
template <int C, int A, int B>
FOVEAL_INLINE void multiply_int8() {
  for (int m = 0; m < AMX; ++m)
    for (int n = 0; n < AMX; ++n)
      for (int k = 0; k < AMX; ++k)
        for (int byte = 0; byte < 32; byte += 8)
          tile_words[C][m][n] += static_cast<uint32_t>(static_cast<int8_t>(tile_words[A][m][k] >> byte) *
                                                       static_cast<int8_t>(tile_words[B][k][n] >> byte));
}

#else

struct Tiles {
  Tiles() {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = AMX;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { __asm__ volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Written by hand: the intrinsics of GCC 12 do not say that they read memory, so that stores may come too late.
template <int T>
FOVEAL_INLINE void load_tile(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
// The same for what is not wanted again soon, and should leave the level-one cache to others.
template <int T>
FOVEAL_INLINE void stream_tile(const void* p, int64_t stride) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
FOVEAL_INLINE void store_tile(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
FOVEAL_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
// Pairs of bf16, sums of floats.
template <int C, int A, int B>
FOVEAL_INLINE void multiply_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// Fours of int8, exact sums of int32.
template <int C, int A, int B>
FOVEAL_INLINE void multiply_int8() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

#else

struct Tiles {
  Tiles() {}   // not trivial: a variable of this type is not unused
  ~Tiles() {}
};

#endif

}  // namespace foveal::FOVEAL_ISA
