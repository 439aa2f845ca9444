// Rows of numbers rounded to eight bits with scales: index queries and keys, and the fp8 latent record.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/numbers.h"

namespace foveal {

// Hadamard-turns rows and rounds each to eight bits with one scale.
struct QuantiseIndex {
  const void* x;           // [rows, size], stride x_stride numbers
  int64_t x_stride;
  Format x_format;         // f32 or bf16
  Format format;           // e4m3 or int8
  int64_t rows, size;      // size: a power of two up to MOST_INDEX_NUMBERS
  const int64_t* places;   // [rows]: where they go in pages of 64; null: to values and scales, in order
  uint8_t* values;         // [rows, size], or the pages
  float* scales;           // [rows]; not used with places
  int64_t page_stride;     // bytes
  int threads;
};
constexpr int64_t MOST_INDEX_NUMBERS = 1024;

// The fp8 latent record: `rank` e4m3, a scale for each 128 of them, `rope` bf16.
struct WriteLatents {
  const void* x;           // [rows, rank + rope], stride x_stride numbers
  int64_t x_stride;
  Format x_format;         // f32 or bf16
  int64_t rows, rank, rope;
  const int64_t* places;   // [rows]: the record of each
  uint8_t* records;
  int64_t record_bytes;
  int threads;
};

#define FOVEAL_DECLARE(isa)                   \
  namespace isa {                             \
  void quantise_index(const QuantiseIndex&);  \
  void write_latents(const WriteLatents&);    \
  }
FOVEAL_FOR_EACH_ISA(FOVEAL_DECLARE)
#undef FOVEAL_DECLARE

}  // namespace foveal
