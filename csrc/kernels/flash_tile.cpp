// A tile: some queries with all heads of one group (about ROWS rows) against all the keys that they see, TILE_KEYS at a
// time. Keys and values of a tile of keys are packed into panels (pack.h), which stay in the level-two cache while all rows
// pass by; ROWS rows make up for the packing. Rows come in strips of STRIP_ROWS, with their queries and sums, whose scores
// stay in the level-one or -two cache between the two products and the softmax. Keys that no query of a strip sees are left
// out of both products (to the panel of columns in the first, to the key in the second), so that a causal diagonal costs
// half a square; only strips on a diagonal, a window's edge or under a selection look at a mask.
#include "common/pack.h"
#include "kernels/flash_parts.h"

namespace foveal::FOVEAL_ISA {
namespace {

#if defined(FOVEAL_AMX)
constexpr int STRIP_ROWS = 4 * AMX;
#else
constexpr int STRIP_ROWS = 4 * TILE_ROWS;
#endif
constexpr int ROWS = 384, TILE_KEYS = 128;
static_assert(TILE_KEYS % PANEL == 0, "tiles of keys are whole panels");
static_assert(PANEL % (WORDS_AT_ONCE<Bf16Dot> * Bf16Dot::numbers) == 0, "panels of keys are whole words at once");

int64_t group_size(const Flash& flash) { return flash.heads / flash.groups; }
int64_t tile_rows(const Flash& flash) { return tile_queries(flash) * group_size(flash); }
int value_panels(const Flash& flash) { return (flash.value_dim + PANEL - 1) / PANEL; }

template <class Dot, class Number>
struct Tile {
  const Flash& flash;
  int64_t s;
  int group;
  int64_t first_query, queries;
  // [rows, ...], a row for each head of each query, query after query.
  Word* q;             // [rows, q_words]
  float* sums;         // [rows, sums_stride]
  SoftmaxState* states;
  // Of the tile of keys.
  Word* keys;          // panels of PANEL keys, q_words words each
  Word* values;        // panels of PANEL values, VALUE_WORDS words each
  float* scores;       // [STRIP_ROWS, TILE_KEYS], then weights
  float* mask;         // [TILE_KEYS]: 0 where a query selected the key, otherwise -inf
  int64_t *cursors, *next_cursors;  // [queries]: the first entries of their selections that this tile (the next) may hold
  int q_words;
  int64_t sums_stride;

  static constexpr int VALUE_WORDS = TILE_KEYS / Dot::numbers;

  Tile(const Flash& all, int64_t sequence, int head_group, int64_t first, int64_t count, char* scratch)
      : flash(all), s(sequence), group(head_group), first_query(first), queries(count) {
    const int64_t rows = tile_rows(flash);
    q_words = row_words<Dot>(flash.key_dim), sums_stride = value_panels(flash) * PANEL;
    q = Scratch::take<Word>(scratch, rows * q_words);
    sums = Scratch::take<float>(scratch, rows * sums_stride);
    states = Scratch::take<SoftmaxState>(scratch, rows);
    keys = Scratch::take<Word>(scratch, TILE_KEYS * q_words);
    values = Scratch::take<Word>(scratch, VALUE_WORDS * sums_stride);
    scores = Scratch::take<float>(scratch, STRIP_ROWS * TILE_KEYS);
    mask = Scratch::take<float>(scratch, TILE_KEYS);
    cursors = Scratch::take<int64_t>(scratch, tile_queries(flash));
    next_cursors = Scratch::take<int64_t>(scratch, tile_queries(flash));
  }

  static int64_t bytes(const Flash& flash) {
    const int64_t rows = tile_rows(flash), words = row_words<Dot>(flash.key_dim), columns = value_panels(flash) * PANEL;
    return Scratch::space<Word>(rows * words) + Scratch::space<float>(rows * columns) +
           Scratch::space<SoftmaxState>(rows) + Scratch::space<Word>(TILE_KEYS * words) +
           Scratch::space<Word>(VALUE_WORDS * columns) + Scratch::space<float>(STRIP_ROWS * TILE_KEYS) +
           Scratch::space<float>(TILE_KEYS) + 2 * Scratch::space<int64_t>(tile_queries(flash));
  }

