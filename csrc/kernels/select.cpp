// Index scores fused with an exact top-k.
//
// An item of work is a tile of up to QUERIES queries of one sequence and a part of their context (all of it, unless there
// are too few tiles for the threads). Its queries are packed into panels of heads once (tile.h's B). Keys pass by KEYS at a
// time: they are read where they are stored and converted into words once for all queries and heads of the tile (tile.h's
// A; first-level cache), and each panel of heads is multiplied with them. Products never leave the registers: ReLU, head
// weights and the sum over heads are applied to the accumulators, and one float a key is left.
//
// By tiles of AMX, sums do leave the registers: those of 16 keys and all heads, for the first-level cache. Every four products
// keep the tiles busy for 64 cycles, in which the vectors add up the heads of the keys before, and read the next ones.
//
// Scores are not stored either. A query keeps candidates, keys that may be among its topk, in order of position; what does
// not exceed the floor, the topk-th best score so far, is dropped at once. When the candidates' memory is full, a radix
// selection finds the exact topk of them and raises the floor. A later key that equals the floor loses to the topk lower
// positions that are kept, so ties go to the lower position. Parts of a context are merged the same way.
//
// A score depends on its query and key only, not on tiles or threads, and so does the selection.
#include "kernels/select.h"

#include <type_traits>

#include "common/parallel.h"
#include "common/scratch.h"
#include "kernels/index_dot.h"
#include "kernels/topk.h"

