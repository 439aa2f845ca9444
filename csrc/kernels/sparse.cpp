// Grouped-query attention over a selection: rows are read where they lie.
//
// A kv head serves only a few query heads, too few to be the columns of a product (as in latent.cpp) without wasting
// registers. So scores are dot products along a row, HEADS query heads by KEYS keys at a time in registers, and values
// are added up HEADS query heads by VALUES registers at a time: each number that is read is used HEADS times. A tile of
// 16 keys keeps scores in the level-one cache; the next tile's rows are prefetched meanwhile.
//
// Queries are spread over threads, and where these are few, ranges of their selection (common/ranges.h).
#include "kernels/sparse.h"

#include "common/parallel.h"
#include "common/ranges.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace foveal::FOVEAL_ISA {
namespace {

constexpr int TILE = 16;  // keys: their rows of all kv heads, and the next ones, fit the level-two cache
constexpr int HEADS = 4;
#if defined(FOVEAL_AVX512)
constexpr int KEYS = 4, VALUES = 6;
#elif defined(FOVEAL_AVX2)
constexpr int KEYS = 3, VALUES = 3;
#else
constexpr int KEYS = 1, VALUES = 1;
#endif
constexpr float LOWEST = -1e30f;  // below every score; minus itself it is 0, not NaN

// What attention over a range leaves: sums of values [heads, value_width] that still lack 1 / sum.
struct State {
  float* out;
  float* most;  // [heads]
  float* sum;   // [heads]
};

struct Worker {
  float* q;        // [heads, padded], zeros behind each head's numbers
  float* weights;  // [HEADS, TILE]
  State state;
};

template <class Number>
class Attention {
 public:
  explicit Attention(const SparseAttention& call)
      : call(call),
        padded(ceil_divide(call.width, F32::width) * F32::width),
        group(call.heads / call.groups) {}

  void run() const;

 private:
  int64_t state_bytes() const {
    return Scratch::rounded(call.heads * call.value_width * 4) + 2 * Scratch::rounded(call.heads * 4);
  }
  State take_state(Scratch& scratch) const {
    float* out = scratch.take<float>(call.heads * call.value_width);
    float* most = scratch.take<float>(call.heads);
    return {out, most, scratch.take<float>(call.heads)};
  }
  int64_t worker_bytes() const {
    return Scratch::rounded(call.heads * padded * 4) + Scratch::rounded(HEADS * TILE * 4) + state_bytes();
  }
  Worker take_worker(Scratch& scratch) const {
    float* q = scratch.take<float>(call.heads * padded);
    float* weights = scratch.take<float>(HEADS * TILE);
    return {q, weights, take_state(scratch)};
  }

  void attend(int64_t query, int64_t sequence, int64_t start, int64_t stop, const Worker& worker, State state) const;
  void widen_query(int64_t query, float* q) const;
  void prefetch(const int64_t* rows, int count) const;
  template <int M>
  void attend_heads(int64_t head, const int64_t* rows, int count, const Worker& worker, State state) const;
  template <int M, int N>
  void dot(const float* q, const Number* keys, const int64_t* rows, float* scores) const;
  template <int M, int N>
  void add(const float* weights, const Number* values, const int64_t* rows, int count, int width, float* out) const;
  void combine(const State* states, int64_t count) const;
  void write(int64_t query, State state, bool empty) const;

  const SparseAttention& call;
  const int64_t padded, group;
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
  Scratch memory(threads * (worker_bytes() + Scratch::rounded(sizeof(Worker))) + states_bytes +
                 Scratch::rounded(queries * sizeof(int64_t)));
  int64_t* sequence_of = memory.take<int64_t>(queries);
  for (int64_t s = 0; s < sequences.count; ++s)
    for (int64_t t = sequences.query_offsets[s]; t < sequences.query_offsets[s + 1]; ++t) sequence_of[t] = s;
  Worker* workers = memory.take<Worker>(threads);
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
    int64_t query, int64_t sequence, int64_t start, int64_t stop, const Worker& worker, State state) const {
  widen_query(query, worker.q);
  std::memset(state.out, 0, call.heads * call.value_width * 4);
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
      for (int64_t h = g * group; h < (g + 1) * group;) {
        const int64_t left = (g + 1) * group - h;
        if (left >= HEADS)
          attend_heads<HEADS>(h, rows[now], count, worker, state);
        else if (left == 3)
          attend_heads<3>(h, rows[now], count, worker, state);
        else if (left == 2)
          attend_heads<2>(h, rows[now], count, worker, state);
        else
          attend_heads<1>(h, rows[now], count, worker, state);
        h += least(left, HEADS);
      }
    }
    count = next;
  }
}

