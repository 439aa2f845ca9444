#include "kernels/latent.h"

#include "bindings/selection.h"
#include "bindings/sequences.h"

namespace foveal {

void bind_latent(nb::module_& module, Isa isa) {
  module.def(
      "latent_attention",
      [run = FOVEAL_PICK(isa, latent_attention)](
          Address q, Address out, int format, Address rows, int64_t row_bytes, int64_t row_count, int row_format,
          int64_t heads, int64_t width, int64_t rank, float scale, int64_t count, Address queries, Address contexts,
          Address table, int64_t table_stride, Address selection, int64_t topk, int threads) {
        const Sequences sequences = sequences_at(count, queries, contexts, table, table_stride);
        const int32_t* chosen = reading<int32_t>(selection);
        check(sequences, row_count);
        if (chosen) check_selection(sequences, chosen, topk);
        run({reading<void>(q), writing<void>(out), static_cast<Format>(format), reading<char>(rows), row_bytes,
             static_cast<Format>(row_format), heads, width, rank, scale, sequences, chosen, topk, threads});
      },
      GilReleased());
}

}  // namespace foveal
