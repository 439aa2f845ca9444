// Rounding to eight bits. A row fits into the first-level cache as floats: it is read once, turned there (a fast
// Walsh-Hadamard transform: log2(size) passes of sums and differences, within registers while they are closer than a
// register is wide), and written once, into the cache's page where that is what it is for.
//
// The order of every sum is that of foveal/kernels/quantise.py, so results are the same to the bit.
#include "kernels/quantise.h"

#include "common/eight_bits.h"
#include "common/parallel.h"
#include "common/sequences.h"

namespace foveal::FOVEAL_ISA {
namespace {

// Rows for one thread at a time; fewer are not worth waking a second thread.
constexpr int ROWS = 16;
constexpr int64_t BLOCK = 128;  // latent numbers that share a scale, as in foveal/config/formats.py
constexpr float E4M3_LIMIT = 448.0f, INT8_LIMIT = 127.0f, SMALLEST_AMAX = 1e-4f;

// Zeros fill up the last register.
template <class Number>
FOVEAL_INLINE void read_row(const Number* x, int64_t size, float* row) {
  int64_t i = 0;
  for (; i + F32::width <= size; i += F32::width) store(row + i, load(x + i));
  if (i < size) store(row + i, load_partial(x + i, static_cast<int>(size - i)));
}

// Numbers of distance d < width, side by side in one register: their sum and their difference.
template <int d>
FOVEAL_INLINE F32 turn_within(F32 x) {
  alignas(64) float signs[F32::width];
  for (int i = 0; i < F32::width; ++i) signs[i] = i & d ? -1.0f : 1.0f;
  return fma(x, load(signs), swap_lanes<d>(x));
}

// Lanes past the end of the row stay zero, or are no longer looked at.
void hadamard(float* row, int64_t size) {
  for (int64_t i = 0; i < size; i += F32::width) {
    F32 x = load(row + i);
    if (size > 1) x = turn_within<1>(x);
    if (size > 2) x = turn_within<2>(x);
    if (size > 4) x = turn_within<4>(x);
    if constexpr (F32::width > 8)
      if (size > 8) x = turn_within<8>(x);
    store(row + i, x);
  }
  for (int64_t d = F32::width; d < size; d *= 2)
    for (int64_t start = 0; start < size; start += 2 * d)
      for (int64_t i = start; i < start + d; i += F32::width) {
        const F32 a = load(row + i), b = load(row + i + d);
        store(row + i, a + b);
        store(row + i + d, a - b);
      }
  const F32 scale = set1(static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(size))));
  for (int64_t i = 0; i < size; i += F32::width) store(row + i, load(row + i) * scale);
}

float largest(const float* row, int64_t size) {
  F32 most = zero();
  for (int64_t i = 0; i < size; i += F32::width) most = max(absolute(load(row + i)), most);
  const float amax = maximum(most);
  return amax > SMALLEST_AMAX ? amax : SMALLEST_AMAX;
}

// The smallest power of two s with amax / s <= 448.
float power_of_two_scale(float amax) {
  const float ratio = amax / E4M3_LIMIT;
  uint32_t bits;
  std::memcpy(&bits, &ratio, 4);
  bits = (bits + 0x7fffff) & 0x7f800000;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return scale;
}

template <class Number>
FOVEAL_INLINE void write_row(const float* row, int64_t size, float scale, float limit, Number* out) {
  const F32 divisor = set1(scale), most = set1(limit), least = set1(-limit);
  int64_t i = 0;
  for (; i + F32::width <= size; i += F32::width) store_as(out + i, min(max(load(row + i) / divisor, least), most));
  if (i < size)
    store_as_partial(out + i, min(max(load(row + i) / divisor, least), most), static_cast<int>(size - i));
}

// Returns the scale.
float write_e4m3(const float* row, int64_t size, uint8_t* out) {
  const float scale = power_of_two_scale(largest(row, size));
  write_row(row, size, scale, E4M3_LIMIT, reinterpret_cast<e4m3*>(out));
  return scale;
}

float write_int8(const float* row, int64_t size, uint8_t* out) {
  const float scale = largest(row, size) / INT8_LIMIT;
  write_row(row, size, scale, INT8_LIMIT, reinterpret_cast<int8_t*>(out));
  return scale;
}

template <class Body>
void for_rows(int threads, int64_t rows, Body body) {
  auto some = [&](int item, int) {
    const int64_t start = static_cast<int64_t>(item) * ROWS, stop = start + ROWS < rows ? start + ROWS : rows;
    for (int64_t row = start; row < stop; ++row) body(row);
  };
  parallel(threads, static_cast<int>((rows + ROWS - 1) / ROWS), some);
}

template <class Number>
void quantise_rows(const QuantiseIndex& q) {
  for_rows(q.threads, q.rows, [&](int64_t t) {
    alignas(64) float row[MOST_INDEX_NUMBERS];
    read_row(static_cast<const Number*>(q.x) + t * q.x_stride, q.size, row);
    hadamard(row, q.size);
    uint8_t* page = q.places ? q.values + q.places[t] / PAGE_SIZE * q.page_stride : q.values + t * q.size;
    uint8_t* values = q.places ? page + q.places[t] % PAGE_SIZE * q.size : page;
    const float scale = q.format == Format::e4m3 ? write_e4m3(row, q.size, values) : write_int8(row, q.size, values);
    uint8_t* scale_place = q.places ? page + PAGE_SIZE * q.size + q.places[t] % PAGE_SIZE * 4
                                    : reinterpret_cast<uint8_t*>(q.scales + t);
    std::memcpy(scale_place, &scale, 4);
  });
}

template <class Number>
void write_records(const WriteLatents& w) {
  const int64_t blocks = (w.rank + BLOCK - 1) / BLOCK;
  for_rows(w.threads, w.rows, [&](int64_t t) {
    const Number* x = static_cast<const Number*>(w.x) + t * w.x_stride;
    uint8_t* record = w.records + w.places[t] * w.record_bytes;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t size = w.rank - b * BLOCK < BLOCK ? w.rank - b * BLOCK : BLOCK;
      alignas(64) float row[BLOCK];
      read_row(x + b * BLOCK, size, row);
      const float scale = write_e4m3(row, size, record + b * BLOCK);
      std::memcpy(record + w.rank + 4 * b, &scale, 4);
    }
    bf16* rope = reinterpret_cast<bf16*>(record + w.rank + 4 * blocks);
    for (int64_t i = 0; i < w.rope; i += F32::width) {
      const int n = static_cast<int>(w.rope - i < F32::width ? w.rope - i : F32::width);
      store_partial(rope + i, load_partial(x + w.rank + i, n), n);
    }
  });
}

}  // namespace

void quantise_index(const QuantiseIndex& q) {
  q.x_format == Format::f32 ? quantise_rows<float>(q) : quantise_rows<bf16>(q);
}

void write_latents(const WriteLatents& w) {
  w.x_format == Format::f32 ? write_records<float>(w) : write_records<bf16>(w);
}

}  // namespace foveal::FOVEAL_ISA
