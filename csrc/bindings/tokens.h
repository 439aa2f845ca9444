// Packed tokens as they arrive from Python.
#pragma once

#include <nanobind/stl/array.h>

#include <string>

#include "bindings/bindings.h"
#include "common/tokens.h"

namespace foveal {

using Rows = std::array<int64_t, 2>;  // address and stride

template <class Number>
PerToken<Number> per_token(const Rows& rows) {
  return {reading<Number>(rows[0]), rows[1]};
}

// `offsets`: int64 [count + 1]. Throws ValueError in Python unless they ascend from 0 to `tokens`.
inline Spans spans_at(int64_t count, Address offsets, int64_t tokens) {
  const Spans spans = {count, reading<int64_t>(offsets)};
  bool good = spans.offsets[0] == 0 && spans.offsets[count] == tokens;
  for (int64_t s = 0; s < count; ++s) good = good && spans.offsets[s] <= spans.offsets[s + 1];
  if (!good)
    throw nb::value_error(("the sequences' offsets do not ascend from 0 to the " + std::to_string(tokens) + " tokens").c_str());
  return spans;
}

}  // namespace foveal
