// The vector wrapper: `F32`, a register of floats, with the same operations for every instruction set.
//
// width lanes: 16 (avx512 and above), 8 (avx2, portable). "partial" operations touch the first n < width lanes only:
// memory beyond them is neither read nor written, and lanes beyond them are zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/numbers.h"

#if defined(FOVEAL_EMULATED)  // AVX-512 in software, to test its code on machines without it (CONTRIBUTING.md)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#elif defined(__x86_64__)
#include <immintrin.h>
#endif

#define FOVEAL_INLINE inline __attribute__((always_inline))

namespace foveal::FOVEAL_ISA {

#if defined(FOVEAL_AVX512)

using Mask = __mmask16;

struct F32 {
  static constexpr int width = 16;
  __m512 v;
};

FOVEAL_INLINE Mask first_lanes(int n) { return static_cast<Mask>((1u << n) - 1u); }
FOVEAL_INLINE F32 set1(float x) { return {_mm512_set1_ps(x)}; }
FOVEAL_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
FOVEAL_INLINE F32 load_partial(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
FOVEAL_INLINE void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
FOVEAL_INLINE void store_partial(float* p, F32 x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.v); }
FOVEAL_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
FOVEAL_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
FOVEAL_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
FOVEAL_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
FOVEAL_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FOVEAL_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
FOVEAL_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
FOVEAL_INLINE float sum(F32 x) { return _mm512_reduce_add_ps(x.v); }
FOVEAL_INLINE __m256 sum_of_halves(F32 x) {
  return _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
}
// p[0..3] = sums of a, b, c, d.
FOVEAL_INLINE void store_sums(float* p, F32 a, F32 b, F32 c, F32 d) {
  const __m256 ab = _mm256_hadd_ps(sum_of_halves(a), sum_of_halves(b));
  const __m256 all = _mm256_hadd_ps(ab, _mm256_hadd_ps(sum_of_halves(c), sum_of_halves(d)));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
FOVEAL_INLINE float maximum(F32 x) { return _mm512_reduce_max_ps(x.v); }
// Numbers 2i and 2i + 1 change places.
FOVEAL_INLINE F32 swap_pairs(F32 x) { return {_mm512_permute_ps(x.v, 0xb1)}; }
FOVEAL_INLINE F32 round(F32 x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// x 2^n for whole n in [-126, 127]; 0 for n = -127.
FOVEAL_INLINE F32 scale2(F32 x, F32 n) {
  const __m512i exponent = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
  return {_mm512_mul_ps(x.v, _mm512_castsi512_ps(exponent))};
}

// x where limit <= y, otherwise 0.
FOVEAL_INLINE F32 where_at_least(F32 y, float limit, F32 x) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y.v, _mm512_set1_ps(limit), _CMP_GE_OQ), x.v)};
}

// Bit i: lane i is greater than limit.
FOVEAL_INLINE uint32_t lanes_above(F32 x, float limit) {
  return _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_GT_OQ);
}

FOVEAL_INLINE F32 widen_bf16(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
FOVEAL_INLINE F32 load(const bf16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
// Rounds to the nearest, ties to even; NaN stays NaN.
FOVEAL_INLINE __m256i narrow_bf16(F32 x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const Mask nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16));
}
// A register of pairs of bf16: the first (low) or the second number of each.
FOVEAL_INLINE F32 low_halves(F32 x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 16))}; }
FOVEAL_INLINE F32 high_halves(F32 x) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(-65536)))};
}
FOVEAL_INLINE void store(bf16* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(x)); }

FOVEAL_INLINE F32 load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
// e4m3's bits moved into a float16, whose exponent bias is 8 larger: exact, denormals included; NaN codes are not expected.
FOVEAL_INLINE F32 load(const e4m3* p) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
  const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), 7);
  return {_mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(sign, rest)), _mm512_set1_ps(256.0f))};
}

#elif defined(FOVEAL_AVX2)

struct F32 {
  static constexpr int width = 8;
  __m256 v;
};

