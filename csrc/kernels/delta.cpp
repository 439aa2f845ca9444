// Linear attention and the delta rule. The columns of a state (dimensions of the values) know nothing of each other, so a
// block of four registers of columns goes through all tokens of its sequence by itself, in level-one cache.
//
// The delta rule passes over the state twice a token: what it returns for key and query is summed together, before the key
// is written, because S_new^T q = (exp(g) S)^T q + (k . q) u. That is four multiply-adds a number; chunked forms, which
// turn tokens into matrix products, need no fewer.
#include "kernels/delta.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace foveal::FOVEAL_ISA {
namespace {

constexpr int MOST_REGISTERS = 4;     // of a block's columns
constexpr int64_t AHEAD = 8;          // rows that are asked for before they are read
constexpr int64_t NUMBERS = 1 << 15;  // updates of one number; fewer are not worth waking a second thread

// Some columns of one head's state of one sequence.
struct Block {
  int64_t sequence, head, first, count;
};

// One token's key and query with the decays of one head.
struct Factors {
  float *decay, *key, *query;             // [keys]: exp(g), k, q
  float *decayed_key, *decayed_query;     // [keys]: exp(g) k, exp(g) q
  float product;                          // k . q

  static int64_t space(int64_t keys) { return 5 * Scratch::space<float>(round_up(keys, F32::width)); }
  Factors(char*& memory, int64_t keys)
      : decay(Scratch::take<float>(memory, round_up(keys, F32::width))),
        key(Scratch::take<float>(memory, round_up(keys, F32::width))),
        query(Scratch::take<float>(memory, round_up(keys, F32::width))),
        decayed_key(Scratch::take<float>(memory, round_up(keys, F32::width))),
        decayed_query(Scratch::take<float>(memory, round_up(keys, F32::width))) {}
};

void read_factors(const LinearAttention& call, int64_t token, int64_t head, Factors& factors) {
  const int64_t keys = call.keys, group = head / (call.heads / call.groups);
  const float *k = call.k.of(token) + group * keys, *q = call.q.of(token) + group * keys;
  const float* g = call.decay.of(token) + head * (call.decay_by_key ? keys : 1);
  F32 decay = exp2(set1(*g * LOG2E)), product = zero();
  for (int64_t i = 0; i < keys; i += F32::width) {
    const F32 key = load_up_to(k + i, keys - i), query = load_up_to(q + i, keys - i);
    if (call.decay_by_key) decay = exp2(load_up_to(g + i, keys - i) * set1(LOG2E));
    store(factors.decay + i, decay);
    store(factors.key + i, key);
    store(factors.query + i, query);
    store(factors.decayed_key + i, decay * key);
    store(factors.decayed_query + i, decay * query);
    product = fma(key, query, product);
  }
  factors.product = sum(product);
}

// Where a block's rows are read and written: between the first token and the last in one place, row after row.
template <int registers, bool held>
struct Place {
  static constexpr int64_t width = registers * F32::width;
  const float* in;
  int64_t in_stride;
  float* out;
  int64_t out_stride;

