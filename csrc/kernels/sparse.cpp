// Grouped-query attention over a selection: rows are read where they lie.
//
// A kv head serves only a few query heads, too few to be the columns of a product (as in latent.cpp) without wasting
// registers. So scores are dot products along a row, MOST_ROWS query heads by KEYS keys at a time in registers, and values
// are added up as many heads at a time (common/few_heads.h). A tile of 16 keys keeps scores in the level-one cache; the
// next tile's rows are prefetched meanwhile.
//
// Queries are spread over threads, and where these are few, ranges of their selection (common/ranges.h).
#include "kernels/sparse.h"

#include "common/few_heads.h"
#include "common/parallel.h"
#include "common/ranges.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace foveal::FOVEAL_ISA {
namespace {

constexpr int TILE = 16;  // keys: their rows of all kv heads, and the next ones, fit the level-two cache
constexpr float LOWEST = -1e30f;  // below every score; minus itself it is 0, not NaN

// What attention over a range leaves: sums of values that still lack 1 / sum.
struct State {
  float* out;   // [heads, padded values], in the order of load_pair
  float* most;  // [heads]
  float* sum;   // [heads]
};

// How a row of queries is kept, and multiplied by PAIR numbers of a key.
template <class Number>
struct Products {
  using Query = float;  // in the order of load_pair
  using Key = Pair;
  static FOVEAL_INLINE Key load_key(const Number* p, int left) { return load_pair_of(p, left); }
  static FOVEAL_INLINE void store_query(Query* q, const Number* p, int left) {
    const Pair numbers = load_pair_of(p, left);
    store(q, numbers.a), store(q + F32::width, numbers.b);
  }
  static FOVEAL_INLINE F32 multiply_add(const Query* q, Key key, F32 total) {
    return fma(load(q + F32::width), key.b, fma(load(q), key.a, total));
  }
};

#if defined(FOVEAL_BF16)
template <>
struct Products<bf16> {
  using Query = bf16;
  using Key = __m512i;
  static FOVEAL_INLINE Key load_key(const bf16* p, int left) {
    return left >= PAIR ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << left) - 1u, p);
  }
  static FOVEAL_INLINE void store_query(Query* q, const bf16* p, int left) { _mm512_storeu_si512(q, load_key(p, left)); }
  static FOVEAL_INLINE F32 multiply_add(const Query* q, Key key, F32 total) {
    return {_mm512_dpbf16_ps(total.v, (__m512bh)_mm512_loadu_si512(q), (__m512bh)key)};
  }
};
#endif

template <class Number>
struct Worker {
  typename Products<Number>::Query* q;  // [heads, padded], zeros behind each head's numbers
  float* weights;                       // [MOST_ROWS, TILE]
  State state;
};

template <class Number>
class Attention {
  using Query = typename Products<Number>::Query;

 public:
  explicit Attention(const SparseAttention& call)
      : call(call),
        padded(ceil_divide(call.width, PAIR) * PAIR),
        padded_values(ceil_divide(call.value_width, PAIR) * PAIR),
        group(call.heads / call.groups) {}

  void run() const;

 private:
  int64_t state_bytes() const {
    return Scratch::rounded(call.heads * padded_values * 4) + 2 * Scratch::rounded(call.heads * 4);
  }
  State take_state(Scratch& scratch) const {
    float* out = scratch.take<float>(call.heads * padded_values);
    float* most = scratch.take<float>(call.heads);
    return {out, most, scratch.take<float>(call.heads)};
  }
  int64_t worker_bytes() const {
    return Scratch::rounded(call.heads * padded * sizeof(Query)) + Scratch::rounded(MOST_ROWS * TILE * 4) + state_bytes();
  }
  Worker<Number> take_worker(Scratch& scratch) const {
    Query* q = scratch.take<Query>(call.heads * padded);
    float* weights = scratch.take<float>(MOST_ROWS * TILE);
    return {q, weights, take_state(scratch)};
  }

