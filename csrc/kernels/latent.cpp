// Absorbed latent attention, dense and over a selection.
//
// The columns of all products are (query, head) pairs, so that a product never has to be transposed: for a tile of keys
//   scores[key, column]   =  keys[key, word]       . q[word, column]
//   out[value, column]   +=  keys^T[value, key]    . exp(scores - maximum)[key, column]
// (latent_products.h; with AMX the second one is made the other way round). The tile is gathered once into words that the
// products broadcast (floats; pairs of bf16 where the machine multiplies those), 64 keys and 144 KiB for DeepSeek-V3 in float,
// and serves up to COLUMNS columns: one query's heads over a selection, heads of several queries of a sequence otherwise. It
// stays in the level-two cache while the panels of q and out (36 and 32 KiB for 16 columns) pass by. Rows that have the words'
// format already and lie in order are read where they are: floats, and by tiles of AMX keys of bf16. The next tile's rows are
// prefetched all the while.
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
  Word* q;              // panels [words, columns]
  const Block* packed;  // whose queries these are
  float* scores;        // [TILE, PANEL]; the weights where a word is a float
  Word* keys;           // [TILE, stride]; the values too where a word is a float
  Word* weights;        // where a word is a pair, of keys: TILE / 2 for each column of a panel
  Word* values;         // likewise: [TILE / 2, value_stride]
  State state;
};

// Keys [start, stop) of a block.
struct Piece {
  const Block* block;
  int64_t start, stop;
};

struct Tile {
  int count;
  Left keys, values;
  int value_words;
  const char* const* rows;  // where whole blocks of keys are read where they are stored, otherwise null
};

// Rows that the next tile will read: fetched a few at a time, all at once would wait for the memory.
struct Ahead {
  const char* const* rows;
  int count;
  int64_t row_bytes;

  // Those of a step of so much work.
  FOVEAL_INLINE void fetch(int64_t step, int64_t steps) const {
    for (int64_t i = count * step / steps; i < count * (step + 1) / steps; ++i)
      for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(rows[i] + byte, 0, 2);
  }
};

template <class Dot>
class Attention {
 public:
  explicit Attention(const LatentAttention& call)
      : call(call),
        words(row_words<Dot>(static_cast<int>(call.width))),
        stride(odd_lines(words)),
        sums_size(Products<Dot>::size(call.rank)),
        value_stride(Dot::numbers == 1 ? 0 : odd_lines(sums_size)) {}

  void run() const;

 private:
  using Number = typename Dot::Number;
  static constexpr int TILE = Products<Dot>::KEYS;
  static_assert(Dot::numbers == 2 || TILE == PAGE_SIZE, "the rows of a dense tile of floats lie in order");

  int64_t blocks_of(int64_t sequence) const;
  void fill_blocks(Block* blocks) const;
  int64_t state_bytes() const;
  State take_state(Scratch& scratch) const;
  int64_t worker_bytes() const;
  Worker take_worker(Scratch& scratch) const;

  void attend(Piece piece, Piece following, Worker& worker, State state) const;
  bool count_visible(const Block& block, int64_t start, int count, int* visible) const;
  void pack_queries(const Block& block, Word* panels) const;
  template <class From>
  void pack_panel(const From* q, int count, Word* panel) const;
  int locate(Piece piece, const char** rows) const;
  bool in_order(Format format) const;
  Tile load_tile(const char* const* rows, int count, Worker& worker) const;
  int load_pairs(const char* const* rows, int count, bool in_place, Worker& worker) const;
  Left keys_at(const Tile& tile, int row, int rows) const;
  void read_row(const char* row, Number* out) const;
  template <int N>
  void attend_tile(const Tile& tile, const Word* q, Worker& worker, State state, const int* visible, bool first,
                   Ahead ahead) const;
  template <int N>
  void hide(int row, int rows, float* scores, const int* visible, F32* most) const;
  template <int N>
  void weigh(const Tile& tile, Worker& worker, State state, const F32* most, bool first) const;
  void combine(const Block& block, const State* states, int64_t count) const;
  void write(const Block& block, State state) const;

  const LatentAttention& call;
  const int words;
  const int64_t stride, sums_size, value_stride;
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

