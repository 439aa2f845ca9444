#include "kernels/sparse.h"

#include "bindings/selection.h"
#include "bindings/sequences.h"

namespace foveal {

void bind_sparse(nb::module_& module, Isa isa) {
  module.def(
      "sparse_attention",
      [run = FOVEAL_PICK(isa, sparse_attention)](
          Address q, Address keys, Address values, Address out, int format, int64_t rows, int64_t heads, int64_t groups,
          int64_t width, int64_t value_width, float scale, int64_t count, Address queries, Address contexts,
          Address table, int64_t table_stride, Address selection, int64_t topk, int threads) {
        const Sequences sequences = sequences_at(count, queries, contexts, table, table_stride);
        const int32_t* chosen = reading<int32_t>(selection);
        check(sequences, rows);
        check_selection(sequences, chosen, topk);
        run({reading<void>(q), reading<void>(keys), reading<void>(values), writing<void>(out),
             static_cast<Format>(format), heads, groups, width, value_width, scale, sequences, chosen, topk, threads});
      },
      GilReleased());
}

}  // namespace foveal
