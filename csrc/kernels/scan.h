// Selective state spaces, token by token: h = exp(dt A) h + dt u B^T, y = h C, with a state of its own for each channel.
//
// Mamba-1 has dt for each channel and A for each number of the state; Mamba-2 (SSD) has both for each head.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/tokens.h"

namespace foveal {

struct Scan {
  PerToken<float> u;       // [tokens, heads * channels]
  PerToken<float> dt;      // [tokens, heads * channels]; of SSD [tokens, heads]
  PerToken<float> b, c;    // [tokens, groups * states]; a group serves heads / groups heads that follow one another
  const float* a;          // [heads * channels, states]; of SSD [heads]
  const float* state_in;   // [sequences, heads * channels, states]
  float* state_out;        // the same, elsewhere
  float* y;                // [tokens, heads * channels]
  int64_t heads, channels, groups, states;  // channels: of a head; Mamba-1 has one head and one group
  Spans sequences;
  int threads;
};

#define FOVEAL_DECLARE(isa)         \
  namespace isa {                   \
  void selective_scan(const Scan&); \
  void ssd(const Scan&);            \
  }
FOVEAL_FOR_EACH_ISA(FOVEAL_DECLARE)
#undef FOVEAL_DECLARE

}  // namespace foveal
