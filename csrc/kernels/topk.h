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

struct RadixMemory {
  static constexpr int DIGIT_BITS = 11;

  uint32_t* counts;  // [2^DIGIT_BITS]
  uint32_t* rest;    // [candidates]

  RadixMemory() = default;
  RadixMemory(Scratch& scratch, int64_t candidates)
      : counts(scratch.take<uint32_t>(1 << DIGIT_BITS)), rest(scratch.take<uint32_t>(candidates)) {}
  static int64_t bytes(int64_t candidates) {
    return Scratch::rounded(4 << DIGIT_BITS) + Scratch::rounded(candidates * 4);
  }
};

// The rank-th highest key, and how many that are equal to it are among the rank highest.
struct Edge {
  uint32_t key;
  int64_t room;
};

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
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t key = keys[i];
      memory.rest[found] = key;
      found += (key - lowest) >> shift == digit;
    }
    keys = memory.rest;
    count = found;
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
      for (; above; above &= above - 1, ++count) {
        const int i = start + __builtin_ctz(above);
        keys[count] = order_of(scores[i]);
        positions[count] = position + i;
      }
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
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t key = keys[i];
      const bool fits = (key == edge.key) & (edge.room > 0);
      edge.room -= fits;
      keys[kept] = key;
      positions[kept] = positions[i];
      kept += (key > edge.key) | fits;
    }
    count = kept;
    limited = true;
    floor = score_of(edge.key);
  }
};

}  // namespace foveal::FOVEAL_ISA
