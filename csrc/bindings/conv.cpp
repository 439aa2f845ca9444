#include "kernels/conv.h"

#include "bindings/tokens.h"

namespace foveal {

void bind_conv(nb::module_& module, Isa isa) {
  module.def(
      "causal_conv",
      [run = FOVEAL_PICK(isa, causal_conv)](Rows x, Address weight, Address bias, Address state_in, Address state_out,
                                            Address y, int64_t channels, int64_t taps, int format, int64_t count,
                                            Address offsets, int64_t tokens, int threads) {
        run({reading<void>(x[0]), x[1], reading<void>(weight), reading<void>(bias), reading<void>(state_in),
             writing<void>(state_out), writing<void>(y), channels, taps, static_cast<Format>(format),
             spans_at(count, offsets, tokens), threads});
      },
      GilReleased());
}

}  // namespace foveal
