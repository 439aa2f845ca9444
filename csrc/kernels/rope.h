// Rotary position embedding of the first dimensions of every head.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/numbers.h"

namespace foveal {

constexpr int64_t MOST_ROPE_PAIRS = 512;

struct Rope {
  const void* x;     // [tokens, heads, size]; strides in numbers, the last dimension is contiguous
  int64_t x_token_stride, x_head_stride;
  void* out;         // the same shape; may be x itself, with its strides
  int64_t out_token_stride, out_head_stride;
  const float* turns;  // [tokens, pairs] complex numbers, contiguous
  int64_t tokens, heads, size;
  int64_t pairs;     // 2 pairs <= size; at most MOST_ROPE_PAIRS
  bool interleaved;  // pairs (0, 1), (2, 3), ...; otherwise (i, i + pairs)
  Format format;     // of x and out: f32 or bf16
  int threads;
};

#define FOVEAL_DECLARE(isa) \
  namespace isa {           \
  void rope(const Rope&);   \
  }
FOVEAL_FOR_EACH_ISA(FOVEAL_DECLARE)
#undef FOVEAL_DECLARE

}  // namespace foveal
