// Matrix products with weights: x W^T + b, for weights in f32, bf16, int8 and int4.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/numbers.h"

namespace foveal {

// What weights are stored as; the order is that of CODINGS in foveal/kernels/cpu/linear.py.
enum class Coding : int { f32, bf16, int8, int4 };

// W [outputs, inputs], row-major without gaps.
struct Weight {
  const void* values;  // int4: [outputs, inputs / 2], byte j of 16 holds inputs j (low bits) and j + 16 of 32
  const void* scales;  // int8: float [outputs], W = scale value; int4: bf16 [outputs, inputs / group]
  const void* lows;    // int4: bf16 [outputs, inputs / group], W = scale value + low for values 0 to 15
  int64_t outputs, inputs;
  int group;           // int4: inputs that share a scale: 32, 64 or 128; divides inputs
  Coding coding;
};

struct Linear {
  const void* x;       // [rows, inputs], stride x_stride numbers
  int64_t x_stride;
  Weight weight;       // f32 and bf16 weights: of x's format
  const void* bias;    // [outputs] or null, of x's format
  void* out;           // [rows, outputs], of x's format
  int64_t rows;
  Format format;       // f32 or bf16
  int threads;
  int64_t out_stride = 0;  // numbers from one row of out to the next; 0: outputs
  bool wide = false;       // out is float32, whatever the format
};

#define FOVEAL_DECLARE(isa) \
  namespace isa {           \
  void linear(const Linear&); \
  }
FOVEAL_FOR_EACH_ISA(FOVEAL_DECLARE)
#undef FOVEAL_DECLARE

}  // namespace foveal
