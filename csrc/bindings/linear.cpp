#include "kernels/linear.h"

#include <nanobind/stl/tuple.h>

#include "bindings/weights.h"

namespace foveal {

void bind_linear(nb::module_& module, Isa isa) {
  module.def(
      "linear",
      [run = FOVEAL_PICK(isa, linear)](Address x, int64_t x_stride, WeightArguments weight, Address bias, Address out,
                                       int64_t rows, int format, int threads) {
        run({reading<void>(x), x_stride, weight_at(weight), reading<void>(bias), writing<void>(out), rows,
             static_cast<Format>(format), threads});
      },
      GilReleased());
}

}  // namespace foveal
