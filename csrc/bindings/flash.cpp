#include "kernels/flash.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/tuple.h>

#include "bindings/bindings.h"
#include "bindings/sequences.h"

namespace foveal {
namespace {

// Throws ValueError in Python unless every row of the selection holds ascending positions of its sequence, then -1.
void check_selection(const int32_t* selection, int64_t topk, const Sequences& sequences) {
  for (int64_t s = 0; s < sequences.count; ++s)
    for (int64_t row = sequences.query_offsets[s]; row < sequences.query_offsets[s + 1]; ++row) {
      int64_t last = -1;
      bool ended = false;
      for (int64_t i = 0; i < topk; ++i) {
        const int64_t position = selection[row * topk + i];
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

}  // namespace

void bind_flash(nb::module_& module, Isa isa) {
  module.def(
      "flash",
      [run = FOVEAL_PICK(isa, flash)](
          std::array<int64_t, 3> q, std::array<int64_t, 3> k, std::array<int64_t, 3> v, Address out, Address lse,
          std::tuple<int64_t, Address, Address, Address, int64_t> sequences_arguments, int64_t key_rows,
          std::array<int, 4> sizes, float scale, bool causal, int64_t window, int64_t sinks, Address selection,
          int64_t topk, int format, int threads) {
        const Sequences sequences = std::apply(sequences_at, sequences_arguments);
        check(sequences, key_rows);
        if (selection) check_selection(reading<int32_t>(selection), topk, sequences);
        run({reading<void>(q[0]), q[1], q[2], reading<void>(k[0]), k[1], k[2], reading<void>(v[0]), v[1], v[2],
             writing<void>(out), writing<float>(lse), sequences, sizes[0], sizes[1], sizes[2], sizes[3], scale, causal,
             window, sinks, reading<int32_t>(selection), topk, static_cast<Format>(format), threads});
      },
      GilReleased());
}

}  // namespace foveal
