// Which packed rows are whose queries, and which stored rows are whose keys.
#pragma once

#include <cstdint>

namespace foveal {

constexpr int64_t PAGE_SIZE = 64;  // tokens, as in foveal/config/formats.py

// All arrays belong to Python tensors (foveal/kernels/cpu/places.py) that outlive the call.
struct Sequences {
  int64_t count;
  const int64_t* query_offsets;    // [count + 1]: sequence s owns packed rows query_offsets[s] to query_offsets[s + 1]
  const int64_t* first_positions;  // [count]: where its first query stands; the others follow one by one
  const int64_t* lengths;          // [count]: its keys
  const int64_t* starts;           // [count]: the first of its rows where they follow one another, otherwise -1
  const int64_t* table;            // [count, table_stride] page ids, read where starts is -1
  int64_t table_stride;

  // The stored row of a position of sequence s.
  __attribute__((always_inline)) int64_t row(int64_t s, int64_t position) const {
    if (starts[s] >= 0) return starts[s] + position;
    return table[s * table_stride + position / PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE;
  }

  int64_t queries() const { return query_offsets[count]; }
};

}  // namespace foveal
