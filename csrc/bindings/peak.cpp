#include "kernels/peak.h"

#include "bindings/bindings.h"

namespace foveal {

void bind_peak(nb::module_& module, Isa isa) {
  module.def(
      "multiply_registers",
      [run = FOVEAL_PICK(isa, multiply_registers)](int format, int64_t rounds) {
        return run(static_cast<Format>(format), rounds);
      },
      GilReleased());
}

}  // namespace foveal