  void attend(
      int64_t query, int64_t sequence, int64_t start, int64_t stop, const Worker<Number>& worker, State state) const;
  void keep_query(int64_t query, Query* q) const;
  void prefetch(const int64_t* rows, int count) const;
  template <int M>
  void attend_heads(int64_t head, const int64_t* rows, int count, const Worker<Number>& worker, State state) const;
  template <int M>
  void score(const Query* q, const Number* keys, const int64_t* rows, int count, float* scores) const;
  void softmax(int64_t head, int count, float* weights, State state) const;
  template <int M, int PAIRS>
  void add(const float* weights, const Number* values, const int64_t* rows, int count, int left, float* out) const;
  void combine(const State* states, int64_t count) const;
  void write(int64_t query, State state, bool empty) const;

  const SparseAttention& call;
  const int64_t padded, padded_values, group;
};

template <class Number>
void Attention<Number>::run() const {
  const Sequences& sequences = call.sequences;
  const int64_t queries = sequences.queries();
  if (!queries) return;
  const Ranges ranges = cut(queries, call.topk, TILE);
  const int64_t items = queries * ranges.count;
  const int threads = static_cast<int>(least(call.threads, items));
  const int64_t states_bytes = ranges.count > 1 ? items * (state_bytes() + Scratch::rounded(sizeof(State))) : 0;
  Scratch memory(threads * (worker_bytes() + Scratch::rounded(sizeof(Worker<Number>))) + states_bytes +
                 Scratch::rounded(queries * sizeof(int64_t)));
  int64_t* sequence_of = memory.take<int64_t>(queries);
  for (int64_t s = 0; s < sequences.count; ++s)
    for (int64_t t = sequences.query_offsets[s]; t < sequences.query_offsets[s + 1]; ++t) sequence_of[t] = s;
  Worker<Number>* workers = memory.take<Worker<Number>>(threads);
  for (int thread = 0; thread < threads; ++thread) workers[thread] = take_worker(memory);
  State* states = ranges.count > 1 ? memory.take<State>(items) : nullptr;
  for (int64_t item = 0; states && item < items; ++item) states[item] = take_state(memory);

  auto attend_item = [&](int item, int thread) {
    const int64_t query = item / ranges.count, start = item % ranges.count * ranges.keys;
    const int64_t keys = selected(call.selection + query * call.topk, call.topk);
    if (start && start >= keys) return;
    const State state = states ? states[item] : workers[thread].state;
    attend(query, sequence_of[query], start, least(start + ranges.keys, keys), workers[thread], state);
    if (!states) write(query, state, !keys);
  };
  parallel(threads, static_cast<int>(items), attend_item);
  if (!states) return;
  auto combine_item = [&](int query, int) {
    const int64_t keys = selected(call.selection + query * call.topk, call.topk);
    combine(states + query * ranges.count, ranges.used(keys));
    write(query, states[query * ranges.count], !keys);
  };
  parallel(threads, static_cast<int>(queries), combine_item);
}

// ---- one query over one range of its selection ----

template <class Number>
void Attention<Number>::attend(
    int64_t query, int64_t sequence, int64_t start, int64_t stop, const Worker<Number>& worker, State state) const {
  keep_query(query, worker.q);
  std::memset(state.out, 0, call.heads * padded_values * 4);
  for (int64_t h = 0; h < call.heads; ++h) state.most[h] = LOWEST, state.sum[h] = 0.0f;
  int64_t rows[2][TILE];
  auto locate = [&](int64_t from, int64_t* found) {
    const int count = from < stop ? static_cast<int>(least(TILE, stop - from)) : 0;
    const int32_t* entries = call.selection + query * call.topk + from;
    for (int i = 0; i < count; ++i) found[i] = call.sequences.row(sequence, entries[i]);
    return count;
  };
  int count = locate(start, rows[0]);
  for (int now = 0; count; start += TILE, now ^= 1) {
    const int next = locate(start + TILE, rows[now ^ 1]);
    for (int64_t g = 0; g < call.groups; ++g) {
      // A share of the next tile with each kv head.
      const int64_t from = next * g / call.groups, to = next * (g + 1) / call.groups;
      prefetch(rows[now ^ 1] + from, static_cast<int>(to - from));
      each_rows(static_cast<int>(group), [&](int h, auto heads) __attribute__((always_inline)) {
        attend_heads<heads.value>(g * group + h, rows[now], count, worker, state);
      });
    }
    count = next;
  }
}