  auto piece_of = [&](int64_t item) -> Piece {
    if (item >= items) return {blocks, 0, 0};
    const Block* block = blocks + item / ranges.count;
    const int64_t start = item % ranges.count * ranges.keys;
    return {block, start, least(start + ranges.keys, block->keys)};
  };
  auto attend_item = [&](int item, int thread) {
    const Piece piece = piece_of(item);
    if (piece.start && piece.start >= piece.stop) return;
    const State state = states ? states[item] : workers[thread].state;
    attend(piece, piece_of(item + threads), workers[thread], state);
    if (!states) write(*piece.block, state);
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
  worker.packed = nullptr;
  worker.scores = scratch.take<float>(TILE * PANEL);
  worker.keys = scratch.take<Word>(TILE * stride);
  worker.weights = scratch.take<Word>(TILE / 2 * PANEL);
  worker.values = scratch.take<Word>(TILE / 2 * value_stride);
  worker.state = take_state(scratch);
  return worker;
}

// ---- one block over one range ----

// `following`: what this thread will probably attend to next, so that its first rows are not waited for.
template <class Dot>
void Attention<Dot>::attend(Piece piece, Piece following, Worker& worker, State state) const {
  const Tiles tiles;
  const Block& block = *piece.block;
  if (worker.packed != &block) pack_queries(block, worker.q), worker.packed = &block;
  for (int c = 0; c < COLUMNS; ++c) state.most[c] = LOWEST, state.sum[c] = 0.0f;
  const char* rows[2][TILE];  // of this tile and of the next
  int count = locate(piece, rows[0]);
  bool first = true;
  for (int now = 0; count; now ^= 1, first = false) {
    const int64_t start = piece.start;
    piece.start += TILE;
    const int next = locate(piece, rows[now ^ 1]);
    const int wanted = next ? next : locate(following, rows[now ^ 1]);
    const Tile tile = load_tile(rows[now], count, worker);
    int visible[COLUMNS];
    const bool all = count_visible(block, start, count, visible);
    for (int c = 0; c < block.columns; c += PANEL) {
      const State panel = {state.out + c * sums_size, state.most + c, state.sum + c};
      const Word* q = worker.q + int64_t{c} * words;
      const int stop = static_cast<int>(least(c + PANEL, block.columns));
      const int begin = wanted * c / block.columns;
      const Ahead ahead = {rows[now ^ 1] + begin, wanted * stop / block.columns - begin, call.row_bytes};
      if (block.columns - c > F32::width)
        attend_tile<COLUMN_REGISTERS>(tile, q, worker, panel, all ? nullptr : visible + c, first, ahead);
      else
        attend_tile<1>(tile, q, worker, panel, all ? nullptr : visible + c, first, ahead);
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

// Where the rows of the tile are that the piece begins with; how many it has.
template <class Dot>
int Attention<Dot>::locate(Piece piece, const char** rows) const {
  const Block& block = *piece.block;
  const int count = piece.start < piece.stop ? static_cast<int>(least(TILE, piece.stop - piece.start)) : 0;
  const int32_t* entries = call.selection ? call.selection + block.column / call.heads * call.topk + piece.start : nullptr;
  for (int i = 0; i < count; ++i) {
    const int64_t position = entries ? entries[i] : piece.start + i;
    rows[i] = call.rows + call.sequences.row(block.sequence, position) * call.row_bytes;
  }
  return count;
}

// Whether rows are whole words of this format that follow one another, page by page at least.
template <class Dot>
bool Attention<Dot>::in_order(Format format) const {
  return call.row_format == format && !call.selection && call.row_bytes % 4 == 0 && words * Dot::numbers == call.width;
}

template <class Dot>
Tile Attention<Dot>::load_tile(const char* const* rows, int count, Worker& worker) const {
  if (Dot::numbers == 1 && in_order(Format::f32)) {
    const Word* first = reinterpret_cast<const Word*>(rows[0]);
    return {count, {first, call.row_bytes / 4, 1}, {first, 1, call.row_bytes / 4}, count, nullptr};
  }
  const Left keys = {worker.keys, stride, 1};
  if constexpr (Dot::numbers == 2) {
    const bool in_place = BY_TILES<Dot> && in_order(Format::bf16);
    const int pairs = load_pairs(rows, count, in_place, worker);
    return {count, keys, {worker.values, 1, value_stride}, pairs, in_place ? rows : nullptr};
  }
  for (int i = 0; i < count; ++i) read_row(rows[i], reinterpret_cast<Number*>(worker.keys + i * stride));
  return {count, keys, {worker.keys, 1, stride}, count, nullptr};
}

// Rows as keys, but those of whole blocks that can be read in place, and as pairs of values; how many pairs are needed.
template <class Dot>
int Attention<Dot>::load_pairs(const char* const* rows, int count, bool in_place, Worker& worker) const {
  constexpr int step = Products<Dot>::KEYS_IN_STEP;
  const int kept = in_place ? count / step * step : 0;
  if (count % 2) std::memset(worker.keys + count * stride, 0, words * 4);
  for (int i = 0; i < count; i += 2) {
    const bf16* pair[2];
    for (int half = 0; half < 2; ++half) {
      bf16* key = reinterpret_cast<bf16*>(worker.keys + (i + half) * stride);
      if (i + half >= kept && i + half < count) read_row(rows[i + half], reinterpret_cast<Number*>(key));
      pair[half] = i + half < kept ? reinterpret_cast<const bf16*>(rows[i + half]) : key;
    }
    Products<Dot>::pair_values(pair[0], pair[1], call.rank, worker.values + i / 2 * value_stride);
  }
  const int pairs = (count + 1) / 2, needed = static_cast<int>(round_up(count, step) + 1) / 2;
  std::memset(worker.values + pairs * value_stride, 0, (needed - pairs) * value_stride * sizeof(Word));
  return needed;
}

// `rows` keys of a tile from `row` on.
template <class Dot>
Left Attention<Dot>::keys_at(const Tile& tile, int row, int rows) const {
  if (tile.rows && rows == Products<Dot>::KEYS_IN_STEP)
    return {reinterpret_cast<const Word*>(tile.rows[row]), call.row_bytes / 4, 1};
  return {tile.keys.words + row * tile.keys.row_step, tile.keys.row_step, 1};
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
                                 bool first, Ahead ahead) const {
  constexpr int columns = N * F32::width, step = Products<Dot>::template keys_at_once<N>;
  F32 most[N];
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) most[n] = set1(LOWEST);
  const int steps = static_cast<int>(ceil_divide(tile.count, step)) + Products<Dot>::steps_of_add(call.rank);
  int done = 0;
  for (int row = 0; row < tile.count; row += step) {
    const int rows = tile.count - row < step ? tile.count - row : step;
    ahead.fetch(done++, steps);
    const Left keys = keys_at(tile, row, rows);
    Products<Dot>::template score<N>(keys, rows, q, words, worker.scores + row * columns);
    hide<N>(row, rows, worker.scores, visible, most);
  }
  weigh<N>(tile, worker, state, most, first);
  const Word* weights = Dot::numbers == 1 ? reinterpret_cast<const Word*>(worker.scores) : worker.weights;
  Products<Dot>::template add<N>(tile.values, tile.value_words, weights, call.rank, state.out, first,
                                      [&] { ahead.fetch(done++, steps); });
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

// Scales the scores of `rows` keys from `row` on, hides what a column does not see, and looks for the highest.
template <class Dot>
template <int N>
FOVEAL_INLINE void Attention<Dot>::hide(int row, int rows, float* scores, const int* visible, F32* most) const {
  constexpr int columns = N * F32::width;
#pragma GCC unroll 2
  for (int n = 0; n < N; ++n) {
    F32 seen = zero();
    if (visible) seen = load_counts(visible + n * F32::width);
    float* score_at = scores + row * columns + n * F32::width;
    for (int j = row; j < row + rows; ++j, score_at += columns) {
      F32 score = load(score_at) * set1(call.scale);
      if (visible) score = where_at_least(seen, static_cast<float>(j + 1), score) + hidden(seen, j);
      most[n] = max(most[n], score);
      store(score_at, score);
    }
    const int stop = static_cast<int>(round_up(row + rows, Products<Dot>::KEYS_IN_STEP));
    for (int j = row + rows; j < stop; ++j, score_at += columns) store(score_at, set1(-__builtin_inff()));
  }
}

// Turns scores into weights, and brings maximum, sum and out up to date.
template <class Dot>
template <int N>
void Attention<Dot>::weigh(const Tile& tile, Worker& worker, State state, const F32* most, bool first) const {
  Word* weights = Dot::numbers == 1 ? reinterpret_cast<Word*>(worker.scores) : worker.weights;
  for (int n = 0; n < N; ++n) {
    F32 running = load(state.most + n * F32::width), before = load(state.sum + n * F32::width);
    if (first) {
      running = most[n];
    } else if (maximum(most[n] - running) > LAG) {
      const F32 higher = max(most[n], running);
      const F32 shrink = exp(running - higher);
      Products<Dot>::scale(state.out, call.rank, N * F32::width, n, shrink);
      before = before * shrink;
      running = higher;
    }
    store(state.most + n * F32::width, running);
    // The sum of this tile first, which rounds less.
    const F32 sum = Products<Dot>::template weigh<N>(worker.scores, tile.count, running, n, weights);
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
      float* parts[RANGE_ITEMS];
      F32 shares[RANGE_ITEMS];
      for (int64_t r = 0; r < count; ++r) {
        parts[r] = states[r].out + c * sums_size;
        shares[r] = exp(load(states[r].most + c + i) - most);
        sum = fma(shares[r], load(states[r].sum + c + i), sum);
      }
      Products<Dot>::combine(parts, shares, static_cast<int>(count), call.rank, columns, i / F32::width);
      store(states[0].sum + c + i, sum);
    }
  }
}

template <class Number>
FOVEAL_INLINE void store_up_to(Number* p, F32 x, int n) {
  n == F32::width ? store(p, x) : store_partial(p, x, n);
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
        store_up_to(static_cast<float*>(call.out) + row + v, values, n);
      else
        store_up_to(static_cast<bf16*>(call.out) + row + v, values, n);
    }
  }
}

}  // namespace

void latent_attention(const LatentAttention& call) {
  call.format == Format::bf16 ? Attention<Bf16Dot>(call).run() : Attention<FloatDot>(call).run();
}

}  // namespace foveal::FOVEAL_ISA
