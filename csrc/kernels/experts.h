// Mixture of experts: the feed-forwards that tokens chose, in one call.
#pragma once

#include "kernels/linear.h"

namespace foveal {

struct Experts {
  const void* x;          // [tokens, inputs], stride x_stride numbers
  int64_t x_stride;
  const float* weights;   // [tokens, per_token]
  const int64_t* chosen;  // [tokens, per_token], from 0 to count - 1
  Weight gate_up;         // of expert 0, [2 hidden, inputs], gate rows first; the others follow without gaps
  Weight down;            // of expert 0, [inputs, hidden]
  int64_t count;
  void* out;              // [tokens, inputs], x's format
  int64_t tokens, per_token;
  Format format;          // f32 or bf16; f32 and bf16 weights are of the same
  int threads;
};

#define FOVEAL_DECLARE(isa) \
  namespace isa {           \
  void experts(const Experts&); \
  }
FOVEAL_FOR_EACH_ISA(FOVEAL_DECLARE)
#undef FOVEAL_DECLARE

}  // namespace foveal
