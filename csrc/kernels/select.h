// Index scores and the exact top-k of them, for every query.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/numbers.h"
#include "common/sequences.h"

namespace foveal {

// f32 and bf16: rows of numbers. e4m3 and int8: pages of 64 keys, then their 64 float scales.
struct IndexKeys {
  const uint8_t* data;
  Format format;
  int64_t stride;  // bytes from one row, or one page, to the next
};

struct Select {
  const uint8_t* queries;  // [T, heads, size]
  Format query_format;     // int8 with int8 keys, anything else with others
  const float* weights;    // [T, heads]
  int64_t heads, size;
  IndexKeys keys;
  Sequences sequences;
  int64_t topk;
  int32_t* selection;      // [T, topk]
  int threads;
};

#define FOVEAL_DECLARE(isa) \
  namespace isa {           \
  void select(const Select&); \
  }
FOVEAL_FOR_EACH_ISA(FOVEAL_DECLARE)
#undef FOVEAL_DECLARE

}  // namespace foveal
