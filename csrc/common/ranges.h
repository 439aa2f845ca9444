// Few queries over many keys: their keys cut into ranges, so that every thread has work, and put together afterwards.
//
// The cut follows from the shape of the call and not from the number of threads, so results do not depend on that.
#pragma once

#include <cstdint>

namespace foveal::FOVEAL_ISA {

constexpr int64_t RANGE_KEYS = 512;  // fewer are not worth another range
constexpr int64_t RANGE_ITEMS = 16;  // pieces of work that are enough for all threads

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Ranges {
  int64_t count;  // of each block, at least 1; the last ones of a block with fewer keys are empty
  int64_t keys;   // of each range, a multiple of `tile`

  int64_t used(int64_t block_keys) const { return ceil_divide(block_keys, keys); }
};

// Ranges of so many blocks of work, the longest with `longest` keys.
inline Ranges cut(int64_t blocks, int64_t longest, int64_t tile) {
  const int64_t wanted = blocks < RANGE_ITEMS ? RANGE_ITEMS / blocks : 1;
  int64_t keys = ceil_divide(ceil_divide(longest, wanted), tile) * tile;
  if (keys < RANGE_KEYS) keys = RANGE_KEYS;
  const int64_t count = ceil_divide(longest, keys);
  return {count ? count : 1, keys};
}

// Entries of a selection's row before its first -1.
inline int64_t selected(const int32_t* selection, int64_t topk) {
  int64_t low = 0, high = topk;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (selection[middle] < 0)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

}  // namespace foveal::FOVEAL_ISA
