// What index scores are sums of: rows of queries or keys as words (tile.h), and products of such words.
//
// FloatDot takes any pair of float formats. Bf16Dot, where the machine has it, takes pairs that bfloat16 holds exactly: e4m3
// and bf16. Int8Dot sums whole numbers exactly: four products an instruction with VNNI, which wants one side unsigned (keys
// are stored 128 higher, and sums begin at what that adds), otherwise two products of int16. Tiles of AMX multiply signed
// bytes.
#pragma once

#include "common/eight_bits.h"
#include "common/tile.h"

namespace foveal::FOVEAL_ISA {

#if defined(FOVEAL_AVX512)
struct I32 {
  __m512i v;
};
FOVEAL_INLINE I32 set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
FOVEAL_INLINE I32 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
FOVEAL_INLINE F32 to_float(I32 x) { return {_mm512_cvtepi32_ps(x.v)}; }
#elif defined(FOVEAL_AVX2)
struct I32 {
  __m256i v;
};
FOVEAL_INLINE I32 set1(int32_t x) { return {_mm256_set1_epi32(x)}; }
FOVEAL_INLINE I32 load(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
FOVEAL_INLINE F32 to_float(I32 x) { return {_mm256_cvtepi32_ps(x.v)}; }
#else
struct I32 {
  int32_t v[F32::width];
};
FOVEAL_INLINE I32 load(const int32_t* p) {
  I32 result;
  std::memcpy(result.v, p, sizeof result.v);
  return result;
}
FOVEAL_INLINE F32 to_float(I32 x) {
  return each([&](int i) { return static_cast<float>(x.v[i]); });
}
#endif
FOVEAL_INLINE F32 to_float(F32 x) { return x; }

struct Int8Dot {
#if defined(FOVEAL_BF16)
  static constexpr int numbers = 4;
#if defined(FOVEAL_AMX)
  static constexpr int32_t key_offset = 0;
  template <int C, int A, int B>
  static FOVEAL_INLINE void multiply_tile() {
    multiply_int8<C, A, B>();
  }
#else
  static constexpr int32_t key_offset = 128;
  static FOVEAL_INLINE I32 multiply_add(const Word* a, const Word* b, I32 c) {
    int keys;
    std::memcpy(&keys, a, 4);
    const __m512i keys_v = _mm512_set1_epi32(keys), queries = _mm512_loadu_si512(b);
#if defined(FOVEAL_EMULATED)
    return {_mm512_dpbusd_epi32(c.v, keys_v, queries)};
#else
    // GCC 12 spills accumulators with the intrinsic.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(c.v) : "v"(keys_v), "v"(queries));
    return c;
#endif
  }
#endif
#else
  static constexpr int numbers = 2;
  static constexpr int32_t key_offset = 0;
  static FOVEAL_INLINE I32 multiply_add(const Word* a, const Word* b, I32 c) {
    int pair;
    std::memcpy(&pair, a, 4);
#if defined(FOVEAL_AVX512)
    return {_mm512_add_epi32(c.v, _mm512_madd_epi16(_mm512_set1_epi32(pair), load(reinterpret_cast<const int32_t*>(b)).v))};
#elif defined(FOVEAL_AVX2)
    return {_mm256_add_epi32(c.v, _mm256_madd_epi16(_mm256_set1_epi32(pair), load(reinterpret_cast<const int32_t*>(b)).v))};
#else
    const int low = static_cast<int16_t>(pair), high = pair >> 16;
    for (int i = 0; i < F32::width; ++i)
      c.v[i] += low * static_cast<int16_t>(b[i]) + high * (static_cast<int32_t>(b[i]) >> 16);
    return c;
#endif
  }
#endif
};

template <class Dot>
struct Product {
  using Sum = F32;
};
template <>
struct Product<Int8Dot> {
  using Sum = I32;
};

// One word of a row times the columns of a panel that is so many registers wide.
template <class Dot, int registers>
FOVEAL_INLINE void multiply_add_row(const Word* a, const Word* panel, typename Product<Dot>::Sum* sum) {
#if defined(FOVEAL_AVX2)
  if constexpr (Dot::numbers == 2 && registers == 2) {
    // GCC 12 would broadcast all rows' words first, and spill the sums for it: there is no register to spare.
    const __m256i first = load(reinterpret_cast<const int32_t*>(panel)).v;
    const __m256i second = load(reinterpret_cast<const int32_t*>(panel + F32::width)).v;
    __m256i pair, product;
    __asm__(
        "vpbroadcastd %4, %2\n\t"
        "vpmaddwd %5, %2, %3\n\t"
        "vpmaddwd %6, %2, %2\n\t"
        "vpaddd %3, %0, %0\n\t"
        "vpaddd %2, %1, %1"
        : "+x"(sum[0].v), "+x"(sum[1].v), "=&x"(pair), "=&x"(product)
        : "m"(*a), "x"(first), "x"(second));
    return;
  }
#endif
#pragma GCC unroll 4
  for (int n = 0; n < registers; ++n) sum[n] = Dot::multiply_add(a, panel + n * F32::width, sum[n]);
}

FOVEAL_INLINE int64_t number_bytes(Format format) { return format == Format::f32 ? 4 : format == Format::bf16 ? 2 : 1; }

// What a number in words has to be multiplied with.
template <class Dot>
FOVEAL_INLINE float unit(Format format) {
  return Dot::numbers == 1 && format == Format::e4m3 ? E4M3_UNIT : 1.0f;
}

// One row of `size` numbers as words, zeros after its end; `words` has room for 16 numbers more.
template <class Dot>
struct RowOf;

template <>
struct RowOf<FloatDot> {
  static FOVEAL_INLINE void read(Format format, const uint8_t* row, int64_t size, Word* words, bool) {
    float* out = reinterpret_cast<float*>(words);
    if (format == Format::e4m3) return unpack(reinterpret_cast<const e4m3*>(row), out, size);
    if (format == Format::f32) {
      std::memcpy(out, row, size * 4);
      return;
    }
    const bf16* in = reinterpret_cast<const bf16*>(row);
    int64_t i = 0;
    for (; i + F32::width <= size; i += F32::width) store(out + i, load(in + i));
    if (i < size) store(out + i, load_partial(in + i, static_cast<int>(size - i)));
  }
};

#if defined(FOVEAL_BF16)
// The bytes of the bf16 that each e4m3 without its sign is, exactly.
struct E4m3Bytes {
  alignas(64) uint8_t low[128], high[128];
  constexpr E4m3Bytes() : low(), high() {
    constexpr int small[8] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};  // m 2^-9
    for (int code = 0; code < 128; ++code) {
      const int bits = code < 8 ? small[code] : (code << 4) + (120 << 7);  // the same, its exponent 120 larger
      low[code] = static_cast<uint8_t>(bits & 0xff), high[code] = static_cast<uint8_t>(bits >> 8);
    }
  }
};
constexpr E4m3Bytes E4M3_BYTES;

// 64 e4m3 as bf16.
FOVEAL_INLINE void widen_e4m3(const uint8_t* codes, uint8_t* out) {
  // So that the halves of each 128 bits, which are interleaved below, come out in order.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const __m512i x = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(codes));
  const auto looked_up = [&](const uint8_t* table) {  // by the lower seven bits
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), x, _mm512_load_si512(table + 64));
  };
  const __m512i low = looked_up(E4M3_BYTES.low);
  const __m512i high = _mm512_or_si512(looked_up(E4M3_BYTES.high), _mm512_and_si512(x, _mm512_set1_epi8(-128)));
  _mm512_storeu_si512(out, _mm512_unpacklo_epi8(low, high));
  _mm512_storeu_si512(out + 64, _mm512_unpackhi_epi8(low, high));
}

