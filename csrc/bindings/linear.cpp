#include "kernels/linear.h"

#include "bindings/bindings.h"

namespace foveal {

void bind_linear(nb::module_& module, Isa isa) {
  module.def(
      "linear",
      [run = FOVEAL_PICK(isa, linear)](Address x, int64_t x_stride, Address values, Address scales, Address lows,
                                       int64_t outputs, int64_t inputs, int group, int coding, Address bias, Address out,
                                       int64_t rows, int format, int threads) {
        const Weight weight{reading<void>(values), reading<void>(scales), reading<void>(lows), outputs, inputs, group,
                            static_cast<Coding>(coding)};
        run({reading<void>(x), x_stride, weight, reading<void>(bias), writing<void>(out), rows, static_cast<Format>(format),
             threads});
      },
      GilReleased());
}

}  // namespace foveal
