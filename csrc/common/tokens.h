// Packed tokens of several sequences, as recurrences read them.
#pragma once

#include <cstdint>

namespace foveal {

// Sequence s owns tokens offsets[s] to offsets[s + 1].
struct Spans {
  int64_t count;
  const int64_t* offsets;  // [count + 1]

  int64_t tokens() const { return offsets[count]; }
};

// What each token has: numbers one after another, `stride` numbers behind those of the token before.
template <class Number>
struct PerToken {
  const Number* first;
  int64_t stride;

  __attribute__((always_inline)) const Number* of(int64_t token) const { return first + token * stride; }
};

}  // namespace foveal