  FOVEAL_INLINE const float* read(int64_t row) const {
    if constexpr (held) return out + row * width;
    __builtin_prefetch(in + (row + AHEAD) * in_stride);
    return in + row * in_stride;
  }
  FOVEAL_INLINE const float* read_again(int64_t row) const { return held ? out + row * width : in + row * in_stride; }
  FOVEAL_INLINE float* write(int64_t row) const { return out + row * (held ? width : out_stride); }
};

// S = exp(g) S + k v^T; o = S^T q.
template <int registers, bool held>
FOVEAL_INLINE void add(const Factors& factors, const Place<registers, held>& place, int64_t keys, const F32* v, F32* o) {
  for (int64_t p = 0; p < keys; ++p) {
    const F32 decay = set1(factors.decay[p]), key = set1(factors.key[p]), query = set1(factors.query[p]);
    const float* in = place.read(p);
    float* out = place.write(p);
#pragma GCC unroll 4
    for (int i = 0; i < registers; ++i) {
      const F32 state = fma(key, v[i], decay * load(in + i * F32::width));
      store(out + i * F32::width, state);
      o[i] = fma(query, state, o[i]);
    }
  }
}

// The same with u = beta (v - (exp(g) S)^T k) in the place of v.
template <int registers, bool held>
FOVEAL_INLINE void correct(const Factors& factors, const Place<registers, held>& place, int64_t keys, F32 beta,
                           const F32* v, F32* o) {
  F32 old[registers], u[registers];
  for (int i = 0; i < registers; ++i) old[i] = zero();
  for (int64_t p = 0; p < keys; ++p) {
    const F32 key = set1(factors.decayed_key[p]), query = set1(factors.decayed_query[p]);
    const float* in = place.read(p);
#pragma GCC unroll 4
    for (int i = 0; i < registers; ++i) {
      const F32 state = load(in + i * F32::width);
      old[i] = fma(key, state, old[i]);
      o[i] = fma(query, state, o[i]);
    }
  }
  for (int i = 0; i < registers; ++i) {
    u[i] = beta * (v[i] - old[i]);
    o[i] = fma(set1(factors.product), u[i], o[i]);
  }
  for (int64_t p = 0; p < keys; ++p) {
    const F32 decay = set1(factors.decay[p]), key = set1(factors.key[p]);
    const float* in = place.read_again(p);
    float* out = place.write(p);
#pragma GCC unroll 4
    for (int i = 0; i < registers; ++i)
      store(out + i * F32::width, fma(key, u[i], decay * load(in + i * F32::width)));
  }
}

template <bool delta, int registers, bool held>
void advance(const LinearAttention& call, int64_t token, const Block& block, const Factors& factors,
             const Place<registers, held>& place) {
  const int64_t column = block.head * call.values + block.first;
  const float* v = call.v.of(token) + column;
  float* out = call.out + token * call.heads * call.values + column;
  F32 values[registers], o[registers];
  for (int i = 0; i < registers; ++i) {
    values[i] = load_up_to(v + i * F32::width, block.count - i * F32::width);
    o[i] = zero();
  }
  if constexpr (delta)
    correct(factors, place, call.keys, set1(call.beta.of(token)[block.head]), values, o);
  else
    add(factors, place, call.keys, values, o);
  for (int i = 0; i < registers; ++i) {
    const int64_t rest = block.count - i * F32::width;
    if (rest >= F32::width)
      store(out + i * F32::width, o[i]);
    else
      store_partial(out + i * F32::width, o[i], static_cast<int>(rest));
  }
}

void copy_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t count) {
  for (int64_t row = 0; row < rows; ++row)
    std::memcpy(to + row * to_stride, from + row * from_stride, count * sizeof(float));
}

template <bool delta, int registers>
void run_block(const LinearAttention& call, const Block& block, char* memory) {
  const int64_t keys = call.keys, values = call.values;
  const int64_t begin = call.sequences.offsets[block.sequence], end = call.sequences.offsets[block.sequence + 1];
  const int64_t first = (block.sequence * call.heads + block.head) * keys * values + block.first;
  constexpr int64_t width = registers * F32::width;
  Factors factors(memory, keys);
  float* held = Scratch::take<float>(memory, keys * width);
  // Whole registers are read from where the state was and written to where it shall be by the first and the last token.
  const bool whole = block.count == width && begin != end;
  if (!whole) {
    if (block.count < width) std::memset(held, 0, keys * width * sizeof(float));  // what is beyond its columns is computed too
    copy_rows(call.state_in + first, values, held, width, keys, block.count);
  }
  for (int64_t t = begin; t < end; ++t) {
    read_factors(call, t, block.head, factors);
    Place<registers, false> place = {held, width, held, width};
    const bool read = whole && t == begin, write = whole && t + 1 == end;
    if (read) place.in = call.state_in + first, place.in_stride = values;
    if (write) place.out = call.state_out + first, place.out_stride = values;
    if (read || write)
      advance<delta>(call, t, block, factors, place);
    else
      advance<delta>(call, t, block, factors, Place<registers, true>{held, width, held, width});
  }
  if (!whole) copy_rows(held, width, call.state_out + first, values, keys, block.count);
}

template <bool delta>
void run(const LinearAttention& call) {
  constexpr int64_t most = MOST_REGISTERS * F32::width;
  const int64_t blocks = (call.values + most - 1) / most, of_sequence = call.heads * blocks;
  const int64_t updates = call.sequences.tokens() * call.heads * call.keys * call.values;
  const int threads = updates < NUMBERS ? 1 : call.threads;
  const int64_t space = Factors::space(call.keys) + Scratch::space<float>(call.keys * most);
  Scratch scratch(threads * space);
  char* memory = scratch.take<char>(threads * space);
  auto body = [&](int item, int thread) {
    const int64_t first = item % blocks * most, rest = call.values - first;
    const Block block = {item / of_sequence, item % of_sequence / blocks, first, rest < most ? rest : most};
    char* share = memory + thread * space;
    switch ((block.count + F32::width - 1) / F32::width) {
      case 1:
        return run_block<delta, 1>(call, block, share);
      case 2:
        return run_block<delta, 2>(call, block, share);
      case 3:
        return run_block<delta, 3>(call, block, share);
      default:
        return run_block<delta, 4>(call, block, share);
    }
  };
  parallel(threads, static_cast<int>(call.sequences.count * of_sequence), body);
}

}  // namespace

void linear_attention(const LinearAttention& call) { run<false>(call); }

void delta_rule(const LinearAttention& call) { run<true>(call); }

}  // namespace foveal::FOVEAL_ISA