template <class Number>
void Attention<Number>::keep_query(int64_t query, Query* q) const {
  for (int64_t h = 0; h < call.heads; ++h) {
    const Number* from = static_cast<const Number*>(call.q) + (query * call.heads + h) * call.width;
    for (int64_t i = 0; i < padded; i += PAIR)
      Products<Number>::store_query(q + h * padded + i, from + i, static_cast<int>(call.width - i));
  }
}

template <class Number>
void Attention<Number>::prefetch(const int64_t* rows, int count) const {
  const int64_t size = call.groups * static_cast<int64_t>(sizeof(Number));
  const char* keys = static_cast<const char*>(call.keys);
  const char* values = static_cast<const char*>(call.values);
  for (int i = 0; i < count; ++i) {
    const char* key = keys + rows[i] * size * call.width;
    const char* value = values + rows[i] * size * call.value_width;
    for (int64_t byte = 0; byte < size * call.width; byte += 64) __builtin_prefetch(key + byte, 0, 2);
    for (int64_t byte = 0; byte < size * call.value_width; byte += 64) __builtin_prefetch(value + byte, 0, 2);
  }
}

// M heads of one kv head over one tile.
template <class Number>
template <int M>
FOVEAL_INLINE void Attention<Number>::attend_heads(
    int64_t head, const int64_t* rows, int count, const Worker<Number>& worker, State state) const {
  const int64_t g = head / group;
  const Number* keys = static_cast<const Number*>(call.keys) + g * call.width;
  score<M>(worker.q + head * padded, keys, rows, count, worker.weights);
  for (int m = 0; m < M; ++m) softmax(head + m, count, worker.weights + m * TILE, state);
  const Number* values = static_cast<const Number*>(call.values) + g * call.value_width;
  float* out = state.out + head * padded_values;
  const int width = static_cast<int>(call.value_width);
  int v = 0;
  for (; v + 2 * PAIR <= width; v += 2 * PAIR) add<M, 2>(worker.weights, values + v, rows, count, width - v, out + v);
  for (; v < width; v += PAIR) add<M, 1>(worker.weights, values + v, rows, count, width - v, out + v);
}