  int64_t row_count() const { return queries * group_size(flash); }
  int64_t query_of(int64_t row) const { return first_query + row / group_size(flash); }
  int head_of(int64_t row) const { return static_cast<int>(group * group_size(flash) + row % group_size(flash)); }
  int64_t packed_row(int64_t query) const { return flash.sequences.query_offsets[s] + query; }

  void run() {
    const Tiles tiles;
    load_queries();
    const Visible first = visible(flash, s, first_query), last = visible(flash, s, first_query + queries - 1);
    add_range(0, first.sinks);
    add_range(first.start, last.stop);
    for (int64_t row = 0; row < row_count(); ++row)
      finish_row<Number>(flash, packed_row(query_of(row)), head_of(row), sums + row * sums_stride, states[row]);
  }

  void load_queries() {
    const Number* from = static_cast<const Number*>(flash.q);
    for (int64_t row = 0; row < row_count(); ++row) {
      pack_row<Dot>(from + packed_row(query_of(row)) * flash.q_row + head_of(row) * flash.q_head, flash.key_dim,
                    q + row * q_words);
      states[row] = {NOTHING, 0.0f};
    }
    for (int64_t i = 0; i < row_count() * sums_stride; i += F32::width) store(sums + i, zero());
    for (int64_t i = 0; i < queries; ++i) cursors[i] = 0;
  }

  void add_range(int64_t start, int64_t stop) {
    for (int64_t at = start; at < stop; at += TILE_KEYS) add_keys(at, static_cast<int>(smaller(TILE_KEYS, stop - at)));
  }

  // Positions [start, start + count).
  void add_keys(int64_t start, int count) {
    pack(start, count);
    for (int64_t i = 0; i < queries; ++i) next_cursors[i] = cursors[i];
    for (int64_t row = 0; row < row_count(); row += STRIP_ROWS)
      add_strip(row, static_cast<int>(smaller(STRIP_ROWS, row_count() - row)), start, count);
    for (int64_t i = 0; i < queries; ++i) cursors[i] = next_cursors[i];
  }

  void pack(int64_t start, int count) {
    const Number* k = static_cast<const Number*>(flash.k) + group * flash.k_head;
    const Number* v = static_cast<const Number*>(flash.v) + group * flash.v_head;
    const Number* rows[PANEL];
    for (int at = 0; at < count; at += PANEL) {
      const int some = count - at < PANEL ? count - at : PANEL;
      int64_t stored[PANEL];
      for (int i = 0; i < some; ++i) stored[i] = flash.sequences.row(s, start + at + i);
      for (int i = 0; i < some; ++i) rows[i] = k + stored[i] * flash.k_row;
      pack_columns<Dot>(rows, some, flash.key_dim, keys + static_cast<int64_t>(at) * q_words);
      for (int i = 0; i < some; ++i) rows[i] = v + stored[i] * flash.v_row;
      for (int i = 0; i < some; i += Dot::numbers)
        pack_words<Dot>(rows + i, some - i, flash.value_dim, values, VALUE_WORDS * PANEL, (at + i) / Dot::numbers);
    }
    // Weights of 0 must not meet what is left there from before.
    for (int word = (count + Dot::numbers - 1) / Dot::numbers; word % WORDS_AT_ONCE<Dot>; ++word)
      for (int p = 0; p < value_panels(flash); ++p)
        std::memset(values + (static_cast<int64_t>(p) * VALUE_WORDS + word) * PANEL, 0, PANEL * sizeof(Word));
  }

