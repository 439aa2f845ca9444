#include "kernels/block.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <utility>
#include <variant>
#include <vector>

#include "bindings/selection.h"
#include "bindings/weights.h"

namespace foveal {
namespace {

using AnyBlock = std::variant<GqaBlock, MlaBlock, MambaBlock, Mamba2Block, DeltaBlock, MlpBlock, MoeBlock>;

// Blocks that follow one another.
struct Blocks {
  std::vector<AnyBlock> all;
};

// (values, scales, lows, outputs, inputs, group, coding, bias): foveal/kernels/cpu/blocks.py, `_layer_arguments`.
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

// (queries, keys, weights, norm's weight and bias, epsilon, heads, size, pairs, interleaved, scale, topk)
using IndexerArguments = std::tuple<LayerArguments, LayerArguments, LayerArguments, Address, Address, float, int, int64_t,
                                    int64_t, bool, float, int64_t>;

BlockIndexer indexer_at(const IndexerArguments& arguments) {
  const auto& [queries, keys, weights, norm, bias, epsilon, heads, size, pairs, interleaved, scale, topk] = arguments;
  return {layer_at(queries), layer_at(keys), layer_at(weights), reading<float>(norm), reading<float>(bias), epsilon, heads,
          size, pairs, interleaved, scale, topk};
}

// (weight, bias, sigmoid, normalise, scale, groups, kept groups, top two, masked score)
using RouterArguments = std::tuple<WeightArguments, Address, bool, bool, float, int, int, bool, float>;

Router router_at(const RouterArguments& arguments) {
  const auto& [weight, bias, sigmoid, normalise, scale, groups, kept, top_two, masked] = arguments;
  return {weight_at(weight), reading<float>(bias), sigmoid, normalise, scale, groups, kept, top_two, masked};
}

// Of each part where it begins, its stride in bytes and its format: foveal/kernels/cpu/block_parts.py, `CachedRows`.
using CachedArguments = std::array<std::tuple<Address, int64_t, int>, 3>;

CachedRows rows_at(const std::tuple<Address, int64_t, int>& arguments) {
  const auto [data, stride, format] = arguments;
  return {writing<char>(data), stride, static_cast<Format>(format)};
}

CachedStep cached_at(const CachedArguments& arguments, const std::pair<Address, Address>& turns, const int64_t* rows,
                     const Sequences& sequences, Selection& selection) {
  return {reading<float>(turns.first), reading<float>(turns.second), rows, rows_at(arguments[0]),
          rows_at(arguments[1]), rows_at(arguments[2]), sequences, &selection};
}

// (taps, weight, bias)
using ConvArguments = std::tuple<int64_t, Address, Address>;

BlockConv conv_at(const ConvArguments& arguments) {
  const auto [taps, weight, bias] = arguments;
  return {reading<void>(weight), reading<void>(bias), taps};
}

// Slots that states come from and go to, and whether they are fresh: int64 [3, sequences]; how many slots there are.
using SlotArguments = std::tuple<Address, int64_t>;

void check_slots(const int64_t* slots, const int64_t* offsets, int64_t sequences, int64_t count) {
  for (int64_t s = 0; s < sequences; ++s)
    if (offsets[s] > offsets[s + 1]) throw nb::value_error(("sequence " + std::to_string(s) + " ends before it begins").c_str());
  for (int64_t s = 0; s < 2 * sequences; ++s)
    if (slots[s] < 0 || slots[s] >= count)
      throw nb::value_error(("sequence " + std::to_string(s % sequences) + " names slot " + std::to_string(slots[s]) +
                             " of " + std::to_string(count))
                                .c_str());
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
                          float scale, int64_t window, bool sparse, IndexerArguments indexer) {
        new (self) GqaBlock{norm_at(norm), layer_at(qkv), layer_at(out), reading<void>(head_norms[0]),
                            reading<void>(head_norms[1]), heads[0], heads[1], heads[2], pairs, interleaved, scale, window,
                            sparse, indexer_at(indexer)};
      });
  nb::class_<MlaBlock>(module, "MlaBlock")
      .def("__init__", [](MlaBlock* self, NormArguments norm, std::array<LayerArguments, 4> q_a_q_kv_a_out,
                          std::array<Address, 3> q_a_norm_kv_a_norm_up, float latent_epsilon, int heads,
                          std::array<int64_t, 4> nope_rope_value_rank, bool turned, bool interleaved, float scale, bool sparse,
                          IndexerArguments indexer) {
        const auto& [q_a, q, kv_a, out] = q_a_q_kv_a_out;
        const auto [q_a_norm, kv_a_norm, up] = q_a_norm_kv_a_norm_up;
        const auto [nope, rope, value, rank] = nope_rope_value_rank;
        new (self) MlaBlock{norm_at(norm), layer_at(q_a), reading<void>(q_a_norm), layer_at(q), layer_at(kv_a),
                            reading<void>(kv_a_norm), reading<void>(up), layer_at(out), latent_epsilon, heads, nope, rope,
                            value, rank, turned, interleaved, scale, sparse, indexer_at(indexer)};
      });
  nb::class_<MambaBlock>(module, "MambaBlock")
      .def("__init__", [](MambaBlock* self, NormArguments norm, std::array<LayerArguments, 4> in_x_dt_out,
                          ConvArguments conv, std::array<Address, 2> a_d, std::array<Address, 3> dt_b_c_norms,
                          std::array<int64_t, 3> inner_state_rank) {
        const auto& [in, x, dt, out] = in_x_dt_out;
        const auto [dt_norm, b_norm, c_norm] = dt_b_c_norms;
        const auto [inner, state, rank] = inner_state_rank;
        new (self) MambaBlock{norm_at(norm), layer_at(in), layer_at(x), layer_at(dt), layer_at(out), conv_at(conv),
                              reading<float>(a_d[0]), reading<float>(a_d[1]), reading<void>(dt_norm), reading<void>(b_norm),
                              reading<void>(c_norm), inner, state, rank};
      });
  nb::class_<Mamba2Block>(module, "Mamba2Block")
      .def("__init__", [](Mamba2Block* self, NormArguments norm, LayerArguments in, LayerArguments out, ConvArguments conv,
                          std::array<Address, 3> a_d_bias, std::array<float, 2> dt_limits, Address out_norm,
                          std::array<int64_t, 4> heads_dim_state_groups) {
        const auto [a, d, bias] = a_d_bias;
        const auto [heads, dim, state, groups] = heads_dim_state_groups;
        new (self) Mamba2Block{norm_at(norm), layer_at(in), layer_at(out), conv_at(conv), reading<float>(a),
                               reading<float>(d), reading<float>(bias), dt_limits[0], dt_limits[1], reading<void>(out_norm),
                               heads, dim, state, groups};
      });
  nb::class_<DeltaBlock>(module, "DeltaBlock")
      .def("__init__", [](DeltaBlock* self, NormArguments norm, std::array<LayerArguments, 7> in_ba_f_a_f_b_g_a_g_b_out,
                          ConvArguments conv, std::array<Address, 3> a_bias_norm,
                          std::array<int64_t, 4> heads_groups_keys_values) {
        const auto& [in, ba, f_a, f_b, g_a, g_b, out] = in_ba_f_a_f_b_g_a_g_b_out;
        const auto [a, bias, out_norm] = a_bias_norm;
        const auto [heads, groups, keys, values] = heads_groups_keys_values;
        new (self) DeltaBlock{norm_at(norm), layer_at(in), layer_at(ba), layer_at(f_a), layer_at(f_b), layer_at(g_a),
                              layer_at(g_b), layer_at(out), conv_at(conv), reading<float>(a), reading<float>(bias),
                              reading<void>(out_norm), heads, groups, keys, values};
      });
  nb::class_<MlpBlock>(module, "MlpBlock")
      .def("__init__", [](MlpBlock* self, NormArguments norm, LayerArguments gate_up, LayerArguments down,
                          int activation) {
        new (self) MlpBlock{norm_at(norm), layer_at(gate_up), layer_at(down), static_cast<Activation>(activation)};
      });
  nb::class_<MoeBlock>(module, "MoeBlock")
      .def("__init__", [](MoeBlock* self, NormArguments norm, RouterArguments router, WeightArguments gate_up,
                          WeightArguments down, int64_t experts, int64_t per_token,
                          std::array<LayerArguments, 3> shared) {
        const auto& [shared_gate_up, shared_down, shared_gate] = shared;
        new (self) MoeBlock{norm_at(norm), router_at(router), weight_at(gate_up), weight_at(down), experts, per_token,
                            layer_at(shared_gate_up), layer_at(shared_down), layer_at(shared_gate)};
      });
}