// scores[m, n] = q[m] . keys[rows[n]]; up to three places more are written to.
template <class Number>
template <int M>
FOVEAL_INLINE void Attention<Number>::score(
    const Query* q, const Number* keys, const int64_t* rows, int count, float* scores) const {
  const int64_t stride = call.groups * call.width;
  for (int first = 0; first < count; first += KEYS) {
    const Number* key[KEYS];
    for (int n = 0; n < KEYS; ++n) key[n] = keys + rows[least(first + n, count - 1)] * stride;
    F32 total[M][KEYS];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < KEYS; ++n) total[m][n] = zero();
    for (int i = 0; i < call.width; i += PAIR) {
#pragma GCC unroll 4
      for (int n = 0; n < KEYS; ++n) {
        const auto numbers = Products<Number>::load_key(key[n] + i, static_cast<int>(call.width) - i);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m)
          total[m][n] = Products<Number>::multiply_add(q + m * padded + i, numbers, total[m][n]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
      store_sums(scores + m * TILE + first, total[m][0], total[m][1], total[m][2], total[m][3]);
  }
}

// A head's scores of a tile become weights; what was summed before shrinks where a score is higher than all so far.
template <class Number>
FOVEAL_INLINE void Attention<Number>::softmax(int64_t head, int count, float* weights, State state) const {
  for (int i = count; i < TILE; ++i) weights[i] = LOWEST;
  F32 most = set1(state.most[head]);
  for (int i = 0; i < TILE; i += F32::width) {
    const F32 scores = load(weights + i) * set1(call.scale);
    most = max(most, scores);
    store(weights + i, scores);
  }
  const float highest = maximum(most);
  if (highest > state.most[head]) {
    float shrink[F32::width];
    store(shrink, exp(set1(state.most[head] - highest)));
    float* out = state.out + head * padded_values;
    for (int64_t v = 0; v < padded_values; v += F32::width) store(out + v, load(out + v) * set1(shrink[0]));
    state.sum[head] *= shrink[0];
    state.most[head] = highest;
  }
  F32 total = zero();
  for (int i = 0; i < TILE; i += F32::width) {
    const F32 weight = exp(load(weights + i) - set1(highest));
    total = total + weight;
    store(weights + i, weight);
  }
  state.sum[head] += sum(total);
}

// out[m] += sum over rows of weights[m, row] values[row], PAIRS pairs of registers wide, of which `left` numbers are there.
template <class Number>
template <int M, int PAIRS>
FOVEAL_INLINE void Attention<Number>::add(
    const float* weights, const Number* values, const int64_t* rows, int count, int left, float* out) const {
  const int64_t stride = call.groups * call.value_width;
  F32 total[M][2 * PAIRS];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < 2 * PAIRS; ++n) total[m][n] = load(out + m * padded_values + n * F32::width);
  for (int key = 0; key < count; ++key) {
    const Number* row = values + rows[key] * stride;
#pragma GCC unroll 2
    for (int p = 0; p < PAIRS; ++p) {
      const Pair numbers = PAIRS == 1 ? load_pair_of(row, left) : load_pair(row + p * PAIR);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const F32 weight = set1(weights[m * TILE + key]);
        total[m][2 * p] = fma(weight, numbers.a, total[m][2 * p]);
        total[m][2 * p + 1] = fma(weight, numbers.b, total[m][2 * p + 1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < 2 * PAIRS; ++n) store(out + m * padded_values + n * F32::width, total[m][n]);
}

// ---- results ----

// All ranges of a query into the state of the first, by their maxima.
template <class Number>
void Attention<Number>::combine(const State* states, int64_t count) const {
  for (int64_t h = 0; h < call.heads; ++h) {
    float most = LOWEST, total = 0.0f;
    for (int64_t r = 0; r < count; ++r) most = states[r].most[h] > most ? states[r].most[h] : most;
    for (int64_t r = 0; r < count; ++r) {
      float share[F32::width];
      store(share, exp(set1(states[r].most[h] - most)));
      total += share[0] * states[r].sum[h];
      float* out = states[0].out + h * padded_values;
      const float* part = states[r].out + h * padded_values;
      for (int64_t v = 0; v < padded_values; ++v) out[v] = share[0] * part[v] + (r ? out[v] : 0.0f);
    }
    states[0].sum[h] = total;
  }
}

// Divides by the sums; a query that has nothing selected gets zeros.
template <class Number>
void Attention<Number>::write(int64_t query, State state, bool empty) const {
  for (int64_t h = 0; h < call.heads; ++h) {
    float* from = state.out + h * padded_values;
    Number* to = static_cast<Number*>(call.out) + (query * call.heads + h) * call.value_width;
    const F32 share = set1(empty ? 0.0f : 1.0f / state.sum[h]);
    in_order(to, padded_values, from);
    for (int64_t v = 0; v < call.value_width; v += F32::width) {
      const int n = static_cast<int>(least(F32::width, call.value_width - v));
      store_partial(to + v, empty ? zero() : load_partial(from + v, n) * share, n);
    }
  }
}

}  // namespace

void sparse_attention(const SparseAttention& call) {
  call.format == Format::bf16 ? Attention<bf16>(call).run() : Attention<float>(call).run();
}

}  // namespace foveal::FOVEAL_ISA
