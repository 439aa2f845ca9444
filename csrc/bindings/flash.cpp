#include "kernels/flash.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/tuple.h>

#include <vector>

#include "bindings/bindings.h"
#include "bindings/sequences.h"

namespace foveal {
namespace {

// Throws ValueError in Python unless every row of the selection holds ascending positions of its sequence, then -1.
void check_selection(const Flash& flash) {
  const Sequences& sequences = flash.sequences;
  for (int64_t s = 0; s < sequences.count; ++s)
    for (int64_t row = sequences.query_offsets[s]; row < sequences.query_offsets[s + 1]; ++row) {
      int64_t last = -1;
      bool ended = false;
      for (int64_t i = 0; i < flash.topk; ++i) {
        const int64_t position = flash.selection[row * flash.topk + i];
        if (position == -1) {
          ended = true;
        } else if (ended || position <= last || position >= sequences.lengths[s]) {
          throw nb::value_error(("selection of query " + std::to_string(row) + " has " + std::to_string(position) +
                                 " at place " + std::to_string(i) + ": not ascending, or not one of " +
                                 std::to_string(sequences.lengths[s]) + " keys")
                                    .c_str());
        } else {
          last = position;
        }
      }
    }
}

using Strided = std::array<int64_t, 3>;  // the address of [X, Y, Z], and the strides of X and Y

Flash arguments_of(const Strided& q, const Strided& k, const Strided& v, Address out, const std::array<int, 4>& sizes,
                   float scale, int format, int threads) {
  Flash flash = {};
  flash.q = reading<void>(q[0]), flash.q_row = q[1], flash.q_head = q[2];
  flash.k = reading<void>(k[0]), flash.k_row = k[1], flash.k_head = k[2];
  flash.v = reading<void>(v[0]), flash.v_row = v[1], flash.v_head = v[2];
  flash.out = writing<void>(out);
  flash.heads = sizes[0], flash.groups = sizes[1], flash.key_dim = sizes[2], flash.value_dim = sizes[3];
  flash.scale = scale, flash.format = static_cast<Format>(format), flash.threads = threads;
  return flash;
}

// The sequences of a batch of equal lengths whose last query stands at the last key.
struct Batch {
  std::vector<int64_t> offsets, positions, lengths, starts;
  Batch(int64_t count, int64_t queries, int64_t keys)
      : offsets(count + 1), positions(count, keys - queries), lengths(count, keys), starts(count) {
    for (int64_t s = 0; s <= count; ++s) offsets[s] = s * queries;
    for (int64_t s = 0; s < count; ++s) starts[s] = s * keys;
  }
  Sequences sequences() const {
    const int64_t count = static_cast<int64_t>(lengths.size());
    return {count, offsets.data(), positions.data(), lengths.data(), starts.data(), nullptr, 0};
  }
};

}  // namespace

void bind_flash(nb::module_& module, Isa isa) {
  module.def(
      "attention",
      [run = FOVEAL_PICK(isa, flash)](
          Strided q, Strided k, Strided v, Address out, std::array<int, 4> sizes, float scale, int format, int threads,
          std::tuple<int64_t, Address, Address, Address, int64_t> sequences, int64_t key_rows, int64_t window,
          int64_t sinks, Address selection, int64_t topk) {
        Flash flash = arguments_of(q, k, v, out, sizes, scale, format, threads);
        flash.sequences = std::apply(sequences_at, sequences);
        check(flash.sequences, key_rows);
        flash.causal = true, flash.window = window, flash.sinks = sinks;
        flash.selection = reading<int32_t>(selection), flash.topk = topk;
        if (selection) check_selection(flash);
        run(flash);
      },
      GilReleased());
  module.def(
      "flash_attention",
      [run = FOVEAL_PICK(isa, flash)](
          Strided q, Strided k, Strided v, Address out, std::array<int, 4> sizes, float scale, int format, int threads,
          Address lse, std::array<int64_t, 3> lengths, bool causal, int64_t window, int64_t sinks) {
        Flash flash = arguments_of(q, k, v, out, sizes, scale, format, threads);
        const Batch batch(lengths[0], lengths[1], lengths[2]);
        flash.sequences = batch.sequences();
        flash.lse = writing<float>(lse), flash.causal = causal, flash.window = window, flash.sinks = sinks;
        run(flash);
      },
      GilReleased());
}

}  // namespace foveal
