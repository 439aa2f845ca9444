// Sums of products of 16-bit integers: `Fixed`, 32 integers in one or two registers, and `Sums`, F32::width 32-bit sums.
// One instruction multiplies twice as many 16-bit integers as floats, and the sums are exact.
#pragma once

#include "common/simd.h"

namespace foveal::FOVEAL_ISA {

constexpr int FIXED = 32;

// Keeps g++ from putting off the additions of many products, all of which it would have to spill.
#define FOVEAL_IN_ORDER(sums) asm("" : "+x"(sums))

#if defined(FOVEAL_AVX512)

struct Fixed {
  __m512i v;
};
struct Sums {
  __m512i v;
};

FOVEAL_INLINE Fixed load_fixed(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
FOVEAL_INLINE Fixed load_fixed(const int8_t* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
FOVEAL_INLINE Fixed load_nibbles(const uint8_t* p) {
  const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i low = _mm256_and_si256(bytes, _mm256_set1_epi16(15)), high = _mm256_srli_epi16(bytes, 4);
  return {_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)};
}
FOVEAL_INLINE Sums no_sums() { return {_mm512_setzero_si512()}; }
FOVEAL_INLINE Sums multiply_add(Fixed a, Fixed b, Sums c) {
#if defined(FOVEAL_BF16) && !defined(FOVEAL_EMULATED)
  // In assembly, because g++ 12 spills the sums of the intrinsic.
  asm("vpdpwssd %2, %1, %0" : "+v"(c.v) : "v"(a.v), "v"(b.v));
  return c;
#else
  return {_mm512_add_epi32(c.v, _mm512_madd_epi16(a.v, b.v))};
#endif
}
FOVEAL_INLINE F32 to_float(Sums x) { return {_mm512_cvtepi32_ps(x.v)}; }
FOVEAL_INLINE int sum(Sums x) { return _mm512_reduce_add_epi32(x.v); }
// Rounded to the nearest integer.
FOVEAL_INLINE void store_fixed(int16_t* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x.v)));
}

#elif defined(FOVEAL_AVX2)

struct Fixed {
  __m256i low, high;
};
struct Sums {
  __m256i v;
};

FOVEAL_INLINE Fixed load_fixed(const int16_t* p) {
  const __m256i* words = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(words), _mm256_loadu_si256(words + 1)};
}
FOVEAL_INLINE Fixed load_fixed(const int8_t* p) {
  const __m128i* bytes = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(bytes)), _mm256_cvtepi8_epi16(_mm_loadu_si128(bytes + 1))};
}
FOVEAL_INLINE Fixed load_nibbles(const uint8_t* p) {
  const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_and_si256(bytes, _mm256_set1_epi16(15)), _mm256_srli_epi16(bytes, 4)};
}
FOVEAL_INLINE Sums no_sums() { return {_mm256_setzero_si256()}; }
FOVEAL_INLINE Sums multiply_add(Fixed a, Fixed b, Sums c) {
  c.v = _mm256_add_epi32(c.v, _mm256_madd_epi16(a.low, b.low));
  FOVEAL_IN_ORDER(c.v);
  c.v = _mm256_add_epi32(c.v, _mm256_madd_epi16(a.high, b.high));
  FOVEAL_IN_ORDER(c.v);
  return c;
}
FOVEAL_INLINE F32 to_float(Sums x) { return {_mm256_cvtepi32_ps(x.v)}; }
FOVEAL_INLINE int sum(Sums x) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
// Rounded to the nearest integer.
FOVEAL_INLINE void store_fixed(int16_t* p, F32 x) {
  const __m256i integers = _mm256_cvtps_epi32(x.v);
  const __m128i low = _mm256_castsi256_si128(integers), high = _mm256_extracti128_si256(integers, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(low, high));
}

#else

using ShortLanes = int16_t __attribute__((vector_size(16), may_alias));
using ByteLanes = int8_t __attribute__((vector_size(8), may_alias));
constexpr int PARTS = FIXED / F32::width;

struct Fixed {
  ShortLanes v[PARTS];
};
struct Sums {
  IntLanes v;
};

FOVEAL_INLINE Fixed load_fixed(const int16_t* p) {
  Fixed x;
  std::memcpy(x.v, p, sizeof x.v);
  return x;
}
FOVEAL_INLINE Fixed load_fixed(const int8_t* p) {
  ByteLanes bytes[PARTS];
  std::memcpy(bytes, p, sizeof bytes);
  Fixed x;
  for (int i = 0; i < PARTS; ++i) x.v[i] = __builtin_convertvector(bytes[i], ShortLanes);
  return x;
}
FOVEAL_INLINE Fixed load_nibbles(const uint8_t* p) {
  ByteLanes bytes[PARTS / 2];
  std::memcpy(bytes, p, sizeof bytes);
  Fixed x;
  for (int i = 0; i < PARTS / 2; ++i) {
    const ShortLanes wide = __builtin_convertvector(bytes[i], ShortLanes);
    x.v[i] = wide & 15;
    x.v[i + PARTS / 2] = (wide >> 4) & 15;
  }
  return x;
}
FOVEAL_INLINE Sums no_sums() { return {IntLanes{}}; }
FOVEAL_INLINE Sums multiply_add(Fixed a, Fixed b, Sums c) {
  for (int i = 0; i < PARTS; ++i)
    c.v += __builtin_convertvector(a.v[i], IntLanes) * __builtin_convertvector(b.v[i], IntLanes);
  return c;
}
FOVEAL_INLINE F32 to_float(Sums x) { return {__builtin_convertvector(x.v, FloatLanes)}; }
FOVEAL_INLINE int sum(Sums x) {
  int total = 0;
  for (int i = 0; i < F32::width; ++i) total += x.v[i];
  return total;
}
// Rounded to the nearest integer; NaN gives any.
FOVEAL_INLINE void store_fixed(int16_t* p, F32 x) {
  const F32 whole = min(max(round(x), set1(-32767.0f)), set1(32767.0f));
  for (int i = 0; i < F32::width; ++i) p[i] = static_cast<int16_t>(whole.v[i]);
}

#endif

}  // namespace foveal::FOVEAL_ISA
