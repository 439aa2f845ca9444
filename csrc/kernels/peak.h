// How fast the machine multiplies, for benchmarks that report a share of it.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/numbers.h"

namespace foveal {

// Multiply-accumulates done by one thread in `rounds` rounds on registers only. format: f32, bf16 (where the instruction set
// has no product of bf16, that of floats).
#define FOVEAL_DECLARE(isa) \
  namespace isa {           \
  int64_t multiply_registers(Format format, int64_t rounds); \
  }
FOVEAL_FOR_EACH_ISA(FOVEAL_DECLARE)
#undef FOVEAL_DECLARE

}  // namespace foveal
