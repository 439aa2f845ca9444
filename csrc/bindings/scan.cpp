#include "kernels/scan.h"

#include "bindings/tokens.h"

namespace foveal {
namespace {

using Run = void (*)(const Scan&);

void bind(nb::module_& module, const char* name, Run run) {
  module.def(
      name,
      [run](Rows u, Rows dt, Rows b, Rows c, Address a, Address state_in, Address state_out, Address y,
            std::array<int64_t, 4> sizes, int64_t count, Address offsets, int64_t tokens, int threads) {
        run({per_token<float>(u), per_token<float>(dt), per_token<float>(b), per_token<float>(c), reading<float>(a),
             reading<float>(state_in), writing<float>(state_out), writing<float>(y), sizes[0], sizes[1], sizes[2],
             sizes[3], spans_at(count, offsets, tokens), threads});
      },
      GilReleased());
}

}  // namespace

void bind_scan(nb::module_& module, Isa isa) {
  bind(module, "selective_scan", FOVEAL_PICK(isa, selective_scan));
  bind(module, "ssd", FOVEAL_PICK(isa, ssd));
}

}  // namespace foveal