FOVEAL_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FOVEAL_INLINE F32 set1(float x) { return {_mm256_set1_ps(x)}; }
FOVEAL_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
FOVEAL_INLINE F32 load_partial(const float* p, int n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
FOVEAL_INLINE void store(float* p, F32 x) { _mm256_storeu_ps(p, x.v); }
FOVEAL_INLINE void store_partial(float* p, F32 x, int n) { _mm256_maskstore_ps(p, first_lanes(n), x.v); }
FOVEAL_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
FOVEAL_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
FOVEAL_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
FOVEAL_INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
FOVEAL_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FOVEAL_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
FOVEAL_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
FOVEAL_INLINE float sum(F32 x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
// p[0..3] = sums of a, b, c, d.
FOVEAL_INLINE void store_sums(float* p, F32 a, F32 b, F32 c, F32 d) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
FOVEAL_INLINE float maximum(F32 x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
// Numbers 2i and 2i + 1 change places.
FOVEAL_INLINE F32 swap_pairs(F32 x) { return {_mm256_permute_ps(x.v, 0xb1)}; }
FOVEAL_INLINE F32 round(F32 x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// x 2^n for whole n in [-126, 127]; 0 for n = -127.
FOVEAL_INLINE F32 scale2(F32 x, F32 n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(exponent))};
}

// x where limit <= y, otherwise 0.
FOVEAL_INLINE F32 where_at_least(F32 y, float limit, F32 x) {
  return {_mm256_and_ps(_mm256_cmp_ps(y.v, _mm256_set1_ps(limit), _CMP_GE_OQ), x.v)};
}

// Bit i: lane i is greater than limit.
FOVEAL_INLINE uint32_t lanes_above(F32 x, float limit) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.v, _mm256_set1_ps(limit), _CMP_GT_OQ)));
}

FOVEAL_INLINE F32 widen_bf16(__m128i x) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))}; }
FOVEAL_INLINE F32 load(const bf16* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
// Rounds to the nearest, ties to even; NaN stays NaN.
FOVEAL_INLINE __m128i narrow_bf16(F32 x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
// A register of pairs of bf16: the first (low) or the second number of each.
FOVEAL_INLINE F32 low_halves(F32 x) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 16))}; }
FOVEAL_INLINE F32 high_halves(F32 x) {
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(-65536)))};
}
FOVEAL_INLINE void store(bf16* p, F32 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(x)); }

FOVEAL_INLINE F32 load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
// e4m3's bits moved into a float16, whose exponent bias is 8 larger: exact, denormals included; NaN codes are not expected.
FOVEAL_INLINE F32 load(const e4m3* p) {
  const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x80)), 8);
  const __m128i rest = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x7f)), 7);
  return {_mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(sign, rest)), _mm256_set1_ps(256.0f))};
}

#else  // portable: the compiler's own vectors, which it splits into what the target has

using FloatLanes = float __attribute__((vector_size(32), may_alias));
using IntLanes = int32_t __attribute__((vector_size(32), may_alias));

struct F32 {
  static constexpr int width = 8;
  FloatLanes v;
};

template <class Function>
FOVEAL_INLINE F32 each(Function function) {
  F32 result;
  for (int i = 0; i < F32::width; ++i) result.v[i] = function(i);
  return result;
}

FOVEAL_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
FOVEAL_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
FOVEAL_INLINE F32 set1(float x) { return {FloatLanes{x, x, x, x, x, x, x, x}}; }
FOVEAL_INLINE F32 load(const float* p) {  // which may point to words of another type
  F32 x;
  std::memcpy(&x.v, p, sizeof x.v);
  return x;
}
FOVEAL_INLINE F32 load_partial(const float* p, int n) { return each([&](int i) { return i < n ? p[i] : 0.0f; }); }
FOVEAL_INLINE void store(float* p, F32 x) { std::memcpy(p, &x.v, sizeof x.v); }
FOVEAL_INLINE void store_partial(float* p, F32 x, int n) { std::memcpy(p, &x.v, n * sizeof(float)); }
FOVEAL_INLINE F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
FOVEAL_INLINE F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
FOVEAL_INLINE F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
FOVEAL_INLINE F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
FOVEAL_INLINE F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
FOVEAL_INLINE F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
FOVEAL_INLINE F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }
FOVEAL_INLINE float sum(F32 x) {
  return ((x.v[0] + x.v[4]) + (x.v[2] + x.v[6])) + ((x.v[1] + x.v[5]) + (x.v[3] + x.v[7]));
}
// p[0..3] = sums of a, b, c, d.
FOVEAL_INLINE void store_sums(float* p, F32 a, F32 b, F32 c, F32 d) {
  p[0] = sum(a), p[1] = sum(b), p[2] = sum(c), p[3] = sum(d);
}
FOVEAL_INLINE float maximum(F32 x) {
  float most = x.v[0];
  for (int i = 1; i < F32::width; ++i) most = x.v[i] > most ? x.v[i] : most;
  return most;
}
// Numbers 2i and 2i + 1 change places.
FOVEAL_INLINE F32 swap_pairs(F32 x) { return each([&](int i) { return x.v[i ^ 1]; }); }
FOVEAL_INLINE F32 round(F32 x) { return each([&](int i) { return __builtin_rintf(x.v[i]); }); }
// x 2^n for whole n in [-126, 127]; 0 for n = -127.
FOVEAL_INLINE F32 scale2(F32 x, F32 n) {
  const IntLanes exponent = (__builtin_convertvector(n.v, IntLanes) + 127) << 23;
  return {x.v * (FloatLanes)exponent};
}
// x where limit <= y, otherwise 0.
FOVEAL_INLINE F32 where_at_least(F32 y, float limit, F32 x) {
  return {(FloatLanes)((y.v >= limit) & (IntLanes)x.v)};
}
// Bit i: lane i is greater than limit.
FOVEAL_INLINE uint32_t lanes_above(F32 x, float limit) {
  uint32_t bits = 0;
  for (int i = 0; i < F32::width; ++i) bits |= static_cast<uint32_t>(x.v[i] > limit) << i;
  return bits;
}
FOVEAL_INLINE F32 load(const bf16* p) {
  return each([&](int i) { return from_bits(static_cast<uint32_t>(p[i].bits) << 16); });
}
// A register of pairs of bf16: the first (low) or the second number of each.
FOVEAL_INLINE F32 low_halves(F32 x) { return each([&](int i) { return from_bits(to_bits(x.v[i]) << 16); }); }
FOVEAL_INLINE F32 high_halves(F32 x) { return each([&](int i) { return from_bits(to_bits(x.v[i]) & 0xffff0000u); }); }
// Rounds to the nearest, ties to even; NaN stays NaN.
FOVEAL_INLINE void store(bf16* p, F32 x) {
  for (int i = 0; i < F32::width; ++i) {
    const uint32_t bits = to_bits(x.v[i]);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    p[i].bits = static_cast<uint16_t>(x.v[i] == x.v[i] ? rounded : 0x7fc0);
  }
}
FOVEAL_INLINE F32 load(const int8_t* p) { return each([&](int i) { return static_cast<float>(p[i]); }); }
// Exact, denormals included; NaN codes are not expected. The product makes up for the difference of the exponents' biases.
FOVEAL_INLINE F32 load(const e4m3* p) {
  return each([&](int i) {
    const uint32_t bits = p[i].bits;
    const uint32_t mantissa = bits & 7, exponent = (bits >> 3) & 15;
    const float size = exponent ? from_bits((exponent + 120) << 23 | mantissa << 20) : mantissa * 0x1p-9f;
    return bits & 0x80 ? -size : size;
  });
}