template <>
struct RowOf<Bf16Dot> {
  static FOVEAL_INLINE void read(Format format, const uint8_t* row, int64_t size, Word* words, bool) {
    uint8_t* out = reinterpret_cast<uint8_t*>(words);
    if (format == Format::bf16) {
      std::memcpy(out, row, size * 2);
      if (size % 2) std::memset(out + size * 2, 0, 2);
      return;
    }
    int64_t i = 0;
    for (; i + 64 <= size; i += 64) widen_e4m3(row + i, out + 2 * i);
    if (i == size) return;
    uint8_t rest[64] = {}, wide[128];
    std::memcpy(rest, row + i, size - i);
    widen_e4m3(rest, wide);
    std::memcpy(out + 2 * i, wide, size - i <= 32 ? 64 : 128);
  }
};
#endif

template <>
struct RowOf<Int8Dot> {
  static FOVEAL_INLINE void read(Format, const uint8_t* row, int64_t size, Word* words, bool key) {
#if defined(FOVEAL_BF16)
    uint8_t* out = reinterpret_cast<uint8_t*>(words);
    const uint8_t flip = key && Int8Dot::key_offset ? 0x80 : 0;
    for (int64_t i = 0; i < size; ++i) out[i] = row[i] ^ flip;
    for (int64_t i = size; i % 4; ++i) out[i] = flip;
#else
    static_cast<void>(key);
    using Half = int16_t __attribute__((may_alias));  // half a word
    Half* out = reinterpret_cast<Half*>(words);
    for (int64_t i = 0; i < size; ++i) out[i] = static_cast<int8_t>(row[i]);
    if (size % 2) out[size] = 0;
#endif
  }
};

// Numbers of words that rows are read into, those that products need behind the row's end included.
template <class Dot>
FOVEAL_INLINE int64_t words_of(int64_t size) {
  return round_up((size + Dot::numbers - 1) / Dot::numbers, WORDS_AT_ONCE<Dot>);
}

}  // namespace foveal::FOVEAL_ISA
