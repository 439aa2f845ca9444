// RMS norm of rows, with an optional sum before it.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/numbers.h"

namespace foveal {

struct RmsNorm {
  const void* x;        // [rows, size], stride x_stride numbers
  int64_t x_stride;
  const void* residual; // [rows, size] or null: added to x first
  void* sum;            // [rows, size]: x + residual, rounded to the format, which is what is normed; null without residual
  const void* weight;   // [size]
  void* out;            // [rows, size]
  int64_t rows, size;
  float epsilon;
  Format format;        // of everything: f32 or bf16
  int threads;
};

#define FOVEAL_DECLARE(isa) \
  namespace isa {           \
  void rms_norm(const RmsNorm&); \
  }
FOVEAL_FOR_EACH_ISA(FOVEAL_DECLARE)
#undef FOVEAL_DECLARE

}  // namespace foveal
