// Experts. A token and one of its experts are a pair; pairs are sorted by expert, so that each chosen expert's weights are
// read once for all its tokens, and unchosen ones not at all. Three passes over items that threads take: gate and up with the
// activation, down, and each token's weighted sum, whose order is that of its experts whatever the number of threads. An
// item is a part of one expert's weights and its pairs' rows; its products stay in cache as floats.
#include "kernels/experts.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "kernels/linear_product.h"

namespace foveal::FOVEAL_ISA {
namespace {

constexpr int64_t PAIR_BYTES = 64 << 20;  // of the pairs' results: what a call computes at a time
constexpr int64_t ITEM_BYTES = 64 << 10;  // of weights
constexpr int64_t PACKED_BYTES = 256 << 10;
constexpr int64_t ITEM_PAIRS = 256;

struct Item {
  int64_t expert, pair, pairs, first, count;  // which rows of the sorted pairs meet which outputs
};

// Sorted pairs, and the expert of each.
struct Order {
  int64_t* starts;  // [experts + 1]
  int64_t* token;   // [pairs]: of the sorted pair
  int64_t* place;   // [pairs]: where pair (token, a) stands
};

inline void sort_pairs(const Experts& call, Order& order) {
  const int64_t pairs = call.tokens * call.per_token;
  for (int64_t e = 0; e <= call.count; ++e) order.starts[e] = 0;
  for (int64_t p = 0; p < pairs; ++p) ++order.starts[call.chosen[p] + 1];
  for (int64_t e = 0; e < call.count; ++e) order.starts[e + 1] += order.starts[e];
  for (int64_t p = 0; p < pairs; ++p) order.place[p] = order.starts[call.chosen[p]]++;
  for (int64_t e = call.count; e > 0; --e) order.starts[e] = order.starts[e - 1];
  order.starts[0] = 0;
  for (int64_t p = 0; p < pairs; ++p) order.token[order.place[p]] = p / call.per_token;
}

// Parts of `outputs` outputs of every chosen expert. Returns how many items there are; writes them unless `items` is null.
inline int64_t list_items(const Experts& call, const Order& order, int64_t outputs, int64_t part, Item* items) {
  int64_t n = 0;
  for (int64_t e = 0; e < call.count; ++e)
    for (int64_t pair = order.starts[e]; pair < order.starts[e + 1]; pair += ITEM_PAIRS) {
      const int64_t left = order.starts[e + 1] - pair, pairs = left < ITEM_PAIRS ? left : ITEM_PAIRS;
      for (int64_t first = 0; first < outputs; first += part, ++n)
        if (items) items[n] = {e, pair, pairs, first, first + part < outputs ? part : outputs - first};
    }
  return n;
}

// The weight of one expert among those that follow each other in memory.
inline Weight of_expert(const Weight& all, int64_t expert) {
  const int64_t rows = expert * all.outputs;
  Weight one = all;
  one.values = static_cast<const char*>(all.values) + rows * row_bytes(all);
  if (all.coding == Coding::int8) one.scales = static_cast<const float*>(all.scales) + rows;
  if (all.coding == Coding::int4) {
    one.scales = static_cast<const bf16*>(all.scales) + rows * (all.inputs / all.group);
    one.lows = static_cast<const bf16*>(all.lows) + rows * (all.inputs / all.group);
  }
  return one;
}

// Outputs of an item. Where activations are packed for each item, it has more of them.
inline int64_t part_of(const Experts& call, const Weight& weight, int64_t outputs) {
  const bool packed = by_fixed_tiles(weight, call.tokens * call.per_token / call.count);
  const int64_t least = (packed ? PACKED_BYTES : ITEM_BYTES) / (row_bytes(weight) + 1) + 1;
  return round_up(least < outputs ? least : outputs, 32);
}

// silu(gate) * up, to `hidden`.
template <class Number>
void activate(const float* gate, const float* up, Number* hidden, int64_t count) {
  for (int64_t i = 0; i < count; i += F32::width) {
    const F32 result = silu(load(gate + i)) * load(up + i);
    const int n = static_cast<int>(count - i);
    n >= F32::width ? store(hidden + i, result) : store_partial(hidden + i, result, n);
  }
}

template <class Number>
void add_outputs(const Experts& call, const Order& order, const float* results, int64_t token) {
  const int64_t size = call.down.outputs;
  Number* out = static_cast<Number*>(call.out) + token * size;
  for (int64_t i = 0; i < size; i += F32::width) {
    F32 total = zero();
    for (int64_t pair = token * call.per_token; pair < (token + 1) * call.per_token; ++pair)
      total = fma(set1(call.weights[pair]), load_up_to(results + order.place[pair] * size + i, size - i), total);
    const int n = static_cast<int>(size - i);
    n >= F32::width ? store(out + i, total) : store_partial(out + i, total, n);
  }
}

// Number: x's and the output's. Hidden: of what down takes, bf16 where its weights are.
template <class Number, class Hidden>
void run(const Experts& call) {
  const int64_t pairs = call.tokens * call.per_token, hidden = call.down.inputs, size = call.down.outputs;
  Activations in = layout(call.gate_up), between = layout(call.down);
  const int64_t in_bytes = bytes_of(in, pairs), between_bytes = bytes_of(between, pairs);
  const int64_t part = part_of(call, call.gate_up, hidden), down_part = part_of(call, call.down, size);
  const int64_t rows = pairs < ITEM_PAIRS ? pairs : ITEM_PAIRS;
  const int64_t width = 2 * part > down_part ? 2 * part : down_part;
  const int64_t product_floats = product_scratch(call.gate_up, in, rows), down_floats = product_scratch(call.down, between, rows);
  const int64_t each = rows * width + (product_floats > down_floats ? product_floats : down_floats) + 64;
  const int64_t most_items = (call.count < pairs ? call.count : pairs) + pairs / ITEM_PAIRS;
  const int64_t per_expert = (hidden + part - 1) / part > (size + down_part - 1) / down_part
                                 ? (hidden + part - 1) / part
                                 : (size + down_part - 1) / down_part;
  Scratch scratch(in_bytes + between_bytes + pairs * (hidden * static_cast<int64_t>(sizeof(Hidden)) + size * 4) +
                  call.threads * each * 4 + (call.count + 1 + 2 * pairs) * 8 +
                  most_items * per_expert * static_cast<int64_t>(sizeof(Item)) + 16 * 64);
  place(in, scratch.take<char>(in_bytes), pairs);
  place(between, scratch.take<char>(between_bytes), pairs);
  Hidden* middle = scratch.take<Hidden>(pairs * hidden);
  float* results = scratch.take<float>(pairs * size);
  float* memory = scratch.take<float>(call.threads * each);
  Order order{scratch.take<int64_t>(call.count + 1), scratch.take<int64_t>(pairs), scratch.take<int64_t>(pairs)};
  Item* items = scratch.take<Item>(most_items * per_expert);
  sort_pairs(call, order);

  auto prepare_in = [&](int pair, int) {
    prepare(call.gate_up, static_cast<const Number*>(call.x) + order.token[pair] * call.x_stride, in, pair);
  };
  auto gate_up = [&](int index, int thread) {
    const Item item = items[index];
    const Weight weight = of_expert(call.gate_up, item.expert);
    float* c = memory + thread * each;
    float* products = c + rows * width + 32;
    product(weight, in, item.pair, item.pairs, item.first, item.count, c, width, products);
    product(weight, in, item.pair, item.pairs, hidden + item.first, item.count, c + part, width, products);
    for (int64_t m = 0; m < item.pairs; ++m)
      activate(c + m * width, c + m * width + part, middle + (item.pair + m) * hidden + item.first, item.count);
  };
  auto prepare_between = [&](int pair, int) { prepare(call.down, middle + pair * hidden, between, pair); };
  auto down = [&](int index, int thread) {
    const Item item = items[index];
    float* c = memory + thread * each;
    product(of_expert(call.down, item.expert), between, item.pair, item.pairs, item.first, item.count, c, width,
            c + rows * width + 32);
    for (int64_t m = 0; m < item.pairs; ++m)
      std::memcpy(results + (item.pair + m) * size + item.first, c + m * width, item.count * sizeof(float));
  };
  auto sum_up = [&](int token, int) { add_outputs<Number>(call, order, results, token); };

  const int row_threads = pairs > FEW ? call.threads : 1;
  parallel(row_threads, static_cast<int>(pairs), prepare_in);
  parallel(call.threads, static_cast<int>(list_items(call, order, hidden, part, items)), gate_up);
  parallel(row_threads, static_cast<int>(pairs), prepare_between);
  parallel(call.threads, static_cast<int>(list_items(call, order, size, down_part, items)), down);
  parallel(row_threads, static_cast<int>(call.tokens), sum_up);
}

void run_tokens(const Experts& call) {
  if (call.format == Format::f32) return run<float, float>(call);
  call.down.coding == Coding::bf16 ? run<bf16, bf16>(call) : run<bf16, float>(call);
}

}  // namespace

void experts(const Experts& call) {
  const int64_t number = call.format == Format::f32 ? 4 : 2;
  const int64_t most = PAIR_BYTES / ((call.down.outputs + call.down.inputs) * 4 * call.per_token) + 1;
  for (int64_t token = 0; token < call.tokens; token += most) {
    Experts some = call;
    some.x = static_cast<const char*>(call.x) + token * call.x_stride * number;
    some.weights += token * call.per_token;
    some.chosen += token * call.per_token;
    some.out = static_cast<char*>(call.out) + token * call.down.outputs * number;
    some.tokens = call.tokens - token < most ? call.tokens - token : most;
    run_tokens(some);
  }
}

}  // namespace foveal::FOVEAL_ISA