  // Rows [row, row + rows) against positions [start, start + count).
  void add_strip(int64_t row, int rows, int64_t start, int count) {
    const Visible first = visible(flash, s, query_of(row)), last = visible(flash, s, query_of(row + rows - 1));
    const int stop = static_cast<int>(smaller(last.stop - start, count));
    const bool in_gap = start >= first.sinks && start < first.start;
    const int begin = in_gap ? static_cast<int>(smaller(first.start - start, count)) / PANEL * PANEL : 0;
    if (stop <= begin) return;
    const int end = static_cast<int>(round_up(stop, PANEL));
    multiply<Dot>(rows, (end - begin) / PANEL, q_words, q + row * q_words, q_words,
                  keys + static_cast<int64_t>(begin) * q_words, scores + begin, TILE_KEYS, false);
    const bool edges = end != stop || last.start > start + begin || first.stop < start + stop;
    for (int r = 0; r < rows; ++r) {
      float* strip = scores + r * TILE_KEYS;
      if (edges) hide(strip, visible(flash, s, query_of(row + r)), start, begin, stop, end);
      if (flash.selection) keep_selected(strip, row + r, start, begin, stop, end);
      const float older = add_scores<typename Dot::Number>(states[row + r], strip + begin, end - begin, flash.scale * LOG2E);
      if (older != 1.0f) multiply_row(sums + (row + r) * sums_stride, sums_stride, older);
    }
    constexpr int numbers = WORDS_AT_ONCE<Dot> * Dot::numbers;  // divides `end`; weights from `stop` on are 0
    const int words = static_cast<int>(round_up(stop - begin, numbers)) / Dot::numbers;
    for (int p = 0; p < value_panels(flash); ++p)
      multiply<Dot>(rows, 1, words, reinterpret_cast<const Word*>(scores + begin), TILE_KEYS,
                    values + (static_cast<int64_t>(p) * VALUE_WORDS + begin / Dot::numbers) * PANEL,
                    sums + row * sums_stride + p * PANEL, sums_stride, true);
  }

  // -inf for columns of [begin, end) whose keys a query does not see, and for those from `stop` on: the last panel may reach
  // past the tile's last key.
  static void hide(float* strip, const Visible& seen, int64_t start, int begin, int stop, int end) {
    const int64_t gap_end = smaller(seen.start - start, end);
    for (int64_t j = larger(seen.sinks - start, begin); j < gap_end; ++j) strip[j] = NOTHING;
    for (int64_t j = larger(smaller(seen.stop - start, stop), begin); j < end; ++j) strip[j] = NOTHING;
  }

  // -inf for columns [begin, end) that the row's query did not select, of [begin, stop).
  void keep_selected(float* strip, int64_t row, int64_t start, int begin, int stop, int end) {
    const int64_t query = query_of(row);
    const int32_t* chosen = flash.selection + packed_row(query) * flash.topk;
    for (int j = begin; j < end; ++j) mask[j] = NOTHING;
    int64_t at = cursors[query - first_query];
    for (; at < flash.topk && chosen[at] >= 0 && chosen[at] < start + stop; ++at)
      if (chosen[at] >= start + begin) mask[chosen[at] - start] = 0.0f;
    next_cursors[query - first_query] = at;
    for (int j = begin; j < end; j += F32::width) store(strip + j, load(strip + j) + load(mask + j));
  }
};

}  // namespace

int64_t tile_queries(const Flash& flash) { return larger(1, ROWS / group_size(flash)); }

int64_t tile_scratch_bytes(const Flash& flash) {
  return flash.format == Format::f32 ? Tile<FloatDot, float>::bytes(flash) : Tile<Bf16Dot, bf16>::bytes(flash);
}

void run_tile(const Flash& flash, int64_t s, int group, int64_t first_query, int64_t queries, char* scratch) {
  if (flash.format == Format::f32)
    Tile<FloatDot, float>(flash, s, group, first_query, queries, scratch).run();
  else
    Tile<Bf16Dot, bf16>(flash, s, group, first_query, queries, scratch).run();
}

}  // namespace foveal::FOVEAL_ISA
