#include "kernels/quantise.h"

#include <string>

#include "bindings/bindings.h"
#include "common/sequences.h"

namespace foveal {
namespace {

void check_places(const int64_t* places, int64_t count, int64_t rows) {
  for (int64_t t = 0; t < count; ++t)
    if (places[t] < 0 || places[t] >= rows) {
      const std::string message =
          "row " + std::to_string(places[t]) + " is not one of the cache's " + std::to_string(rows);
      throw nb::value_error(message.c_str());
    }
}

}  // namespace

void bind_quantise(nb::module_& module, Isa isa) {
  module.def(
      "quantise_index",
      [run = FOVEAL_PICK(isa, quantise_index)](Address x, int64_t x_stride, int x_format, int format, int64_t rows,
                                               int64_t size, Address values, Address scales, int threads) {
        run({reading<void>(x), x_stride, static_cast<Format>(x_format), static_cast<Format>(format), rows, size, nullptr,
             writing<uint8_t>(values), writing<float>(scales), 0, threads});
      },
      GilReleased());
  module.def(
      "write_index_keys",
      [run = FOVEAL_PICK(isa, quantise_index)](Address x, int64_t x_stride, int x_format, int format, int64_t rows,
                                               int64_t size, Address places, Address pages, int64_t page_count,
                                               int64_t page_stride, int threads) {
        check_places(reading<int64_t>(places), rows, page_count * PAGE_SIZE);
        run({reading<void>(x), x_stride, static_cast<Format>(x_format), static_cast<Format>(format), rows, size,
             reading<int64_t>(places), writing<uint8_t>(pages), nullptr, page_stride, threads});
      },
      GilReleased());
  module.def(
      "write_latents",
      [run = FOVEAL_PICK(isa, write_latents)](Address x, int64_t x_stride, int x_format, int64_t rows, int64_t rank,
                                              int64_t rope, Address places, Address records, int64_t record_count,
                                              int64_t record_bytes, int threads) {
        check_places(reading<int64_t>(places), rows, record_count);
        run({reading<void>(x), x_stride, static_cast<Format>(x_format), rows, rank, rope, reading<int64_t>(places),
             writing<uint8_t>(records), record_bytes, threads});
      },
      GilReleased());
}

}  // namespace foveal