#endif

// What follows is the same for all.

constexpr float LOG2E = 1.44269504f;

FOVEAL_INLINE F32 zero() { return set1(0.0f); }

FOVEAL_INLINE int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// The first n lanes of other formats, by way of a small buffer.
template <class Number>
FOVEAL_INLINE F32 load_partial(const Number* p, int n) {
  Number buffer[F32::width] = {};
  std::memcpy(buffer, p, n * sizeof(Number));
  return load(buffer);
}
// A register of n numbers or more, which may be none: what is beyond them is 0, and not read.
template <class Number>
FOVEAL_INLINE F32 load_up_to(const Number* p, int64_t n) {
  if (n >= F32::width) return load(p);
  return n > 0 ? load_partial(p, static_cast<int>(n)) : zero();
}
FOVEAL_INLINE void store_partial(bf16* p, F32 x, int n) {
  bf16 buffer[F32::width];
  store(buffer, x);
  std::memcpy(p, buffer, n * sizeof(bf16));
}

// e^x for x <= 88, relative error below 3e-7 (Cephes' polynomial); exactly 0 below -87, so -inf gives 0.
FOVEAL_INLINE F32 exp(F32 x) {
  const F32 clamped = min(max(x, set1(-87.0f)), set1(88.0f));
  const F32 n = round(clamped * set1(LOG2E));
  F32 r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  F32 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r + set1(1.0f));
  return where_at_least(x, -87.0f, scale2(p, n));
}

// x / (1 + e^-y). The division by x's side keeps a NaN, which exp would lose.
FOVEAL_INLINE F32 times_sigmoid(F32 x, F32 y) { return x / (set1(1.0f) + exp(zero() - y)); }
FOVEAL_INLINE F32 sigmoid(F32 x) { return times_sigmoid(set1(1.0f), x); }
FOVEAL_INLINE F32 silu(F32 x) { return times_sigmoid(x, x); }

// 2^x for x <= 127, relative error below 2e-7 (a minimax polynomial); exactly 0 below -126.5, so -inf gives 0. NaN stays NaN.
FOVEAL_INLINE F32 exp2(F32 x) {
  const F32 clamped = max(set1(-127.0f), x);
  const F32 n = round(clamped), r = clamped - n;
  F32 p = set1(1.3264727e-3f);
  p = fma(p, r, set1(9.671513e-3f));
  p = fma(p, r, set1(5.5507336e-2f));
  p = fma(p, r, set1(2.4022242e-1f));
  p = fma(p, r, set1(6.93147e-1f));
  return scale2(fma(p, r, set1(1.0f)), n);
}

}  // namespace foveal::FOVEAL_ISA
