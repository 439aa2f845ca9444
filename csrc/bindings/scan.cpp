#include "kernels/scan.h"

#include "bindings/tokens.h"

namespace foveal {
namespace {

using Run = void (*)(const Scan&);

void bind(nb::module_& module, const char* name, Run run) {
  module.def(
      name,
      [run](Rows u, Rows dt, Rows b, Rows c, Address a, Address state_in, Address state_out, Address y,
            std::array<int64_t, 4> sizes, int64_t count, Address offsets, int64_t tokens, int threads,
            Address checkpoints, int64_t chunk) {
        run({per_token<float>(u), per_token<float>(dt), per_token<float>(b), per_token<float>(c), reading<float>(a),
             reading<float>(state_in), writing<float>(state_out), writing<float>(y), sizes[0], sizes[1], sizes[2],
             sizes[3], spans_at(count, offsets, tokens), threads, {writing<float>(checkpoints), chunk}});
      },
      GilReleased());
}

// read: A, the checkpoints, the gradients of y and of the last states; written: those of u, dt, B, C, A and the first
// states; sizes: channels, states, channels of a block.
void bind_gradient(nb::module_& module, void (*run)(const ScanGradient&)) {
  module.def(
      "selective_scan_gradient",
      [run](Rows u, Rows dt, Rows b, Rows c, std::array<Address, 4> read, std::array<Address, 6> written,
            std::array<int64_t, 3> sizes, int64_t count, Address offsets, int64_t tokens, int threads, int64_t chunk) {
        run({per_token<float>(u), per_token<float>(dt), per_token<float>(b), per_token<float>(c),
             reading<float>(read[0]), reading<float>(read[2]), reading<float>(read[3]),
             {reading<float>(read[1]), chunk}, writing<float>(written[0]), writing<float>(written[1]),
             writing<float>(written[2]), writing<float>(written[3]), writing<float>(written[4]),
             writing<float>(written[5]), sizes[0], sizes[1], sizes[2], spans_at(count, offsets, tokens), threads});
      },
      GilReleased());
}

}  // namespace

void bind_scan(nb::module_& module, Isa isa) {
  bind(module, "selective_scan", FOVEAL_PICK(isa, selective_scan));
  bind_gradient(module, FOVEAL_PICK(isa, selective_scan_gradient));
  bind(module, "ssd", FOVEAL_PICK(isa, ssd));
}

}  // namespace foveal