namespace foveal::FOVEAL_ISA {
namespace {

constexpr int QUERIES = 4;
// Queries that see no more than topk keys are filled in so many at a time.
constexpr int FILLED = 64;
// A part of a context is not worth a thread below this many keys; items for each thread, so that none ends far behind.
constexpr int64_t PART_KEYS = 2048, ITEMS_PER_THREAD = 4;

struct Item {
  int64_t sequence;
  int64_t query, position;  // the first: its packed row, where it stands
  int queries;
  int64_t start, stop;      // keys
  int64_t slot;             // where its candidates go if the context has several parts, otherwise -1
  int parts;                // of the context, in the first of its items; 0 in the others
};

int64_t lower(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t higher(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls each(sequence, first row, first position, count) for tiles whose queries all see more than topk keys, or all not.
template <class Each>
void for_tiles(const Select& s, Each each) {
  for (int64_t q = 0; q < s.sequences.count; ++q) {
    const int64_t first = s.sequences.query_offsets[q], count = s.sequences.query_offsets[q + 1] - first;
    const int64_t position = s.sequences.first_positions[q];
    const int64_t filled = lower(count, higher(0, s.topk - position));
    for (int64_t t = 0; t < filled; t += FILLED) each(q, first + t, position + t, lower(FILLED, filled - t));
    for (int64_t t = filled; t < count; t += QUERIES) each(q, first + t, position + t, lower(QUERIES, count - t));
  }
}

struct Plan {
  Item* items;
  int64_t count, slots;
};

// A multiple of `unit`.
int64_t keys_of_a_part(const Select& s, int64_t unit) {
  int64_t keys = 0;
  for_tiles(s, [&](int64_t, int64_t, int64_t position, int64_t count) {
    if (position >= s.topk) keys += position + count;
  });
  if (s.threads <= 1) return higher(keys, unit);
  return quotient_up(higher(quotient_up(keys, s.threads * ITEMS_PER_THREAD), PART_KEYS), unit) * unit;
}

int64_t count_items(const Select& s, int64_t part) {
  int64_t items = 0;
  for_tiles(s, [&](int64_t, int64_t, int64_t position, int64_t count) {
    items += position < s.topk ? 1 : quotient_up(position + count, part);
  });
  return items;
}

Plan make_plan(const Select& s, int64_t part, Item* items) {
  Plan plan{items, 0, 0};
  for_tiles(s, [&](int64_t sequence, int64_t row, int64_t position, int64_t count) {
    const int64_t keys = position + count, parts = position < s.topk ? 1 : quotient_up(keys, part);
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t start = p * part, stop = parts == 1 ? keys : lower(keys, start + part);
      items[plan.count++] = {sequence, row, position, static_cast<int>(count), start, stop,
                             parts > 1 ? plan.slots : -1, static_cast<int>(p ? 0 : parts)};
      if (parts > 1) plan.slots += count;
    }
  });
  return plan;
}

// What the queries' candidates of one part were, for the merge.
struct Slots {
  uint32_t* keys;      // [slots, topk]
  int32_t* positions;  // [slots, topk]
  int64_t* counts;     // [slots]
};

template <class Dot>
struct Selection {
  using Lanes = typename Product<Dot>::Sum;
  using Sum = std::conditional_t<Dot::numbers == 4, int32_t, float>;

  static constexpr int KEYS = BY_TILES<Dot> ? 16 : 36;
  static_assert(BY_TILES<Dot> || KEYS % TILE_ROWS == 0);
  static constexpr int TAKEN = BY_TILES<Dot> ? 4 * KEYS : KEYS;  // keys whose scores meet the candidates at a time
  static constexpr int SCORES = TAKEN + F32::width;              // whole registers

  const Select& s;
  const int64_t words, row_words, heads;  // heads: those of whole registers
  const int shared;                       // queries of few heads, side by side in a panel
  const int64_t capacity;

  explicit Selection(const Select& select)
      : s(select),
        words(words_of<Dot>(s.size)),
        row_words(quotient_up(words, 16) * 16),
        heads(quotient_up(s.heads, F32::width) * F32::width),
        shared(BY_TILES<Dot> ? 1 : 4 * s.heads <= PANEL ? 4 : 2 * s.heads <= PANEL ? 2 : 1),
        capacity(2 * s.topk + 2048) {}

  static constexpr int BUFFERS = BY_TILES<Dot> ? 2 : 1;

  // The memory of one thread.
  struct Workspace {
    Word* panels;         // [QUERIES, heads / PANEL, words, PANEL], the last panel perhaps one register wide
    float* weights;       // [QUERIES, heads]; of queries that share a panel [QUERIES, PANEL]
    int32_t* offsets;     // [QUERIES, heads]: where sums of whole numbers begin; likewise
    Word* row;            // [row_words]
    Word* keys;           // [BUFFERS, KEYS, row_words]
    float* scales;        // [TAKEN]
    float* scores;        // [QUERIES, SCORES]
    Sum* sums;            // by tiles: [BUFFERS, KEYS, heads]
    Candidates candidates[QUERIES];
    RadixMemory radix;
  };

  int64_t sums_size() const { return BY_TILES<Dot> ? BUFFERS * KEYS * heads : 0; }

  int64_t bytes(int64_t candidates) const {
    return Scratch::rounded(panel_words() * 4) + 2 * Scratch::rounded(QUERIES * weight_columns() * 4) +
           Scratch::rounded(row_words * 4) + Scratch::rounded(BUFFERS * KEYS * row_words * 4) + Scratch::rounded(TAKEN * 4) +
           Scratch::rounded(QUERIES * SCORES * 4) + Scratch::rounded(sums_size() * 4) +
           QUERIES * 2 * candidate_bytes(candidates) + RadixMemory::bytes(candidates);
  }

  Workspace workspace(Scratch& scratch, int64_t candidates) const {
    Workspace w;
    w.panels = scratch.take<Word>(panel_words());
    w.weights = scratch.take<float>(QUERIES * weight_columns());
    w.offsets = scratch.take<int32_t>(QUERIES * weight_columns());
    w.row = scratch.take<Word>(row_words);
    std::memset(w.row, 0, row_words * sizeof(Word));
    w.keys = scratch.take<Word>(BUFFERS * KEYS * row_words);
    std::memset(w.keys, 0, BUFFERS * KEYS * row_words * sizeof(Word));
    w.scales = scratch.take<float>(TAKEN);
    w.scores = scratch.take<float>(QUERIES * SCORES);
    w.sums = scratch.take<Sum>(sums_size());
    for (Candidates& c : w.candidates) {
      c.keys = scratch.take<uint32_t>(candidates + 16);
      c.positions = scratch.take<int32_t>(candidates + 16);
      c.capacity = candidates;
    }
    w.radix = RadixMemory(scratch, candidates);
    return w;
  }

  // Columns that a query's weights stand in.
  int64_t weight_columns() const { return shared > 1 ? PANEL : heads; }
  int64_t panel_words() const { return QUERIES * heads > PANEL ? QUERIES * heads * words : PANEL * words; }

  // The columns of the panel that begins with this head.
  int64_t columns(int64_t head) const { return lower(PANEL, heads - head); }

  // A head of query `row` as a column of a panel. One that only fills up a register, or a panel (row -1), weighs nothing.
  void pack_head(const Workspace& w, int64_t row, int64_t head, Word* column, int64_t stride, float* weight,
                 int32_t* offset) const {
    const bool real = row >= 0 && head < s.heads;
    const uint8_t* numbers = s.queries + (row * s.heads + head) * s.size * number_bytes(s.query_format);
    if (real)
      RowOf<Dot>::read(s.query_format, numbers, s.size, w.row, false);
    else
      std::memset(w.row, 0, words * sizeof(Word));
    for (int64_t i = 0; i < words; ++i) column[i * stride] = w.row[i];
    *weight = real ? s.weights[row * s.heads + head] * unit<Dot>(s.query_format) : 0.0f;
    if constexpr (Dot::numbers == 4 && Int8Dot::key_offset) {
      int32_t total = 0;
      for (int64_t i = 0; real && i < s.size; ++i) total += static_cast<int8_t>(numbers[i]);
      *offset = -Int8Dot::key_offset * total;
    }
  }

  // Query `row` of the batch as panels, place `q` of the workspace.
  void pack_query(const Workspace& w, int q, int64_t row) const {
    if (shared > 1) return pack_shared(w, q, row);
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t first = h / PANEL * PANEL;
      Word* column = w.panels + (q * heads + first) * words + h - first;
      pack_head(w, row, h, column, columns(first), w.weights + q * heads + h, w.offsets + q * heads + h);
    }
  }

  // A query of few heads in its columns of the panel that it shares; those of others weigh nothing for it.
  void pack_shared(const Workspace& w, int q, int64_t row) const {
    const int own = PANEL / shared, first = q % shared * own, panel = q / shared * PANEL;
    std::memset(w.weights + q * PANEL, 0, PANEL * sizeof(float));
    for (int h = 0; h < own; ++h)
      pack_head(w, row, h, w.panels + panel * words + first + h, PANEL, w.weights + q * PANEL + first + h,
                w.offsets + panel + first + h);
  }

  bool in_records() const { return s.keys.format == Format::e4m3 || s.keys.format == Format::int8; }

  const uint8_t* key_at(int64_t row) const {
    if (!in_records()) return s.keys.data + row * s.keys.stride;
    return s.keys.data + row / PAGE_SIZE * s.keys.stride + row % PAGE_SIZE * s.size;
  }

  // The scale of the key that is stored there, in records.
  const uint8_t* scale_at(const uint8_t* key, int64_t row) const {
    const int64_t place = row % PAGE_SIZE;
    return key + (PAGE_SIZE - place) * s.size + place * 4;
  }

  // Bytes from one key of a page to the next.
  int64_t key_stride() const { return in_records() ? s.size : s.keys.stride; }

  // Calls each(position, stored row, count) for positions [start, stop) page by page.
  template <class Each>
  FOVEAL_INLINE void for_pages(int64_t sequence, int64_t start, int64_t stop, Each each) const {
    while (start < stop) {
      const int64_t row = s.sequences.row(sequence, start), count = lower(PAGE_SIZE - row % PAGE_SIZE, stop - start);
      each(start, row, count);
      start += count;
    }
  }

  // Keys of positions [start, stop) as words.
  FOVEAL_INLINE void read_keys(int64_t sequence, int64_t start, int64_t stop, Word* out) const {
    const int64_t stride = key_stride();
    for_pages(sequence, start, stop, [&](int64_t, int64_t row, int64_t count) {
      const uint8_t* key = key_at(row);
      for (int64_t n = 0; n < count; ++n, key += stride, out += row_words)
        RowOf<Dot>::read(s.keys.format, key, s.size, out, true);
    });
  }

  // What the scores of positions [start, stop) have to be multiplied with.
  void read_scales(int64_t sequence, int64_t start, int64_t stop, float* out) const {
    const float factor = unit<Dot>(s.keys.format);
    for_pages(sequence, start, stop, [&](int64_t, int64_t row, int64_t count) {
      if (in_records()) std::memcpy(out, scale_at(key_at(row), row), count * sizeof(float));
      for (int64_t n = 0; n < count; ++n) out[n] = in_records() ? out[n] * factor : factor;
      out += count;
    });
  }

  void prefetch_keys(int64_t sequence, int64_t start, int64_t stop) const {
    const auto prefetch = [](const uint8_t* from, int64_t bytes) {
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(from + b, 0, 2);
    };
    for_pages(sequence, start, stop, [&](int64_t, int64_t row, int64_t keys) {
      prefetch(key_at(row), keys * key_stride());
      if (in_records()) prefetch(scale_at(key_at(row), row), keys * sizeof(float));
    });
  }

  // The products of a tile's rows of keys and a panel.
  template <int registers>
  FOVEAL_INLINE void multiply_keys(const Word* keys, const Word* panel, const int32_t* offsets,
                                   Lanes (&sum)[TILE_ROWS][registers]) const {
    constexpr int M = TILE_ROWS, width = registers * F32::width;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < registers; ++n) {
        if constexpr (Dot::numbers == 4)
          sum[m][n] = load(offsets + n * F32::width);
        else
          sum[m][n] = Lanes{};
      }
    const Word* stop = panel + words * width;
    for (; panel != stop; panel += width, ++keys) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) multiply_add_row<Dot, registers>(keys + m * row_words, panel, sum[m]);
    }
  }

  // One panel of heads and a tile's rows of keys: adds to each key's sums by lane.
  template <int registers>
  FOVEAL_INLINE void score_rows(
      const Word* keys, const Word* panel, const float* weights, const int32_t* offsets, float* totals, bool first) const {
    Lanes sum[TILE_ROWS][registers];
    multiply_keys<registers>(keys, panel, offsets, sum);
#pragma GCC unroll 16
    for (int m = 0; m < TILE_ROWS; ++m) {
      F32 total = first ? zero() : load(totals + m * F32::width);
#pragma GCC unroll 4
      for (int n = 0; n < registers; ++n)
        total = fma(max(to_float(sum[m][n]), zero()), load(weights + n * F32::width), total);
      store(totals + m * F32::width, total);
    }
  }

  // As `score_rows`, for queries that share the panel: sums by lane of each, of KEYS keys. A query's heads are in one register.
  template <int sharing>
  FOVEAL_INLINE void score_shared_rows(
      const Word* keys, const Word* panel, const float* weights, const int32_t* offsets, float* totals) const {
    Lanes sum[TILE_ROWS][COLUMN_REGISTERS];
    multiply_keys<COLUMN_REGISTERS>(keys, panel, offsets, sum);
#pragma GCC unroll 4
    for (int q = 0; q < sharing; ++q) {
      const int n = q * COLUMN_REGISTERS / sharing;
      const F32 weight = load(weights + q * PANEL + n * F32::width);
#pragma GCC unroll 16
      for (int m = 0; m < TILE_ROWS; ++m)
        store(totals + (q * KEYS + m) * F32::width, max(to_float(sum[m][n]), zero()) * weight);
    }
  }

  // One panel of heads, which begins with `head`, and `count` keys. Rows that fill up the last tile hold older keys; what
  // becomes of them is not looked at.
  template <int registers>
  FOVEAL_INLINE void score_panel(const Workspace& w, int q, int64_t head, int count, float* totals) const {
    const Word* panel = w.panels + (q * heads + head) * words;
    const float* weights = w.weights + q * heads + head;
    const int32_t* offsets = w.offsets + q * heads + head;
    for (int n = 0; n < count; n += TILE_ROWS)
      score_rows<registers>(w.keys + n * row_words, panel, weights, offsets, totals + n * F32::width, head == 0);
  }

  // Keys that are wanted next: fetched piece by piece, while others are multiplied.
  struct Ahead {
    int64_t sequence, start, count;
  };

  // Scores of query `q` of the workspace and its first `count` keys.
  __attribute__((noinline)) void score(const Workspace& w, int q, int count, Ahead ahead) const {
    alignas(64) float totals[KEYS * F32::width];
    for (int64_t head = 0; head < heads; head += PANEL) {
      const int64_t stop = lower(heads, head + PANEL);
      prefetch_keys(ahead.sequence, ahead.start + head * ahead.count / heads, ahead.start + stop * ahead.count / heads);
      if (columns(head) == PANEL)
        score_panel<COLUMN_REGISTERS>(w, q, head, count, totals);
      else
        score_panel<1>(w, q, head, count, totals);
    }
    add_lanes(totals, count, w.scores + q * SCORES);
  }

  // A score for each key's sums by lane.
  FOVEAL_INLINE void add_lanes(const float* totals, int count, float* scores) const {
    for (int n = 0; n < count; n += 4) {
      const float* four = totals + n * F32::width;
      store_sums(scores + n, load(four), load(four + F32::width), load(four + 2 * F32::width), load(four + 3 * F32::width));
    }
  }

  // Scores of the queries that share a panel, `q` the first of them, and `count` keys.
  template <int sharing>
  __attribute__((noinline)) void score_shared(const Workspace& w, int q, int count, Ahead ahead) const {
    alignas(64) float totals[sharing * KEYS * F32::width];
    const int panel = q / sharing * PANEL;
    prefetch_keys(ahead.sequence, ahead.start, ahead.start + ahead.count);
    for (int n = 0; n < count; n += TILE_ROWS)
      score_shared_rows<sharing>(w.keys + n * row_words, w.panels + panel * words, w.weights + q * PANEL, w.offsets + panel,
                                 totals + n * F32::width);
    for (int i = 0; i < sharing; ++i) add_lanes(totals + i * KEYS * F32::width, count, w.scores + (q + i) * SCORES);
  }

  void run_by_rows(Workspace& w, const Item& item) const {
    for (int64_t start = item.start; start < item.stop; start += KEYS) {
      const int64_t stop = lower(item.stop, start + KEYS), next = start + KEYS;
      const auto seen = [&](int q) { return static_cast<int>(lower(stop, item.position + q + 1) - start); };
      read_keys(item.sequence, start, stop, w.keys);
      for (int q = 0; q < item.queries; q += shared) {
        const int last = static_cast<int>(lower(q + shared, item.queries)) - 1, most = seen(last);
        if (most <= 0) continue;
        const Ahead ahead{item.sequence, next, q == 0 ? higher(0, lower(KEYS, item.stop - next)) : 0};
        if (shared == 4)
          score_shared<4>(w, q, most, ahead);
        else if (shared == 2)
          score_shared<2>(w, q, most, ahead);
        else
          score(w, q, most, ahead);
        for (int i = q; i <= last; ++i)
          if (seen(i) > 0) take(w, i, item.sequence, start, seen(i));
      }
    }
  }

