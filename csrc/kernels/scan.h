// Selective state spaces, token by token: h = exp(dt A) h + dt u B^T, y = h C, with a state of its own for each channel.
//
// Mamba-1 has dt for each channel and A for each number of the state; Mamba-2 (SSD) has both for each head.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/tokens.h"

namespace foveal {

// The states before a sequence's tokens 0, chunk, 2 chunk, ...; nothing is kept where there is no memory for it.
template <class Number>
struct Checkpoints {
  Number* states;  // [tokens / chunk + sequences, heads * channels, states], or null
  int64_t chunk;

  // The row of a token of a sequence that begins at token `begin`: no two are the same.
  int64_t row(int64_t sequence, int64_t begin, int64_t token) const {
    return begin / chunk + sequence + (token - begin) / chunk;
  }
};

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
  Checkpoints<float> checkpoints = {nullptr, 1};  // for a backward pass
};

// Gradients (d_...) of a Mamba-1 scan.
struct ScanGradient {
  PerToken<float> u, dt, b, c;  // as in Scan
  const float *a, *d_y, *d_state_out;
  Checkpoints<const float> checkpoints;
  float *d_u, *d_dt;            // [tokens, channels]
  float *d_b, *d_c;             // [blocks of channels, tokens, states]: what each block adds
  float *d_a, *d_state_in;
  int64_t channels, states, block;  // block: channels that go through all tokens together
  Spans sequences;
  int threads;
};

#define FOVEAL_DECLARE(isa)                          \
  namespace isa {                                    \
  void selective_scan(const Scan&);                  \
  void selective_scan_gradient(const ScanGradient&); \
  void ssd(const Scan&);                             \
  }
FOVEAL_FOR_EACH_ISA(FOVEAL_DECLARE)
#undef FOVEAL_DECLARE

}  // namespace foveal
