// Sequences as they arrive from Python, checked: whatever the tensors say, no kernel reads a row that does not exist.
#pragma once

#include <string>

#include "bindings/bindings.h"
#include "common/sequences.h"

namespace foveal {

// `queries`: int64 [2 count + 1], offsets and first positions; `contexts`: int64 [2 count], lengths and starts.
inline Sequences sequences_at(int64_t count, Address queries, Address contexts, Address table, int64_t table_stride) {
  const int64_t* q = reading<int64_t>(queries);
  const int64_t* c = reading<int64_t>(contexts);
  return {count, q, q + count + 1, c, c + count, reading<int64_t>(table), table_stride};
}

// Throws ValueError in Python unless every key of every sequence lies in [0, rows), and no query stands past its keys.
inline void check(const Sequences& sequences, int64_t rows) {
  auto fail = [](const std::string& message) { throw nb::value_error(message.c_str()); };
  for (int64_t s = 0; s < sequences.count; ++s) {
    const int64_t length = sequences.lengths[s], start = sequences.starts[s];
    const int64_t queries = sequences.query_offsets[s + 1] - sequences.query_offsets[s];
    if (queries < 0 || sequences.first_positions[s] < 0 || sequences.first_positions[s] + queries > length)
      fail("sequence " + std::to_string(s) + " has queries up to position " +
           std::to_string(sequences.first_positions[s] + queries) + ", but only " + std::to_string(length) + " keys");
    if (start >= 0) {
      if (start + length > rows) fail("sequence " + std::to_string(s) + " has keys past row " + std::to_string(rows));
      continue;
    }
    const int64_t pages = (length + PAGE_SIZE - 1) / PAGE_SIZE;
    if (pages > sequences.table_stride)
      fail("sequence " + std::to_string(s) + " has more pages than its table");
    for (int64_t place = 0; place < pages; ++place) {
      const int64_t page = sequences.table[s * sequences.table_stride + place];
      if (page < 0 || (page + 1) * PAGE_SIZE > rows)
        fail("sequence " + std::to_string(s) + " names page " + std::to_string(page) + " of a cache of " +
             std::to_string(rows / PAGE_SIZE));
    }
  }
}

}  // namespace foveal
