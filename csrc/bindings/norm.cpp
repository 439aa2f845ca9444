#include "kernels/norm.h"

#include "bindings/bindings.h"

namespace foveal {

void bind_norm(nb::module_& module, Isa isa) {
  module.def(
      "rms_norm",
      [run = FOVEAL_PICK(isa, rms_norm)](Address x, int64_t x_stride, Address residual, Address sum, Address weight,
                                         Address out, int64_t rows, int64_t size, float epsilon, int format, int threads) {
        run({reading<void>(x), x_stride, reading<void>(residual), writing<void>(sum), reading<void>(weight),
             writing<void>(out), rows, size, epsilon, static_cast<Format>(format), threads});
      },
      GilReleased());
}

}  // namespace foveal
