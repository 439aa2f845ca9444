// One query of a sequence: a decoding step. Every key and value is read once, for few multiplications, so this is about
// memory: rows are read in the order in which they lie, all groups of a row together, in strips of STRIP keys. A strip's
// scores [heads, STRIP] and the sums [heads, value_dim] stay in the level-one and -two caches; while keys are being
// multiplied, the values of the same positions are fetched. A long context is cut into parts, whose number depends on the
// context alone, so that two cores can share one sequence and the result is the same however many there are.
#include "common/few_heads.h"
#include "kernels/flash_parts.h"

namespace foveal::FOVEAL_ISA {
namespace {

constexpr int64_t STRIP = 128, PART = 256, MOST_PARTS = 32;
constexpr int64_t SCORE_STRIDE = STRIP + F32::width;  // scores are stored four at a time: up to three past the last key

struct Strip {
  float* q;       // [heads, padded key_dim], zeros at the end
  float* scores;  // [heads, SCORE_STRIDE], then weights
  float* sums;    // [heads, padded value_dim]
  SoftmaxState* states;
  int64_t q_stride, sums_stride;
};

template <int ROWS, class Number>
FOVEAL_INLINE void score_keys(const float* q, int64_t q_stride, const Number* const* k, int size, float* scores) {
  F32 sum[ROWS][KEYS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < KEYS; ++j) sum[r][j] = zero();
  auto step = [&](int i, auto load_keys) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int j = 0; j < KEYS; ++j) {
      const Pair key = load_keys(k[j] + i);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        sum[r][j] = fma(load(q + r * q_stride + i), key.a, sum[r][j]);
        sum[r][j] = fma(load(q + r * q_stride + i + F32::width), key.b, sum[r][j]);
      }
    }
  };
  int i = 0;
  for (; i + PAIR <= size; i += PAIR) step(i, [](const Number* p) { return load_pair(p); });
  if (i < size) step(i, [&](const Number* p) { return load_pair_of(p, size - i); });
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) store_sums(scores + r * SCORE_STRIDE, sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
}

