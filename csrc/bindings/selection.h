// Selections as they arrive from Python, checked.
#pragma once

#include "bindings/sequences.h"

namespace foveal {

// Throws ValueError in Python unless every row of the selection is positions that its sequence has, and then -1.
inline void check_selection(const Sequences& sequences, const int32_t* selection, int64_t topk) {
  for (int64_t s = 0; s < sequences.count; ++s)
    for (int64_t query = sequences.query_offsets[s]; query < sequences.query_offsets[s + 1]; ++query) {
      const int32_t* chosen = selection + query * topk;
      for (int64_t k = 0; k < topk; ++k) {
        if (0 <= chosen[k] && chosen[k] < sequences.lengths[s] && (k == 0 || chosen[k - 1] >= 0)) continue;
        if (chosen[k] == -1) continue;
        std::string message = "the selection of query " + std::to_string(query);
        message += " has position " + std::to_string(chosen[k]);
        if (0 <= chosen[k] && chosen[k] < sequences.lengths[s])
          message += " after a -1";
        else
          message += ", but its sequence has " + std::to_string(sequences.lengths[s]) + " keys";
        throw nb::value_error(message.c_str());
      }
    }
}

}  // namespace foveal