#if defined(FOVEAL_AMX)
  static constexpr int64_t AHEAD = 12 * KEYS;  // keys that are fetched early

  static constexpr int GROUP = 4;  // keys whose vector work is done between tiles

  // The products of a block of keys and all heads, [KEYS, heads]. In between calls each_group(key) for all groups of keys.
  template <class Group>
  FOVEAL_INLINE void multiply_block(const Word* keys, const Word* panels, Sum* sums, Group each_group) const {
    const int all = static_cast<int>(words), steps = static_cast<int>(quotient_up(heads, 2 * PANEL) * words / AMX);
    int due = 0, key = 0;
    const auto step = [&]() __attribute__((always_inline)) {
      for (due += KEYS / GROUP; due >= steps; due -= steps, key += GROUP) each_group(key);
    };
    for (int64_t head = 0; head < heads; head += 2 * PANEL) {
      const Word* panel = panels + head * words;
      if (heads - head > PANEL)
        multiply_panels(keys, panel, columns(head + PANEL), sums + head, step);
      else if (columns(head) == PANEL)
        multiply_tiles<Dot, 1, COLUMN_REGISTERS>(keys, row_words, panel, all, sums + head, heads, false, step);
      else
        multiply_tiles<Dot, 1, 1>(keys, row_words, panel, all, sums + head, heads, false, step);
    }
  }

  // A tile of keys and two panels of heads, the second with so many columns.
  template <class Step>
  FOVEAL_INLINE void multiply_panels(const Word* keys, const Word* panel, int64_t columns, Sum* sums, Step each_step) const {
    const Word* second = panel + words * PANEL;
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    for (int64_t word = 0; word < words; word += AMX, panel += AMX * PANEL, second += AMX * columns) {
      load_tile<4>(keys + word, row_words * 4), load_tile<5>(panel, PANEL * 4);
      Dot::template multiply_tile<0, 4, 5>();
      load_tile<6>(panel + AMX, PANEL * 4);
      Dot::template multiply_tile<1, 4, 6>();
      load_tile<7>(second, columns * 4);
      Dot::template multiply_tile<2, 4, 7>();
      if (columns == PANEL) load_tile<5>(second + AMX, columns * 4), Dot::template multiply_tile<3, 4, 5>();
      each_step();
    }
    store_tile<0>(sums, heads * 4), store_tile<1>(sums + AMX, heads * 4), store_tile<2>(sums + 2 * AMX, heads * 4);
    if (columns == PANEL) store_tile<3>(sums + 3 * AMX, heads * 4);
  }

  // The scores of a group of keys, without their scales.
  FOVEAL_INLINE void add_heads(const Sum* sums, const float* weights, float* scores) const {
    F32 total[4] = {zero(), zero(), zero(), zero()};
    for (int64_t head = 0; head < heads; head += F32::width) {
      const F32 weight = load(weights + head);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) total[i] = fma(max(to_float(load(sums + i * heads + head)), zero()), weight, total[i]);
    }
    store_sums(scores, total[0], total[1], total[2], total[3]);
  }

  // A query and a block of keys that have been multiplied.
  struct Multiplied {
    int q;
    const Sum* sums;
    float* scores;
    int64_t start;  // of the keys that are taken together
    int count;      // of these, once the block's scores complete them; otherwise 0
  };

  // Keys that follow one another; none where they do not, or are not there.
  struct Run {
    const uint8_t *keys, *scales;
    int count;
  };

  Run run_at(int64_t sequence, int64_t start, int64_t stop) const {
    const int64_t count = lower(KEYS, stop - start);
    if (count <= 0) return {nullptr, nullptr, 0};
    const int64_t row = s.sequences.row(sequence, start);
    if (row % PAGE_SIZE + count > PAGE_SIZE) return {nullptr, nullptr, 0};
    return {key_at(row), in_records() ? scale_at(key_at(row), row) : nullptr, static_cast<int>(count)};
  }

  // The group that begins with `key`.
  FOVEAL_INLINE void read_group(const Run& run, int key, Word* out) const {
    const int64_t stride = key_stride();
    const int stop = run.count < key + GROUP ? run.count : key + GROUP;
    for (int n = key; n < stop; ++n) RowOf<Dot>::read(s.keys.format, run.keys + n * stride, s.size, out + n * row_words, true);
  }

  FOVEAL_INLINE void prefetch_group(const Run& run, int key) const {
    if (key >= run.count) return;
    const uint8_t* from = run.keys + key * key_stride();
    for (int64_t b = 0; b < GROUP * key_stride(); b += 64) __builtin_prefetch(from + b, 0, 2);
    if (run.scales) __builtin_prefetch(run.scales + key * sizeof(float), 0, 2);
  }

  // While a block is multiplied, the heads of what was multiplied before are added up, and the next block is read.
  void run_by_tiles(Workspace& w, const Item& item) const {
    const Tiles tiles;
    prefetch_keys(item.sequence, item.start, lower(item.start + AHEAD, item.stop));
    read_keys(item.sequence, item.start, lower(item.start + KEYS, item.stop), w.keys);
    Multiplied last{0, nullptr, nullptr, 0, 0};
    const auto add_last = [&](int key) __attribute__((always_inline)) {
      add_heads(last.sums + key * heads, w.weights + last.q * heads, last.scores + key);
    };
    int block = 0, units = 0;
    for (int64_t start = item.start; start < item.stop; start += KEYS, ++block) {
      const int64_t stop = lower(item.stop, start + KEYS);
      Word* next_keys = w.keys + (block + 1) % 2 * KEYS * row_words;
      Run next = run_at(item.sequence, stop, item.stop), early = run_at(item.sequence, stop + AHEAD, item.stop);
      if (!next.count) read_keys(item.sequence, stop, lower(stop + KEYS, item.stop), next_keys);
      for (int q = 0; q < item.queries; ++q) {
        const int64_t seen = lower(item.stop, item.position + q + 1);
        if (seen <= start) continue;
        Sum* sums = w.sums + units++ % 2 * KEYS * heads;
        multiply_block(w.keys + block % 2 * KEYS * row_words, w.panels + q * heads * words, sums, [&](int key)
                       __attribute__((always_inline)) {
          if (last.sums) add_last(key);
          read_group(next, key, next_keys);
          prefetch_group(early, key);
        });
        next.count = early.count = 0;
        if (last.count) take(w, last.q, item.sequence, last.start, last.count);
        const int64_t first = item.start + (start - item.start) / TAKEN * TAKEN;
        const bool complete = start + KEYS == first + TAKEN || start + KEYS >= seen;
        const int count = complete ? static_cast<int>(lower(stop, seen) - first) : 0;
        last = {q, sums, w.scores + q * SCORES + start - first, first, count};
      }
    }
    for (int key = 0; key < KEYS; key += GROUP) add_last(key);
    take(w, last.q, item.sequence, last.start, last.count);
  }