template <class Number>
void Attention<Number>::widen_query(int64_t query, float* q) const {
  for (int64_t h = 0; h < call.heads; ++h) {
    const Number* from = static_cast<const Number*>(call.q) + (query * call.heads + h) * call.width;
    for (int64_t i = 0; i < padded; i += F32::width)
      store(q + h * padded + i, load_partial(from + i, static_cast<int>(least(F32::width, call.width - i))));
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
void Attention<Number>::attend_heads(
    int64_t head, const int64_t* rows, int count, const Worker& worker, State state) const {
  const int64_t g = head / group;
  const float* q = worker.q + head * padded;
  const Number* keys = static_cast<const Number*>(call.keys) + g * call.width;
  int key = 0;
  for (; key + KEYS <= count; key += KEYS) dot<M, KEYS>(q, keys, rows + key, worker.weights + key);
  for (; key < count; ++key) dot<M, 1>(q, keys, rows + key, worker.weights + key);
  for (int m = 0; m < M; ++m) {
    float* weights = worker.weights + m * TILE;
    float* out = state.out + (head + m) * call.value_width;
    const int lanes = static_cast<int>(ceil_divide(count, F32::width) * F32::width);
    for (int i = count; i < lanes; ++i) weights[i] = LOWEST;
    F32 most = set1(state.most[head + m]);
    for (int i = 0; i < lanes; i += F32::width) most = max(most, load(weights + i));
    const float highest = maximum(most);
    if (highest > state.most[head + m]) {
      float shrink[F32::width];
      store(shrink, exp(set1(state.most[head + m] - highest)));
      for (int64_t v = 0; v < call.value_width; ++v) out[v] *= shrink[0];
      state.sum[head + m] *= shrink[0];
      state.most[head + m] = highest;
    }
    F32 total = zero();
    for (int i = 0; i < lanes; i += F32::width) {
      const F32 weight = exp(load(weights + i) - set1(highest));
      total = total + weight;
      store(weights + i, weight);
    }
    state.sum[head + m] += sum(total);
  }
  const Number* values = static_cast<const Number*>(call.values) + g * call.value_width;
  float* out = state.out + head * call.value_width;
  int64_t v = 0;
  for (; v + VALUES * F32::width <= call.value_width; v += VALUES * F32::width)
    add<M, VALUES>(worker.weights, values + v, rows, count, VALUES * F32::width, out + v);
  for (; v < call.value_width; v += F32::width)
    add<M, 1>(worker.weights, values + v, rows, count,
              static_cast<int>(least(F32::width, call.value_width - v)), out + v);
}

// scores[m, n] = scale q[m] . keys[rows[n]]
template <class Number>
template <int M, int N>
FOVEAL_INLINE void Attention<Number>::dot(
    const float* q, const Number* keys, const int64_t* rows, float* scores) const {
  const Number* key[N];
  for (int n = 0; n < N; ++n) key[n] = keys + rows[n] * call.groups * call.width;
  F32 total[M][N];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) total[m][n] = zero();
  auto step = [&](int64_t i, auto read) __attribute__((always_inline)) {
    F32 numbers[N];
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) numbers[n] = read(key[n] + i);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const F32 query = load(q + m * padded + i);
#pragma GCC unroll 6
      for (int n = 0; n < N; ++n) total[m][n] = fma(query, numbers[n], total[m][n]);
    }
  };
  int64_t i = 0;
  for (; i + F32::width <= call.width; i += F32::width)
    step(i, [](const Number* p) __attribute__((always_inline)) { return load(p); });
  if (const int rest = static_cast<int>(call.width - i))
    step(i, [rest](const Number* p) __attribute__((always_inline)) { return load_partial(p, rest); });
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) scores[m * TILE + n] = sum(total[m][n]) * call.scale;
}

// out[m] += sum over rows of weights[m, row] values[row], N registers wide, of which `width` numbers are there.
template <class Number>
template <int M, int N>
FOVEAL_INLINE void Attention<Number>::add(
    const float* weights, const Number* values, const int64_t* rows, int count, int width, float* out) const {
  const int64_t stride = call.groups * call.value_width;
  const bool whole = width == N * F32::width;
  F32 total[M][N];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) {
      const float* from = out + m * call.value_width + n * F32::width;
      total[m][n] = whole ? load(from) : load_partial(from, width);
    }
  for (int key = 0; key < count; ++key) {
    const Number* row = values + rows[key] * stride;
    F32 numbers[N];
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) numbers[n] = whole ? load(row + n * F32::width) : load_partial(row, width);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 6
      for (int n = 0; n < N; ++n) total[m][n] = fma(set1(weights[m * TILE + key]), numbers[n], total[m][n]);
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) {
      float* to = out + m * call.value_width + n * F32::width;
      if (whole)
        store(to, total[m][n]);
      else
        store_partial(to, total[m][n], width);
    }
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
      float* out = states[0].out + h * call.value_width;
      const float* part = states[r].out + h * call.value_width;
      for (int64_t v = 0; v < call.value_width; ++v) out[v] = share[0] * part[v] + (r ? out[v] : 0.0f);
    }
    states[0].sum[h] = total;
  }
}

// Divides by the sums; a query that has nothing selected gets zeros.
template <class Number>
void Attention<Number>::write(int64_t query, State state, bool empty) const {
  for (int64_t h = 0; h < call.heads; ++h) {
    const float* from = state.out + h * call.value_width;
    Number* to = static_cast<Number*>(call.out) + (query * call.heads + h) * call.value_width;
    const F32 share = set1(empty ? 0.0f : 1.0f / state.sum[h]);
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
