// The gated activation between the two products of a feed-forward.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/numbers.h"

namespace foveal {

// The order is that of COMPILED in foveal/kernels/cpu/activation.py.
enum class Activation : int { silu, gelu_tanh, relu };

struct Gated {
  const void* x;  // [rows, 2 size], stride x_stride numbers: the gate, then what it gates
  int64_t x_stride;
  void* out;      // [rows, size]: activation(gate) * up
  int64_t rows, size;
  Activation activation;
  Format format;  // of both: f32 or bf16
  int threads;
};

#define FOVEAL_DECLARE(isa) \
  namespace isa {           \
  void gated(const Gated&); \
  }
FOVEAL_FOR_EACH_ISA(FOVEAL_DECLARE)
#undef FOVEAL_DECLARE

}  // namespace foveal