#endif

  // Scores of `count` positions from `start` on, without the keys' scales, to the candidates of query `q`.
  FOVEAL_INLINE void take(Workspace& w, int q, int64_t sequence, int64_t start, int count) const {
    read_scales(sequence, start, start + count, w.scales);
    float* scores = w.scores + q * SCORES;
    for (int n = 0; n < count; n += F32::width) store(scores + n, load(scores + n) * load(w.scales + n));
    Candidates& candidates = w.candidates[q];
    if (candidates.count + TAKEN > capacity) candidates.keep_highest(s.topk, w.radix);
    candidates.add(scores, count, static_cast<int32_t>(start));
  }

  void run_item(Workspace& w, const Item& item, const Slots& slots) const {
    if (item.position < s.topk) return fill(item);
    for (int q = 0; q < quotient_up(item.queries, shared) * shared; ++q) {
      pack_query(w, q, q < item.queries ? item.query + q : -1);
      w.candidates[q].clear();
    }
#if defined(FOVEAL_AMX)
    if constexpr (BY_TILES<Dot>)
      run_by_tiles(w, item);
    else
#endif
      run_by_rows(w, item);
    for (int q = 0; q < item.queries; ++q) finish(w, q, item, slots);
  }

  // The selection of a query whose context is one part; otherwise what the merge needs of it.
  void finish(Workspace& w, int q, const Item& item, const Slots& slots) const {
    Candidates& candidates = w.candidates[q];
    if (candidates.count > s.topk) candidates.keep_highest(s.topk, w.radix);
    if (item.slot < 0) return write(candidates, item.query + q);
    const int64_t slot = item.slot + q;
    slots.counts[slot] = candidates.count;
    std::memcpy(slots.keys + slot * s.topk, candidates.keys, candidates.count * sizeof(uint32_t));
    std::memcpy(slots.positions + slot * s.topk, candidates.positions, candidates.count * sizeof(int32_t));
  }

  void write(const Candidates& candidates, int64_t row) const {
    std::memcpy(s.selection + row * s.topk, candidates.positions, s.topk * sizeof(int32_t));
  }

  // Everything that these queries see.
  void fill(const Item& item) const {
    for (int q = 0; q < item.queries; ++q) {
      int32_t* selection = s.selection + (item.query + q) * s.topk;
      const int64_t seen = item.position + q + 1;
      for (int64_t k = 0; k < s.topk; ++k) selection[k] = k < seen ? static_cast<int32_t>(k) : -1;
    }
  }

  // The candidates of all parts of a tile's contexts, `item` the first of them.
  void merge(Workspace& w, const Item& item, const Slots& slots) const {
    for (int q = 0; q < item.queries; ++q) {
      Candidates& candidates = w.candidates[0];
      candidates.clear();
      for (int part = 0; part < item.parts; ++part) {
        const int64_t slot = item.slot + part * item.queries + q, count = slots.counts[slot];
        if (candidates.count + count > candidates.capacity) candidates.keep_highest(s.topk, w.radix);
        candidates.append(slots.keys + slot * s.topk, slots.positions + slot * s.topk, count);
      }
      if (candidates.count > s.topk) candidates.keep_highest(s.topk, w.radix);
      write(candidates, item.query + q);
    }
  }

  void run() const {
    const int64_t part = keys_of_a_part(s, KEYS), count = count_items(s, part);
    Scratch planned(higher(count, 1) * sizeof(Item));
    const Plan plan = make_plan(s, part, planned.take<Item>(count));
    const int threads = static_cast<int>(higher(1, lower(s.threads, count)));
    Scratch scratch(threads * (bytes(capacity) + Scratch::rounded(sizeof(Workspace))) +
                    2 * Scratch::rounded(plan.slots * s.topk * 4) + Scratch::rounded(plan.slots * 8));
    const Slots slots{scratch.take<uint32_t>(plan.slots * s.topk), scratch.take<int32_t>(plan.slots * s.topk),
                      scratch.take<int64_t>(plan.slots)};
    Workspace* workspaces = scratch.take<Workspace>(threads);
    for (int t = 0; t < threads; ++t) workspaces[t] = workspace(scratch, capacity);
    auto select = [&](int item, int thread) { run_item(workspaces[thread], plan.items[item], slots); };
    parallel(threads, static_cast<int>(plan.count), select);
    if (plan.slots == 0) return;
    auto join = [&](int item, int thread) {
      if (plan.items[item].parts > 1) merge(workspaces[thread], plan.items[item], slots);
    };
    parallel(threads, static_cast<int>(plan.count), join);
  }
};

}  // namespace

void select(const Select& s) {
  if (s.keys.format == Format::int8) return Selection<Int8Dot>(s).run();
  const bool wide = s.keys.format == Format::f32 || s.query_format == Format::f32;
  wide ? Selection<FloatDot>(s).run() : Selection<Bf16Dot>(s).run();
}

}  // namespace foveal::FOVEAL_ISA
