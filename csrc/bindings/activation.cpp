#include "kernels/activation.h"

#include "bindings/bindings.h"

namespace foveal {

void bind_activation(nb::module_& module, Isa isa) {
  module.def(
      "gated",
      [run = FOVEAL_PICK(isa, gated)](Address x, int64_t x_stride, Address out, int64_t rows, int64_t size,
                                      int activation, int format, int threads) {
        run({reading<void>(x), x_stride, writing<void>(out), rows, size, static_cast<Activation>(activation),
             static_cast<Format>(format), threads});
      },
      GilReleased());
}

}  // namespace foveal
