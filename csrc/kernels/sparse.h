// Grouped-query attention over a selection that all heads share.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/numbers.h"
#include "common/sequences.h"

namespace foveal {

struct SparseAttention {
  const void* q;       // [queries, heads, width]
  const void* keys;    // rows [groups, width]
  const void* values;  // rows [groups, value_width]
  void* out;           // [queries, heads, value_width]
  Format format;       // of all: f32 or bf16
  int64_t heads, groups, width, value_width;
  float scale;
  Sequences sequences;
  const int32_t* selection;  // [queries, topk] positions, -1 = none, last
  int64_t topk;
  int threads;
};

#define FOVEAL_DECLARE(isa) \
  namespace isa {           \
  void sparse_attention(const SparseAttention&); \
  }
FOVEAL_FOR_EACH_ISA(FOVEAL_DECLARE)
#undef FOVEAL_DECLARE

}  // namespace foveal