void bind_block(nb::module_& module, Isa isa) {
  module.attr("GqaBlock") = nb::type<GqaBlock>();
  module.attr("MlaBlock") = nb::type<MlaBlock>();
  module.attr("MambaBlock") = nb::type<MambaBlock>();
  module.attr("Mamba2Block") = nb::type<Mamba2Block>();
  module.attr("DeltaBlock") = nb::type<DeltaBlock>();
  module.attr("MlpBlock") = nb::type<MlpBlock>();
  module.attr("MoeBlock") = nb::type<MoeBlock>();
  module.attr("Blocks") = nb::type<Blocks>();
  // caches: of each mixer in order, of cache_rows rows or as many slots as `slots` says. turns: of each mixer, its own and its
  // indexer's. selection: of earlier blocks, numbers a token, and room for as many as any indexer of these selects. Returns the
  // numbers a token at the end.
  module.def(
      "run_blocks",
      [gqa = FOVEAL_PICK(isa, gqa_block), mla = FOVEAL_PICK(isa, mla_block), mamba = FOVEAL_PICK(isa, mamba_block),
       mamba2 = FOVEAL_PICK(isa, mamba2_block), delta = FOVEAL_PICK(isa, delta_block), kda = FOVEAL_PICK(isa, kda_block), mlp = FOVEAL_PICK(isa, mlp_block), moe = FOVEAL_PICK(isa, moe_block)](
          const Blocks& blocks, Address x, Address out, int64_t tokens,
          const std::vector<std::pair<Address, Address>>& turns, Address rows, const std::vector<CachedArguments>& caches,
          int64_t cache_rows, SlotArguments slot_arguments,
          std::tuple<int64_t, Address, Address, Address, int64_t> sequences_arguments,
          std::tuple<Address, int64_t, Address> selection_arguments, int threads) {
        const Sequences sequences = std::apply(sequences_at, sequences_arguments);
        const int64_t* places = reading<int64_t>(rows);
        const auto [selected, topk, room] = selection_arguments;
        Selection selection{reading<int32_t>(selected), topk, writing<int32_t>(room)};
        if (cache_rows >= 0) {  // otherwise no block reads or writes any row
          check(sequences, cache_rows);
          check_rows(places, tokens, cache_rows);
          if (topk) check_selection(sequences, selection.places, topk);
        }
        const int64_t* slots = reading<int64_t>(std::get<0>(slot_arguments));
        if (slots) check_slots(slots, sequences.query_offsets, sequences.count, std::get<1>(slot_arguments));
        size_t cached = 0;
        auto keys = [&] {
          const size_t mixer = cached++;
          return cached_at(caches.at(mixer), turns.at(mixer), places, sequences, selection);
        };
        auto states = [&] {
          const CachedArguments& own = caches.at(cached++);
          const int64_t count = sequences.count;
          return StateStep{rows_at(own[0]), rows_at(own[1]), slots, slots + count, slots + 2 * count,
                           {count, sequences.query_offsets}};
        };
        for (const auto& block : blocks.all) {
          const BlockStep step{reading<void>(x), writing<void>(out), tokens, threads};
          if (const GqaBlock* grouped = std::get_if<GqaBlock>(&block))
            gqa(*grouped, step, keys());
          else if (const MlaBlock* latent = std::get_if<MlaBlock>(&block))
            mla(*latent, step, keys());
          else if (const MambaBlock* first = std::get_if<MambaBlock>(&block))
            mamba(*first, step, states());
          else if (const Mamba2Block* second = std::get_if<Mamba2Block>(&block))
            mamba2(*second, step, states());
          else if (const DeltaBlock* rule = std::get_if<DeltaBlock>(&block))
            (is_there(rule->f_a) ? kda : delta)(*rule, step, states());
          else if (const MoeBlock* mixture = std::get_if<MoeBlock>(&block))
            moe(*mixture, step);
          else
            mlp(std::get<MlpBlock>(block), step);
          x = out;  // the others work in place
        }
        return selection.topk;
      },
      GilReleased());
}

}  // namespace foveal
