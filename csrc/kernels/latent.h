// Absorbed latent attention (MLA): one key row for all heads, whose first `rank` numbers are the value.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/numbers.h"
#include "common/sequences.h"

namespace foveal {

struct LatentAttention {
  const void* q;        // [queries, heads, width]
  void* out;            // [queries, heads, rank]
  Format format;        // of q and out: f32 or bf16
  const char* rows;     // stored rows, row_bytes apart
  int64_t row_bytes;
  Format row_format;    // `format`, or e4m3: the fp8 record of foveal/config/formats.py
  int64_t heads, width, rank;
  float scale;
  Sequences sequences;
  const int32_t* selection;  // [queries, topk] positions, -1 = none, last; null: all keys up to the query's own position
  int64_t topk;
  int threads;
};

#define FOVEAL_DECLARE(isa) \
  namespace isa {           \
  void latent_attention(const LatentAttention&); \
  }
FOVEAL_FOR_EACH_ISA(FOVEAL_DECLARE)
#undef FOVEAL_DECLARE

}  // namespace foveal
