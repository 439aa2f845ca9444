#include "kernels/block.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <utility>
#include <variant>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/sequences.h"

namespace foveal {
namespace {

using AnyBlock = std::variant<GqaBlock, MlpBlock>;

// Blocks that follow one another.
struct Blocks {
  std::vector<AnyBlock> all;
};

// (values, scales, lows, outputs, inputs, group, coding, bias): foveal/kernels/cpu/block.py, `_layer`.
using LayerArguments = std::tuple<Address, Address, Address, int64_t, int64_t, int, int, Address>;
// (weight, hidden, epsilon, format)
using NormArguments = std::tuple<Address, int64_t, float, int>;

Layer layer_at(const LayerArguments& arguments) {
  const auto [values, scales, lows, outputs, inputs, group, coding, bias] = arguments;
  return {{reading<void>(values), reading<void>(scales), reading<void>(lows), outputs, inputs, group,
           static_cast<Coding>(coding)},
          reading<void>(bias)};
}

BlockNorm norm_at(const NormArguments& arguments) {
  const auto [weight, hidden, epsilon, format] = arguments;
  return {reading<void>(weight), hidden, epsilon, static_cast<Format>(format)};
}

void check_rows(const int64_t* rows, int64_t tokens, int64_t cache_rows) {
  for (int64_t t = 0; t < tokens; ++t)
    if (rows[t] < 0 || rows[t] >= cache_rows)
      throw nb::value_error(("token " + std::to_string(t) + " goes to row " + std::to_string(rows[t]) +
                             " of a cache of " + std::to_string(cache_rows))
                                .c_str());
}

}  // namespace

void bind_block_types(nb::module_& module) {
  nb::class_<Blocks>(module, "Blocks").def("__init__", [](Blocks* self, std::vector<AnyBlock> all) {
    new (self) Blocks{std::move(all)};
  });
  nb::class_<GqaBlock>(module, "GqaBlock")
      .def("__init__", [](GqaBlock* self, NormArguments norm, LayerArguments qkv, LayerArguments out,
                          std::array<Address, 2> head_norms, std::array<int, 3> heads, int64_t pairs, bool interleaved,
                          float scale, int64_t window) {
        new (self) GqaBlock{norm_at(norm), layer_at(qkv), layer_at(out), reading<void>(head_norms[0]),
                            reading<void>(head_norms[1]), heads[0], heads[1], heads[2], pairs, interleaved, scale, window};
      });
  nb::class_<MlpBlock>(module, "MlpBlock")
      .def("__init__", [](MlpBlock* self, NormArguments norm, LayerArguments gate_up, LayerArguments down,
                          int activation) {
        new (self) MlpBlock{norm_at(norm), layer_at(gate_up), layer_at(down), static_cast<Activation>(activation)};
      });
}

void bind_block(nb::module_& module, Isa isa) {
  module.attr("GqaBlock") = nb::type<GqaBlock>();
  module.attr("MlpBlock") = nb::type<MlpBlock>();
  module.attr("Blocks") = nb::type<Blocks>();
  // For each attention block its turns and its cache: keys and values, of cache_rows rows.
  module.def(
      "run_blocks",
      [gqa = FOVEAL_PICK(isa, gqa_block), mlp = FOVEAL_PICK(isa, mlp_block)](
          const Blocks& blocks, Address x, Address out, int64_t tokens, const std::vector<Address>& turns, Address rows,
          const std::vector<std::pair<Address, Address>>& caches, int64_t cache_rows,
          std::tuple<int64_t, Address, Address, Address, int64_t> sequences_arguments, int threads) {
        const Sequences sequences = std::apply(sequences_at, sequences_arguments);
        if (!caches.empty()) {  // otherwise no block reads or writes any row
          check(sequences, cache_rows);
          check_rows(reading<int64_t>(rows), tokens, cache_rows);
        }
        size_t cached = 0;
        for (const auto& block : blocks.all) {
          const BlockStep step{reading<void>(x), writing<void>(out), tokens, threads};
          if (const GqaBlock* attention = std::get_if<GqaBlock>(&block)) {
            const auto [keys, values] = caches.at(cached);
            gqa(*attention, step, {reading<float>(turns.at(cached)), reading<int64_t>(rows), writing<void>(keys),
                                   writing<void>(values), sequences});
            ++cached;
          } else {
            mlp(std::get<MlpBlock>(block), step);
          }
          x = out;  // the others work in place
        }
      },
      GilReleased());
}

}  // namespace foveal
