#include "kernels/rope.h"

#include "bindings/bindings.h"

namespace foveal {

void bind_rope(nb::module_& module, Isa isa) {
  module.def(
      "rope",
      [run = FOVEAL_PICK(isa, rope)](Address x, int64_t x_token_stride, int64_t x_head_stride, Address out,
                                     int64_t out_token_stride, int64_t out_head_stride, Address turns, int64_t tokens,
                                     int64_t heads, int64_t size, int64_t pairs, bool interleaved, int format,
                                     int threads) {
        run({reading<void>(x), x_token_stride, x_head_stride, writing<void>(out), out_token_stride, out_head_stride,
             reading<float>(turns), tokens, heads, size, pairs, interleaved, static_cast<Format>(format), threads});
      },
      GilReleased());
}

}  // namespace foveal
