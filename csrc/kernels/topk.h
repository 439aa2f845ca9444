// The exact topk of a query's candidates: floats as whole numbers of the same order, selected by their digits.
#pragma once

#include "common/scratch.h"
#include "common/simd.h"

namespace foveal::FOVEAL_ISA {

// Greater exactly where the score is; both zeros are one.
FOVEAL_INLINE uint32_t order_of(float score) {
  score += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}
FOVEAL_INLINE float score_of(uint32_t order) {
  const uint32_t bits = order & 0x80000000u ? order ^ 0x80000000u : ~order;
  float score;
  std::memcpy(&score, &bits, 4);
  return score;
}

#if defined(FOVEAL_AVX512)
FOVEAL_INLINE __m512i order_of(F32 score) {
  const __m512i bits = _mm512_castps_si512((score + zero()).v);
  return _mm512_xor_si512(bits, _mm512_or_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(INT32_MIN)));
}
// The chosen lanes one after another; writes a whole register. Returns how many there are.
FOVEAL_INLINE int store_lanes(void* p, Mask chosen, __m512i x) {
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(chosen, x));
  return __builtin_popcount(chosen);
}
FOVEAL_INLINE Mask lanes_before(int64_t stop) { return stop < 16 ? first_lanes(static_cast<int>(stop)) : Mask{0xffff}; }
#endif

// Memory of so many candidates, in whole registers.
FOVEAL_INLINE int64_t candidate_bytes(int64_t candidates) { return Scratch::rounded((candidates + 16) * 4); }

struct RadixMemory {
  static constexpr int DIGIT_BITS = 11;

  uint32_t* counts;  // [2^DIGIT_BITS]
  uint32_t* rest;    // [candidates]

  RadixMemory() = default;
  RadixMemory(Scratch& scratch, int64_t candidates)
      : counts(scratch.take<uint32_t>(1 << DIGIT_BITS)), rest(scratch.take<uint32_t>(candidates + 16)) {}
  static int64_t bytes(int64_t candidates) {
    return Scratch::rounded(4 << DIGIT_BITS) + candidate_bytes(candidates);
  }
};

// The rank-th highest key, and how many that are equal to it are among the rank highest.
struct Edge {
  uint32_t key;
  int64_t room;
};

// Keys of this digit, to `rest`; how many.
inline int64_t keep_digit(const uint32_t* keys, int64_t count, uint32_t lowest, int shift, uint32_t digit, uint32_t* rest) {
  int64_t found = 0;
#if defined(FOVEAL_AVX512)
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i key = _mm512_maskz_loadu_epi32(lanes_before(count - i), keys + i);
    const __m512i digits = _mm512_srl_epi32(_mm512_sub_epi32(key, _mm512_set1_epi32(lowest)), _mm_cvtsi32_si128(shift));
    const Mask same = _mm512_mask_cmpeq_epi32_mask(lanes_before(count - i), digits, _mm512_set1_epi32(digit));
    found += store_lanes(rest + found, same, key);
  }
#else
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = keys[i];
    rest[found] = key;
    found += (key - lowest) >> shift == digit;
  }
#endif
  return found;
}

// Digit by digit from the top, counting; only keys with the right digits so far are looked at again. Digits are those of
// the distance to the lowest key, so that keys of one magnitude do not all fall into a few counts.
inline Edge find_edge(const uint32_t* keys, int64_t count, int64_t rank, const RadixMemory& memory) {
  uint32_t lowest = keys[0], highest = keys[0];
  for (int64_t i = 0; i < count; ++i) {
    lowest = keys[i] < lowest ? keys[i] : lowest;
    highest = keys[i] > highest ? keys[i] : highest;
  }
  int bits = highest > lowest ? 32 - __builtin_clz(highest - lowest) : 0;
  while (bits) {
    const int shift = bits > RadixMemory::DIGIT_BITS ? bits - RadixMemory::DIGIT_BITS : 0;
    std::memset(memory.counts, 0, sizeof(uint32_t) << (bits - shift));
    for (int64_t i = 0; i < count; ++i) ++memory.counts[(keys[i] - lowest) >> shift];
    uint32_t digit = (1u << (bits - shift)) - 1;
    for (; memory.counts[digit] < rank; --digit) rank -= memory.counts[digit];
    count = keep_digit(keys, count, lowest, shift, digit, memory.rest);
    keys = memory.rest;
    lowest += digit << shift;
    bits = shift;
  }
  return {lowest, rank};
}

// A query's keys that may still be among its topk, in order of position.
struct Candidates {
  uint32_t* keys;
  int32_t* positions;
  int64_t capacity, count;
  bool limited;  // topk were found: only scores above `floor` matter
  float floor;

  void clear() {
    count = 0;
    limited = false;
  }

  // Scores of positions from `position` on, read in whole registers; there is room for them.
  FOVEAL_INLINE void add(const float* scores, int number, int32_t position) {
    if (!limited) {
      for (int i = 0; i < number; ++i) {
        keys[count + i] = order_of(scores[i]);
        positions[count + i] = position + i;
      }
      count += number;
      return;
    }
    for (int start = 0; start < number; start += F32::width) {
      uint32_t above = lanes_above(load(scores + start), floor);
      if (number - start < F32::width) above &= (1u << (number - start)) - 1;
#if defined(FOVEAL_AVX512)
      if (!above) continue;
      const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const Mask chosen = static_cast<Mask>(above);
      store_lanes(positions + count, chosen, _mm512_add_epi32(lanes, _mm512_set1_epi32(position + start)));
      count += store_lanes(keys + count, chosen, order_of(load(scores + start)));
#else
      for (; above; above &= above - 1, ++count) {
        const int i = start + __builtin_ctz(above);
        keys[count] = order_of(scores[i]);
        positions[count] = position + i;
      }
#endif
    }
  }

  void append(const uint32_t* more_keys, const int32_t* more_positions, int64_t number) {
    std::memcpy(keys + count, more_keys, number * sizeof(uint32_t));
    std::memcpy(positions + count, more_positions, number * sizeof(int32_t));
    count += number;
  }

  // Keeps the topk highest (there are at least so many), the lower position where keys are equal.
  void keep_highest(int64_t topk, const RadixMemory& memory) {
    Edge edge = find_edge(keys, count, topk, memory);
    int64_t kept = 0;
#if defined(FOVEAL_AVX512)
    for (int64_t i = 0; i < count; i += 16) {
      const Mask there = lanes_before(count - i);
      const __m512i key = _mm512_maskz_loadu_epi32(there, keys + i), position = _mm512_maskz_loadu_epi32(there, positions + i);
      const __m512i limit = _mm512_set1_epi32(edge.key);
      uint32_t equal = _mm512_mask_cmpeq_epi32_mask(there, key, limit);
      while (__builtin_popcount(equal) > edge.room) equal &= ~(0x80000000u >> __builtin_clz(equal));  // the highest first
      edge.room -= __builtin_popcount(equal);
      const Mask fits = static_cast<Mask>(_mm512_mask_cmpgt_epu32_mask(there, key, limit) | equal);
      store_lanes(positions + kept, fits, position);
      kept += store_lanes(keys + kept, fits, key);
    }
#else
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t key = keys[i];
      const bool fits = (key == edge.key) & (edge.room > 0);
      edge.room -= fits;
      keys[kept] = key;
      positions[kept] = positions[i];
      kept += (key > edge.key) | fits;
    }
#endif
    count = kept;
    limited = true;
    floor = score_of(edge.key);
  }
};

}  // namespace foveal::FOVEAL_ISA