// sums[ROWS, PAIRS pairs] += weights[ROWS, count] . values, of which `left` are there.
template <int ROWS, int PAIRS, class Number>
FOVEAL_INLINE void add_columns(
    const float* weights, const Number* v, int64_t v_row, int64_t count, int left, float* sums, int64_t sums_stride) {
  F32 sum[ROWS][2 * PAIRS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 2 * PAIRS; ++c) sum[r][c] = load(sums + r * sums_stride + c * F32::width);
  for (int64_t j = 0; j < count; ++j, v += v_row) {
#pragma GCC unroll 2
    for (int c = 0; c < PAIRS; ++c) {
      const Pair value = PAIRS == 1 ? load_pair_of(v, left) : load_pair(v + c * PAIR);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const F32 weight = set1(weights[r * SCORE_STRIDE + j]);
        sum[r][2 * c] = fma(weight, value.a, sum[r][2 * c]);
        sum[r][2 * c + 1] = fma(weight, value.b, sum[r][2 * c + 1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 2 * PAIRS; ++c) store(sums + r * sums_stride + c * F32::width, sum[r][c]);
}

template <int ROWS, class Number>
FOVEAL_INLINE void add_values(
    const float* weights, const Number* v, int64_t v_row, int64_t count, int size, float* sums, int64_t sums_stride) {
  int c = 0;
  for (; c + 2 * PAIR <= size; c += 2 * PAIR)
    add_columns<ROWS, 2>(weights, v + c, v_row, count, size - c, sums + c, sums_stride);
  for (; c < size; c += PAIR)
    add_columns<ROWS, 1>(weights, v + c, v_row, count, size - c, sums + c, sums_stride);
}

// Positions whose rows follow one another, from the i-th visible one; at most `most`.
FOVEAL_INLINE int64_t run_length(const Sequences& sequences, int64_t s, const Visible& seen, int64_t i, int64_t most) {
  if (i < seen.sinks) most = smaller(most, seen.sinks - i);
  return sequences.starts[s] >= 0 ? most : smaller(most, PAGE_SIZE - seen.position(i) % PAGE_SIZE);
}

template <class Number>
void score_run(const Flash& flash, const Strip& strip, int64_t row, int64_t count, float* scores) {
  const int group = flash.heads / flash.groups;
  const Number* k = static_cast<const Number*>(flash.k) + row * flash.k_row;
  const Number* v = static_cast<const Number*>(flash.v) + row * flash.v_row;
  for (int64_t j = 0; j < count; j += KEYS) {
    for (int g = 0; g < flash.groups; ++g) {
      const Number* keys[KEYS];
      for (int i = 0; i < KEYS; ++i) {
        const int64_t place = smaller(j + i, count - 1);
        keys[i] = k + place * flash.k_row + g * flash.k_head;
        const Number* value = v + place * flash.v_row + g * flash.v_head;
        for (int c = 0; c < flash.value_dim; c += 64 / static_cast<int>(sizeof(Number))) __builtin_prefetch(value + c);
      }
      each_rows(group, [&](int h, auto rows) __attribute__((always_inline)) {
        const int head = g * group + h;
        score_keys<rows.value>(
            strip.q + head * strip.q_stride, strip.q_stride, keys, flash.key_dim, scores + head * SCORE_STRIDE + j);
      });
    }
  }
}

template <class Number>
void add_run(const Flash& flash, const Strip& strip, int64_t row, int64_t count, const float* weights) {
  const int group = flash.heads / flash.groups;
  const Number* v = static_cast<const Number*>(flash.v) + row * flash.v_row;
  for (int g = 0; g < flash.groups; ++g)
    each_rows(group, [&](int h, auto rows) __attribute__((always_inline)) {
      const int head = g * group + h;
      add_values<rows.value>(weights + head * SCORE_STRIDE, v + g * flash.v_head, flash.v_row, count, flash.value_dim,
                             strip.sums + head * strip.sums_stride, strip.sums_stride);
    });
}

// Visible positions [i, i + count) of the sequence's query.
template <class Number>
void add_strip(const Flash& flash, int64_t s, const Visible& seen, int64_t i, int64_t count, const Strip& strip) {
  const Sequences& sequences = flash.sequences;
  for (int64_t done = 0, run; done < count; done += run) {
    run = run_length(sequences, s, seen, i + done, count - done);
    score_run<Number>(flash, strip, sequences.row(s, seen.position(i + done)), run, strip.scores + done);
  }
  const int64_t padded = round_up(count, F32::width);
  for (int h = 0; h < flash.heads; ++h) {
    float* scores = strip.scores + h * SCORE_STRIDE;
    for (int64_t j = count; j < padded; ++j) scores[j] = NOTHING;
    const float older = add_scores<float>(strip.states[h], scores, padded, flash.scale * LOG2E);
    if (older != 1.0f) multiply_row(strip.sums + h * strip.sums_stride, strip.sums_stride, older);
  }
  for (int64_t done = 0, run; done < count; done += run) {
    run = run_length(sequences, s, seen, i + done, count - done);
    add_run<Number>(flash, strip, sequences.row(s, seen.position(i + done)), run, strip.scores + done);
  }
}

int64_t q_size(const Flash& flash) { return round_up(flash.key_dim, PAIR); }
int64_t sums_size(const Flash& flash) { return round_up(flash.value_dim, PAIR); }

template <class Number>
void load_query(const Flash& flash, int64_t s, const Strip& strip) {
  const Number* q = static_cast<const Number*>(flash.q) + flash.sequences.query_offsets[s] * flash.q_row;
  for (int h = 0; h < flash.heads; ++h)
    for (int i = 0; i < flash.key_dim; i += PAIR) {
      const Pair query = load_pair_of(q + h * flash.q_head + i, flash.key_dim - i);
      store(strip.q + h * strip.q_stride + i, query.a);
      store(strip.q + h * strip.q_stride + i + F32::width, query.b);
    }
}

// The output from the result of the only part, or of all parts together.
template <class Number>
void write_output(const Flash& flash, int64_t s, float* result) {
  const int64_t row = sums_size(flash);
  const SoftmaxState* states = reinterpret_cast<const SoftmaxState*>(result + flash.heads * row);
  for (int h = 0; h < flash.heads; ++h) {
    in_order(static_cast<Number*>(flash.out), row, result + h * row);
    finish_row<Number>(flash, flash.sequences.query_offsets[s], h, result + h * row, states[h]);
  }
}

template <class Number>
void run_part(const Flash& flash, int64_t s, int64_t part, int64_t parts, float* result, char* scratch) {
  const int heads = flash.heads;
  Strip strip;
  strip.q_stride = q_size(flash), strip.sums_stride = sums_size(flash);
  strip.q = Scratch::take<float>(scratch, heads * strip.q_stride);
  strip.scores = Scratch::take<float>(scratch, heads * SCORE_STRIDE);
  if (parts == 1) result = Scratch::take<float>(scratch, single_result_size(flash));
  strip.sums = result;
  strip.states = reinterpret_cast<SoftmaxState*>(result + heads * strip.sums_stride);
  load_query<Number>(flash, s, strip);
  for (int64_t i = 0; i < heads * strip.sums_stride; i += F32::width) store(strip.sums + i, zero());
  for (int h = 0; h < heads; ++h) strip.states[h] = {NOTHING, 0.0f};

  const Visible seen = visible(flash, s, 0);
  const int64_t stop = seen.count() * (part + 1) / parts;
  for (int64_t i = seen.count() * part / parts; i < stop; i += STRIP)
    add_strip<Number>(flash, s, seen, i, smaller(STRIP, stop - i), strip);
  if (parts == 1) write_output<Number>(flash, s, result);
}

// Takes another part's state and sums of a head into the first ones.
void add_state(
    SoftmaxState& state, float* sums, const SoftmaxState& other, const float* other_sums, int64_t size, float factor) {
  const float highest = state.highest > other.highest ? state.highest : other.highest;
  const float mine = power(state.highest, highest, factor), its = power(other.highest, highest, factor);
  for (int64_t i = 0; i < size; i += F32::width)
    store(sums + i, fma(load(sums + i), set1(mine), load(other_sums + i) * set1(its)));
  state = {highest, state.sum * mine + other.sum * its};
}

}  // namespace

int64_t single_parts(const Flash& flash, int64_t s) {
  const int64_t parts = visible(flash, s, 0).count() / PART;
  return parts < 1 ? 1 : smaller(parts, MOST_PARTS);
}

int64_t single_result_size(const Flash& flash) { return flash.heads * (sums_size(flash) + 2); }

int64_t single_scratch_bytes(const Flash& flash) {
  return Scratch::space<float>(flash.heads * q_size(flash)) + Scratch::space<float>(flash.heads * SCORE_STRIDE) +
         Scratch::space<float>(single_result_size(flash));
}

void run_single(const Flash& flash, int64_t s, int64_t part, int64_t parts, float* result, char* scratch) {
  flash.format == Format::f32 ? run_part<float>(flash, s, part, parts, result, scratch)
                              : run_part<bf16>(flash, s, part, parts, result, scratch);
}

void combine_single(const Flash& flash, int64_t s, int64_t parts, float* results) {
  const int64_t size = single_result_size(flash), row = sums_size(flash);
  SoftmaxState* first = reinterpret_cast<SoftmaxState*>(results + flash.heads * row);
  for (int64_t part = 1; part < parts; ++part) {
    float* sums = results + part * size;
    const SoftmaxState* states = reinterpret_cast<SoftmaxState*>(sums + flash.heads * row);
    for (int h = 0; h < flash.heads; ++h) add_state(first[h], results + h * row, states[h], sums + h * row, row, flash.scale * LOG2E);
  }
  flash.format == Format::f32 ? write_output<float>(flash, s, results) : write_output<bf16>(flash, s, results);
}

}  // namespace foveal::FOVEAL_ISA
