// Absorbed latent attention, dense and over a selection.
//
// The columns of all products are (query, head) pairs, so that a product never has to be transposed: for a tile of 64 keys
//   scores[key, column]   =  keys[key, word]       . q[word, column]
//   out[value, column]   +=  keys^T[value, key]    . exp(scores - maximum)[key, column]
// (latent_products.h; with AMX the second one is made the other way round). The tile is gathered once into words that the products broadcast (floats; pairs of bf16 where the machine multiplies
// those), 144 KiB for DeepSeek-V3 in float, and serves up to COLUMNS columns: one query's heads over a selection, heads
// of several queries of a sequence otherwise. It stays in the level-two cache while the panels of q and out (36 and 32
// KiB for 16 columns) pass by. Rows that are floats already and lie in order are read where they are. The next tile's rows
// are prefetched while the first panel is multiplied.
//
// Softmax: a column keeps a maximum and a sum. The maximum may lag behind the true one by LAG: only beyond that are out
// and sum scaled down, which is seldom after the first tiles.
//
// Work is cut into blocks of columns, and where these are few, their keys into ranges (common/ranges.h).
#include "kernels/latent.h"

#include "common/parallel.h"
#include "common/ranges.h"
#include "common/scratch.h"
#include "kernels/latent_products.h"

namespace foveal::FOVEAL_ISA {
namespace {

constexpr int TILE = LATENT_TILE;
static_assert(TILE == PAGE_SIZE, "the rows of a dense tile lie in order");
constexpr int COLUMNS = 4 * PANEL;                 // of one block
constexpr int64_t LATENT_BLOCK = 128;              // numbers that share a scale, as in foveal/config/formats.py
constexpr float LAG = 8.0f;                        // weights reach e^8
constexpr float LOWEST = -1e30f;                   // below every score; minus itself it is 0, not NaN

// Words of a row in a tile: an odd number of cache lines, so that the rows do not compete for the same sets.
int64_t odd_lines(int64_t words) { return (ceil_divide(words, 16) / 2 * 2 + 1) * 16; }

// Columns that read the same keys. A column is (query row) * heads + head.
struct Block {
  int64_t sequence, column;
  int columns;
  int64_t keys;  // positions [0, keys), or entries of the selection
};

// What attention over a range of keys leaves: sums of values that still lack 1 / sum.
struct State {
  float* out;   // panels, of which latent_products.h knows the order
  float* most;  // [COLUMNS]
  float* sum;   // [COLUMNS]
};

struct Worker {
  Word* q;        // panels [words, columns]
  float* scores;  // [TILE, PANEL]; the weights where a word is a float
  Word* keys;     // [TILE, stride]; the values too where a word is a float
  Word* weights;  // where a word is a pair, of keys: [TILE / 2, PANEL]
  Word* values;   // likewise: [TILE / 2, value_stride]
  State state;
};

struct Tile {
  int count;
  Left keys, values;
  int value_words;
};

// Rows that the next tile will read.
struct Prefetch {
  const char* const* rows;
  int count;
};

template <class Dot>
class Attention {
 public:
  explicit Attention(const LatentAttention& call)
      : call(call),
        words(row_words<Dot>(static_cast<int>(call.width))),
        stride(odd_lines(words)),
        value_stride(Dot::numbers == 1 ? 0 : odd_lines(call.rank)),
        sums_size(Products<Dot>::size(call.rank)) {}

  void run() const;

 private:
  using Number = typename Dot::Number;

  int64_t blocks_of(int64_t sequence) const;
  void fill_blocks(Block* blocks) const;
  int64_t state_bytes() const;
  State take_state(Scratch& scratch) const;
  int64_t worker_bytes() const;
  Worker take_worker(Scratch& scratch) const;

  void attend(const Block& block, int64_t start, int64_t stop, Worker& worker, State state) const;
  bool count_visible(const Block& block, int64_t start, int count, int* visible) const;
  void pack_queries(const Block& block, Word* panels) const;
  template <class From>
  void pack_panel(const From* q, int count, Word* panel) const;
  int locate(const Block& block, int64_t start, int64_t stop, const char** rows) const;
  Tile load_tile(const char* const* rows, int count, Worker& worker) const;
  void read_row(const char* row, Number* out) const;
  template <int N>
  void attend_tile(const Tile& tile, const Word* q, Worker& worker, State state, const int* visible, bool first,
                   Prefetch prefetch) const;
  template <int N>
  void weigh(const Tile& tile, Worker& worker, State state, const int* visible, bool first) const;
  void combine(const Block& block, const State* states, int64_t count) const;
  void write(const Block& block, State state) const;

