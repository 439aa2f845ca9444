// Attention with an online softmax: grouped-query, causal or not, with an optional window and selection.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/numbers.h"
#include "common/sequences.h"

namespace foveal {

// A query at position i of its sequence sees the keys j <= i (all, unless causal), of these the last `window` and the first
// `sinks`, and of these what its row of `selection` names. Query head h reads key head h / (heads / groups). All strides are
// in numbers; the last dimension's is 1. A query that sees nothing (it may stand before the first key) gives zeros.
//
// One decoding step of one sequence with `length` keys, in a cache of pages: sequences = {1, {0, 1}, {length - 1}, {length},
// {-1}, page ids, any stride}, or with rows that follow one another: {first row} in the place of {-1}.
struct Flash {
  const void* q;  // [T, heads, key_dim]
  int64_t q_row, q_head;
  const void* k;  // [rows, groups, key_dim]
  int64_t k_row, k_head;
  const void* v;  // [rows, groups, value_dim]
  int64_t v_row, v_head;
  void* out;   // [T, heads, value_dim], dense
  float* lse;  // [T, heads] or null: log(sum of e^score); -inf for a query that sees nothing
  Sequences sequences;
  int heads, groups, key_dim, value_dim;
  float scale;  // > 0
  bool causal;
  int64_t window;            // 0: none; only together with causal
  int64_t sinks;             // keys that stay visible beyond the window
  const int32_t* selection;  // [T, topk] ascending positions, -1 last; or null
  int64_t topk;
  Format format;  // of q, k, v and out: f32 or bf16
  int threads;
};

#define FOVEAL_DECLARE(isa) \
  namespace isa {           \
  void flash(const Flash&); \
  }
FOVEAL_FOR_EACH_ISA(FOVEAL_DECLARE)
#undef FOVEAL_DECLARE

}  // namespace foveal
