#include "kernels/delta.h"

#include "bindings/tokens.h"

namespace foveal {
namespace {

using Run = void (*)(const LinearAttention&);

void bind(nb::module_& module, const char* name, Run run) {
  module.def(
      name,
      [run](Rows q, Rows k, Rows v, Rows decay, Rows beta, Address state_in, Address state_out, Address out,
            std::array<int64_t, 4> sizes, bool decay_by_key, int64_t count, Address offsets, int64_t tokens, int threads) {
        run({per_token<float>(q), per_token<float>(k), per_token<float>(v), per_token<float>(decay),
             per_token<float>(beta), reading<float>(state_in), writing<float>(state_out), writing<float>(out), sizes[0],
             sizes[1], sizes[2], sizes[3], decay_by_key, spans_at(count, offsets, tokens), threads});
      },
      GilReleased());
}

}  // namespace

void bind_delta(nb::module_& module, Isa isa) {
  bind(module, "linear_attention", FOVEAL_PICK(isa, linear_attention));
  bind(module, "delta_rule", FOVEAL_PICK(isa, delta_rule));
}

}  // namespace foveal
