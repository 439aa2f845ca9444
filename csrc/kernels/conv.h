// Depthwise causal convolution over each sequence's own past: y(t) = sum_w weight(w) x(t - taps + 1 + w) + bias.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/numbers.h"
#include "common/tokens.h"

namespace foveal {

struct CausalConv {
  const void* x;         // [tokens, channels], x_stride numbers apart
  int64_t x_stride;
  const void* weight;    // [channels, taps]
  const void* bias;      // [channels] or null
  const void* state_in;  // [sequences, taps - 1, channels]: the inputs before the first token, oldest first
  void* state_out;       // the same after the last token, elsewhere
  void* y;               // [tokens, channels]
  int64_t channels, taps;
  Format format;         // of everything: f32 or bf16
  Spans sequences;
  int threads;
};

#define FOVEAL_DECLARE(isa)            \
  namespace isa {                      \
  void causal_conv(const CausalConv&); \
  }
FOVEAL_FOR_EACH_ISA(FOVEAL_DECLARE)
#undef FOVEAL_DECLARE

}  // namespace foveal
