// Numbers of eight bits, to and from registers of floats: what simd.h has no need of.
#pragma once

#include "common/simd.h"

namespace foveal::FOVEAL_ISA {

#if defined(FOVEAL_AVX2) || defined(FOVEAL_AVX512)
// What unpack(e4m3) leaves out of its values: its bits are moved into a float16, whose exponent bias is 8 larger.
constexpr float E4M3_UNIT = 256.0f;
#else
constexpr float E4M3_UNIT = 1.0f;
#endif

#if defined(FOVEAL_AVX512)

// 16 numbers, each divided by E4M3_UNIT; exact, denormals included; NaN codes are not expected.
FOVEAL_INLINE void unpack16(const e4m3* p, float* out) {
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xbfff)));
  _mm512_storeu_ps(out, _mm512_cvtph_ps(half));
}

// The nearest e4m3 of |x| <= 448, ties to even. Codes are bits of the rounded float with another exponent bias; below
// 2^-6, where e4m3 has no leading one, a sum whose last place is worth 2^-9 does the rounding. NaN becomes a NaN code.
FOVEAL_INLINE void store_as(e4m3* p, F32 x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i size = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(size, 20), _mm512_set1_epi32(1));
  const __m512i normal = _mm512_sub_epi32(
      _mm512_srli_epi32(_mm512_add_epi32(size, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff))), 20),
      _mm512_set1_epi32(120 << 3));
  const __m512 magic = _mm512_set1_ps(16384.0f);
  const __m512i small =
      _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(size), magic)), _mm512_castps_si512(magic));
  __m512i code = _mm512_mask_mov_epi32(normal, _mm512_cmpgt_epi32_mask(_mm512_set1_epi32(121 << 23), size), small);
  code = _mm512_mask_mov_epi32(code, _mm512_cmpgt_epi32_mask(size, _mm512_set1_epi32(0x7f800000)), _mm512_set1_epi32(0x7f));
  code = _mm512_or_si512(code, _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(code));
}

// The nearest whole number, ties to even, of |x| <= 127.
FOVEAL_INLINE void store_as(int8_t* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}

// Lane i gets lane i ^ distance.
template <int distance>
FOVEAL_INLINE F32 swap_lanes(F32 x) {
  if constexpr (distance == 8) return {_mm512_shuffle_f32x4(x.v, x.v, 0x4e)};
  if constexpr (distance == 4) return {_mm512_shuffle_f32x4(x.v, x.v, 0xb1)};
  if constexpr (distance == 2) return {_mm512_shuffle_ps(x.v, x.v, 0x4e)};
  if constexpr (distance == 1) return {_mm512_shuffle_ps(x.v, x.v, 0xb1)};
}

FOVEAL_INLINE F32 absolute(F32 x) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff)))};
}

#elif defined(FOVEAL_AVX2)

// 16 numbers, each divided by E4M3_UNIT; exact, denormals included; NaN codes are not expected.
FOVEAL_INLINE void unpack16(const e4m3* p, float* out) {
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xbfff)));
  _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm256_castsi256_si128(half)));
  _mm256_storeu_ps(out + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)));
}

// The nearest e4m3 of |x| <= 448, ties to even. Codes are bits of the rounded float with another exponent bias; below
// 2^-6, where e4m3 has no leading one, a sum whose last place is worth 2^-9 does the rounding. NaN becomes a NaN code.
FOVEAL_INLINE void store_as(e4m3* p, F32 x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i size = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(size, 20), _mm256_set1_epi32(1));
  const __m256i normal = _mm256_sub_epi32(
      _mm256_srli_epi32(_mm256_add_epi32(size, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7ffff))), 20),
      _mm256_set1_epi32(120 << 3));
  const __m256 magic = _mm256_set1_ps(16384.0f);
  const __m256i small =
      _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(size), magic)), _mm256_castps_si256(magic));
  __m256i code = _mm256_blendv_epi8(normal, small, _mm256_cmpgt_epi32(_mm256_set1_epi32(121 << 23), size));
  code = _mm256_blendv_epi8(
      code, _mm256_set1_epi32(0x7f), _mm256_cmpgt_epi32(size, _mm256_set1_epi32(0x7f800000)));
  code = _mm256_or_si256(code, _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80)));
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

// The nearest whole number, ties to even, of |x| <= 127.
FOVEAL_INLINE void store_as(int8_t* p, F32 x) {
  const __m256i whole = _mm256_cvtps_epi32(x.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

// Lane i gets lane i ^ distance.
template <int distance>
FOVEAL_INLINE F32 swap_lanes(F32 x) {
  if constexpr (distance == 4) return {_mm256_permute2f128_ps(x.v, x.v, 1)};
  if constexpr (distance == 2) return {_mm256_permute_ps(x.v, 0x4e)};
  if constexpr (distance == 1) return {_mm256_permute_ps(x.v, 0xb1)};
}

FOVEAL_INLINE F32 absolute(F32 x) {
  return {_mm256_and_ps(x.v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)))};
}

#else  // portable

// 16 numbers, each divided by E4M3_UNIT; exact, denormals included; NaN codes are not expected.
FOVEAL_INLINE void unpack16(const e4m3* p, float* out) {
  store(out, load(p));
  store(out + 8, load(p + 8));
}

// The nearest e4m3 of |x| <= 448, ties to even. Codes are bits of the rounded float with another exponent bias; below
// 2^-6, where e4m3 has no leading one, a sum whose last place is worth 2^-9 does the rounding. NaN becomes a NaN code.
FOVEAL_INLINE void store_as(e4m3* p, F32 x) {
  for (int i = 0; i < F32::width; ++i) {
    const uint32_t bits = to_bits(x.v[i]), size = bits & 0x7fffffff;
    const uint32_t normal = ((size + 0x7ffff + ((size >> 20) & 1)) >> 20) - (120 << 3);
    const uint32_t small = to_bits(from_bits(size) + 16384.0f) - to_bits(16384.0f);
    const uint32_t code = size > 0x7f800000 ? 0x7f : size < (121u << 23) ? small : normal;
    p[i].bits = static_cast<uint8_t>(code | (bits >> 24 & 0x80));
  }
}

// The nearest whole number, ties to even, of |x| <= 127.
FOVEAL_INLINE void store_as(int8_t* p, F32 x) {
  for (int i = 0; i < F32::width; ++i) p[i] = static_cast<int8_t>(__builtin_rintf(x.v[i]));
}

// Lane i gets lane i ^ distance.
template <int distance>
FOVEAL_INLINE F32 swap_lanes(F32 x) {
  return each([&](int i) { return x.v[i ^ distance]; });
}

FOVEAL_INLINE F32 absolute(F32 x) {
  return each([&](int i) { return from_bits(to_bits(x.v[i]) & 0x7fffffff); });
}

#endif

// e4m3 numbers, each divided by E4M3_UNIT. `out` has room for a whole number of 16.
FOVEAL_INLINE void unpack(const e4m3* p, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) unpack16(p + i, out + i);
  if (i == count) return;
  e4m3 rest[16] = {};
  std::memcpy(rest, p + i, count - i);
  unpack16(rest, out + i);
}

// The first n lanes.
template <class Number>
FOVEAL_INLINE void store_as_partial(Number* p, F32 x, int n) {
  Number buffer[F32::width];
  store_as(buffer, x);
  std::memcpy(p, buffer, n * sizeof(Number));
}

}  // namespace foveal::FOVEAL_ISA
