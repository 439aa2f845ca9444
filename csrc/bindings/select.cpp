#include "kernels/select.h"

#include "bindings/sequences.h"

namespace foveal {

void bind_select(nb::module_& module, Isa isa) {
  module.def(
      "select",
      [run = FOVEAL_PICK(isa, select)](Address queries, int query_format, Address weights, int64_t heads, int64_t size,
                                       Address keys, int key_format, int64_t key_stride, int64_t key_rows, int64_t count,
                                       Address packing, Address contexts, Address table, int64_t table_stride,
                                       int64_t topk, Address selection, int threads) {
        const Sequences sequences = sequences_at(count, packing, contexts, table, table_stride);
        check(sequences, key_rows);
        run({reading<uint8_t>(queries), static_cast<Format>(query_format), reading<float>(weights), heads, size,
             {reading<uint8_t>(keys), static_cast<Format>(key_format), key_stride}, sequences, topk,
             writing<int32_t>(selection), threads});
      },
      GilReleased());
}

}  // namespace foveal
