// Number formats as they lie in memory.
#pragma once

#include <cstdint>

namespace foveal {

struct bf16 {
  uint16_t bits;
};

struct e4m3 {
  uint8_t bits;
};

// Names of formats in arguments; the order is that of FORMATS in foveal/kernels/cpu/library.py.
enum class Format : int { f32, bf16, e4m3, int8 };

}  // namespace foveal