  const LatentAttention& call;
  const int words;
  const int64_t stride, value_stride, sums_size;
};

// ---- the cut into blocks and ranges ----

template <class Dot>
int64_t Attention<Dot>::blocks_of(int64_t s) const {
  const int64_t queries = call.sequences.query_offsets[s + 1] - call.sequences.query_offsets[s];
  return call.selection ? queries * ceil_divide(call.heads, COLUMNS) : ceil_divide(queries * call.heads, COLUMNS);
}

template <class Dot>
void Attention<Dot>::fill_blocks(Block* blocks) const {
  const Sequences& sequences = call.sequences;
  for (int64_t s = 0; s < sequences.count; ++s) {
    const int64_t first = sequences.query_offsets[s], stop = sequences.query_offsets[s + 1] * call.heads;
    for (int64_t column = first * call.heads; column < stop;) {
      const int64_t query = column / call.heads;
      const int64_t end = call.selection ? (query + 1) * call.heads : stop;
      const int columns = static_cast<int>(least(COLUMNS, end - column));
      const int64_t last = (column + columns - 1) / call.heads;
      const int64_t keys = call.selection ? selected(call.selection + query * call.topk, call.topk)
                                          : sequences.first_positions[s] + last - first + 1;
      *blocks++ = {s, column, columns, keys};
      column += columns;
    }
  }
}

template <class Dot>
void Attention<Dot>::run() const {
  int64_t count = 0;
  for (int64_t s = 0; s < call.sequences.count; ++s) count += blocks_of(s);
  if (!count) return;
  Scratch block_memory(Scratch::rounded(count * sizeof(Block)));
  Block* blocks = block_memory.take<Block>(count);
  fill_blocks(blocks);
  int64_t longest = 0;
  for (int64_t b = 0; b < count; ++b) longest = blocks[b].keys > longest ? blocks[b].keys : longest;
  const Ranges ranges = cut(count, longest, TILE);
  const int64_t items = count * ranges.count;

  const int threads = static_cast<int>(least(call.threads, items));
  const int64_t states_bytes = ranges.count > 1 ? items * (state_bytes() + Scratch::rounded(sizeof(State))) : 0;
  Scratch memory(threads * (worker_bytes() + Scratch::rounded(sizeof(Worker))) + states_bytes);
  Worker* workers = memory.take<Worker>(threads);
  for (int thread = 0; thread < threads; ++thread) workers[thread] = take_worker(memory);
  State* states = ranges.count > 1 ? memory.take<State>(items) : nullptr;
  for (int64_t item = 0; states && item < items; ++item) states[item] = take_state(memory);

  auto attend_item = [&](int item, int thread) {
    const Block& block = blocks[item / ranges.count];
    const int64_t start = item % ranges.count * ranges.keys;
    if (start && start >= block.keys) return;
    const State state = states ? states[item] : workers[thread].state;
    attend(block, start, least(start + ranges.keys, block.keys), workers[thread], state);
    if (!states) write(block, state);
  };
  parallel(threads, static_cast<int>(items), attend_item);
  if (!states) return;
  auto combine_item = [&](int item, int) {
    combine(blocks[item], states + item * ranges.count, ranges.used(blocks[item].keys));
    write(blocks[item], states[item * ranges.count]);
  };
  parallel(threads, static_cast<int>(count), combine_item);
}

// ---- memory ----

template <class Dot>
int64_t Attention<Dot>::state_bytes() const {
  return Scratch::rounded(sums_size * COLUMNS * 4) + 2 * Scratch::rounded(COLUMNS * 4);
}

template <class Dot>
State Attention<Dot>::take_state(Scratch& scratch) const {
  float* out = scratch.take<float>(sums_size * COLUMNS);
  float* most = scratch.take<float>(COLUMNS);
  return {out, most, scratch.take<float>(COLUMNS)};
}

template <class Dot>
int64_t Attention<Dot>::worker_bytes() const {
  return Scratch::rounded(int64_t{words} * COLUMNS * 4) + Scratch::rounded(TILE * PANEL * 4) +
         Scratch::rounded(TILE * stride * 4) + Scratch::rounded(TILE / 2 * PANEL * 4) +
         Scratch::rounded(TILE / 2 * value_stride * 4) + state_bytes();
}

template <class Dot>
Worker Attention<Dot>::take_worker(Scratch& scratch) const {
  Worker worker;
  worker.q = scratch.take<Word>(int64_t{words} * COLUMNS);
  worker.scores = scratch.take<float>(TILE * PANEL);
  worker.keys = scratch.take<Word>(TILE * stride);
  worker.weights = scratch.take<Word>(TILE / 2 * PANEL);
  worker.values = scratch.take<Word>(TILE / 2 * value_stride);
  worker.state = take_state(scratch);
  return worker;
}

// ---- one block over one range ----

template <class Dot>
void Attention<Dot>::attend(const Block& block, int64_t start, int64_t stop, Worker& worker, State state) const {
  const Tiles tiles;
  pack_queries(block, worker.q);
  for (int c = 0; c < COLUMNS; ++c) state.most[c] = LOWEST, state.sum[c] = 0.0f;
  const char* rows[2][TILE];  // of this tile and of the next
  int count = locate(block, start, stop, rows[0]);
  bool first = true;
  for (int now = 0; count; start += TILE, now ^= 1, first = false) {
    const int next = locate(block, start + TILE, stop, rows[now ^ 1]);
    const Tile tile = load_tile(rows[now], count, worker);
    int visible[COLUMNS];
    const bool all = count_visible(block, start, count, visible);
    for (int c = 0; c < block.columns; c += PANEL) {
      const State panel = {state.out + c * sums_size, state.most + c, state.sum + c};
      const Word* q = worker.q + int64_t{c} * words;
      const Prefetch prefetch = {rows[now ^ 1], c ? 0 : next};
      if (block.columns - c > F32::width)
        attend_tile<COLUMN_REGISTERS>(tile, q, worker, panel, all ? nullptr : visible + c, first, prefetch);
      else
        attend_tile<1>(tile, q, worker, panel, all ? nullptr : visible + c, first, prefetch);
    }
    count = next;
  }
}

// How many keys of the tile that begins at position `start` each column sees; true: every column sees all.
template <class Dot>
bool Attention<Dot>::count_visible(const Block& block, int64_t start, int count, int* visible) const {
  if (call.selection) return true;
  const int64_t s = block.sequence;
  const int64_t seen = call.sequences.first_positions[s] - call.sequences.query_offsets[s] + 1 - start;  // by query 0
  if (seen + block.column / call.heads >= count) return true;
  for (int c = 0; c < COLUMNS; ++c) {
    const int64_t query = (block.column + least(c, block.columns - 1)) / call.heads;
    visible[c] = seen + query < 0 ? 0 : static_cast<int>(least(seen + query, count));
  }
  return false;
}

// Columns past the block's last are zero.
template <class Dot>
void Attention<Dot>::pack_queries(const Block& block, Word* panels) const {
  for (int c = 0; c < block.columns; c += PANEL) {
    const int count = static_cast<int>(least(PANEL, block.columns - c));
    const int64_t first = (block.column + c) * call.width;
    Word* panel = panels + int64_t{c} * words;
    if (call.format == Format::f32)
      pack_panel(static_cast<const float*>(call.q) + first, count, panel);
    else
      pack_panel(static_cast<const bf16*>(call.q) + first, count, panel);
  }
}

template <class Dot>
template <class From>
void Attention<Dot>::pack_panel(const From* q, int count, Word* panel) const {
  const int width = static_cast<int>(call.width);
  const From* rows[PANEL];
  for (int i = 0; i < count; ++i) rows[i] = q + i * call.width;
  if constexpr (Dot::numbers == 1 || sizeof(From) == sizeof(bf16)) {  // floats have been rounded before they are paired
    if (count > F32::width)
      pack_columns<Dot>(rows, count, width, panel);
    else
      pack_columns<Dot, F32::width>(rows, count, width, panel);
  }
}

// Where the rows of the tile are that begins at position (or entry) `start`; how many it has.
template <class Dot>
int Attention<Dot>::locate(const Block& block, int64_t start, int64_t stop, const char** rows) const {
  const int count = start < stop ? static_cast<int>(least(TILE, stop - start)) : 0;
  const int32_t* entries = call.selection ? call.selection + block.column / call.heads * call.topk + start : nullptr;
  for (int i = 0; i < count; ++i)
    rows[i] = call.rows + call.sequences.row(block.sequence, entries ? entries[i] : start + i) * call.row_bytes;
  return count;
}

template <class Dot>
Tile Attention<Dot>::load_tile(const char* const* rows, int count, Worker& worker) const {
  if (Dot::numbers == 1 && call.row_format == Format::f32 && !call.selection && call.row_bytes % 4 == 0 && words == call.width) {
    const Word* first = reinterpret_cast<const Word*>(rows[0]);
    return {count, {first, call.row_bytes / 4, 1}, {first, 1, call.row_bytes / 4}, count};
  }
  for (int i = 0; i < count; ++i) read_row(rows[i], reinterpret_cast<Number*>(worker.keys + i * stride));
  const Left keys = {worker.keys, stride, 1};
#if defined(FOVEAL_BF16)
  if constexpr (Dot::numbers == 2) {
    if (count % 2) std::memset(worker.keys + count * stride, 0, words * 4);
    for (int i = 0; i < count; i += 2) {
      const bf16* even = reinterpret_cast<const bf16*>(worker.keys + i * stride);
      for (int64_t v = 0; v < call.rank; v += F32::width)
        store_pairs(worker.values + i / 2 * value_stride + v, even + v, even + 2 * stride + v);
    }
    const int pairs = (count + 1) / 2;
    if (BY_TILES<Dot>) std::memset(worker.values + pairs * value_stride, 0, (TILE / 2 - pairs) * value_stride * sizeof(Word));
    return {count, keys, {worker.values, 1, value_stride}, pairs};
  }
#endif
  return {count, keys, {worker.keys, 1, stride}, count};
}

// Numbers past the row's last are zero as far as its last word goes.
template <class From, class To>
FOVEAL_INLINE void convert(const char* from, int64_t count, float scale, To* to) {
  const From* x = reinterpret_cast<const From*>(from);
  int64_t i = 0;
  for (; i + F32::width <= count; i += F32::width) store(to + i, load(x + i) * set1(scale));
  const int rest = static_cast<int>(count - i);
  if (rest) store_partial(to + i, load_partial(x + i, rest) * set1(scale), rest);
}

template <class Dot>
void Attention<Dot>::read_row(const char* row, Number* out) const {
  std::memset(out + call.width, 0, (words * Dot::numbers - call.width) * sizeof(Number));
  if (call.row_format == Format::f32) return convert<float>(row, call.width, 1.0f, out);
  if (call.row_format == Format::bf16) {
    if (sizeof(Number) == sizeof(bf16))
      std::memcpy(out, row, call.width * sizeof(bf16));
    else
      convert<bf16>(row, call.width, 1.0f, out);
    return;
  }
  const int64_t blocks = ceil_divide(call.rank, LATENT_BLOCK);
  for (int64_t b = 0; b < blocks; ++b) {
    float scale;
    std::memcpy(&scale, row + call.rank + 4 * b, 4);
    const int64_t first = b * LATENT_BLOCK;
    convert<e4m3>(row + first, least(LATENT_BLOCK, call.rank - first), scale, out + first);
  }
  convert<bf16>(row + call.rank + 4 * blocks, call.width - call.rank, 1.0f, out + call.rank);
}

template <class Dot>
template <int N>
void Attention<Dot>::attend_tile(const Tile& tile, const Word* q, Worker& worker, State state, const int* visible,
                                 bool first, Prefetch prefetch) const {
  constexpr int columns = N * F32::width, step = Products<Dot>::template keys_at_once<N>;
  for (int row = 0; row < tile.count; row += step) {
    // As many of the next rows as are multiplied here: all at once would wait for the memory. A last tile is shorter.
    for (int i = row; i < row + step && i < prefetch.count; ++i)
      for (int64_t byte = 0; byte < call.row_bytes; byte += 64) __builtin_prefetch(prefetch.rows[i] + byte, 0, 2);
    const Left keys = {tile.keys.words + row * tile.keys.row_step, tile.keys.row_step, 1};
    const int rows = tile.count - row < step ? tile.count - row : step;
    Products<Dot>::template score<N>(keys, rows, q, words, worker.scores + row * columns);
  }
  weigh<N>(tile, worker, state, visible, first);
  const Word* weights = Dot::numbers == 1 ? reinterpret_cast<const Word*>(worker.scores) : worker.weights;
  Products<Dot>::template add<N>(tile.values, tile.value_words, weights, call.rank, state.out, first);
}

FOVEAL_INLINE F32 load_counts(const int* counts) {
  float numbers[F32::width];
  for (int i = 0; i < F32::width; ++i) numbers[i] = static_cast<float>(counts[i]);
  return load(numbers);
}

// -inf where only `seen` <= j keys are seen, so that key j is not, otherwise 0.
FOVEAL_INLINE F32 hidden(F32 seen, int j) {
  return where_at_least(zero() - seen, static_cast<float>(-j), set1(-__builtin_inff()));
}

// Turns scores into weights, and brings maximum, sum and out up to date.
template <class Dot>
template <int N>
void Attention<Dot>::weigh(const Tile& tile, Worker& worker, State state, const int* visible, bool first) const {
  constexpr int columns = N * F32::width;
  for (int n = 0; n < N; ++n) {
    float* scores = worker.scores + n * F32::width;
    F32 seen = zero();
    if (visible) seen = load_counts(visible + n * F32::width);
    F32 most = set1(LOWEST);
    for (int j = 0; j < tile.count; ++j) {
      F32 score = load(scores + j * columns) * set1(call.scale);
      if (visible) score = where_at_least(seen, static_cast<float>(j + 1), score) + hidden(seen, j);
      most = max(most, score);
      store(scores + j * columns, score);
    }
    F32 running = load(state.most + n * F32::width), before = load(state.sum + n * F32::width);
    if (first) {
      running = most;
    } else if (maximum(most - running) > LAG) {
      const F32 higher = max(most, running);
      const F32 shrink = exp(running - higher);
      Products<Dot>::scale(state.out, call.rank, columns, n, shrink);
      before = before * shrink;
      running = higher;
    }
    store(state.most + n * F32::width, running);
    F32 sum = zero();  // of this tile first, which rounds less
    if constexpr (Dot::numbers == 1) {
      for (int j = 0; j < tile.count; ++j) {
        const F32 weight = exp(load(scores + j * columns) - running);
        sum = sum + weight;
        store(scores + j * columns, weight);
      }
    }
#if defined(FOVEAL_BF16)
    else {
      for (int j = 0; j < tile.count; j += 2) {
        const F32 even = exp(load(scores + j * columns) - running);
        const F32 odd = j + 1 < tile.count ? exp(load(scores + (j + 1) * columns) - running) : zero();
        sum = sum + even + odd;
        store_pairs(worker.weights + j / 2 * columns + n * F32::width, even, odd);
      }
      for (int word = (tile.count + 1) / 2; BY_TILES<Dot> && word < TILE / 2; ++word)
        store_pairs(worker.weights + word * columns + n * F32::width, zero(), zero());
    }
#endif
    store(state.sum + n * F32::width, before + sum);
  }
}

// ---- results ----

// All ranges of a block into the state of the first, by their maxima.
template <class Dot>
void Attention<Dot>::combine(const Block& block, const State* states, int64_t count) const {
  for (int c = 0; c < block.columns; c += PANEL) {
    const int columns = block.columns - c > F32::width ? PANEL : F32::width;
    for (int i = 0; i < columns; i += F32::width) {
      F32 most = set1(LOWEST), sum = zero();
      for (int64_t r = 0; r < count; ++r) most = max(most, load(states[r].most + c + i));
      for (int64_t r = 0; r < count; ++r) {
        const F32 share = exp(load(states[r].most + c + i) - most);
        sum = fma(share, load(states[r].sum + c + i), sum);
        float* out = states[0].out + c * sums_size;
        if (r)
          Products<Dot>::add_scaled(out, states[r].out + c * sums_size, call.rank, columns, i / F32::width, share);
        else
          Products<Dot>::scale(out, call.rank, columns, i / F32::width, share);
      }
      store(states[0].sum + c + i, sum);
    }
  }
}

// Divides by the sums and transposes; columns that saw nothing are zero.
template <class Dot>
void Attention<Dot>::write(const Block& block, State state) const {
  for (int c = 0; c < block.columns; ++c) {
    const int panel = c / PANEL * PANEL;
    const int columns = block.columns - panel > F32::width ? PANEL : F32::width;
    const float* from = state.out + panel * sums_size;
    const float share = block.keys ? 1.0f / state.sum[c] : 0.0f;
    const int64_t row = (block.column + c) * call.rank;
    for (int64_t v = 0; v < call.rank; v += F32::width) {
      const int n = static_cast<int>(least(F32::width, call.rank - v));
      const F32 values = block.keys ? Products<Dot>::values_of(from, call.rank, columns, c - panel, v) * set1(share) : zero();
      if (call.format == Format::f32)
        store_partial(static_cast<float*>(call.out) + row + v, values, n);
      else
        store_partial(static_cast<bf16*>(call.out) + row + v, values, n);
    }
  }
}

}  // namespace

void latent_attention(const LatentAttention& call) {
  call.format == Format::bf16 ? Attention<Bf16Dot>(call).run() : Attention<FloatDot>(call).run();
}

}  // namespace foveal::FOVEAL_ISA
