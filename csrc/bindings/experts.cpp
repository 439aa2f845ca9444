#include "kernels/experts.h"

#include <nanobind/stl/tuple.h>

#include <string>

#include "bindings/weights.h"

namespace foveal {

void bind_experts(nb::module_& module, Isa isa) {
  module.def("experts", [run = FOVEAL_PICK(isa, experts)](Address x, int64_t x_stride, Address weights, Address chosen,
                                                          WeightArguments gate_up, WeightArguments down, int64_t count,
                                                          Address out, int64_t tokens, int64_t per_token, int format,
                                                          int threads) {
    const int64_t* experts = reading<int64_t>(chosen);
    for (int64_t i = 0; i < tokens * per_token; ++i)
      if (experts[i] < 0 || experts[i] >= count) {
        const std::string message =
            "expert " + std::to_string(experts[i]) + " is chosen, but there are only " + std::to_string(count);
        throw nb::value_error(message.c_str());
      }
    nb::gil_scoped_release released;
    run({reading<void>(x), x_stride, reading<float>(weights), experts, weight_at(gate_up), weight_at(down), count,
         writing<void>(out), tokens, per_token, static_cast<Format>(format), threads});
  });
}

}  // namespace foveal
