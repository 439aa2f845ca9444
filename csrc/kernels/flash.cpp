// Flash attention: the pieces of a call. A sequence with one query is cut into ranges of keys (flash_single.cpp), any other
// into tiles of queries for each group of heads (flash_tile.cpp). Pieces do not depend on the number of threads.
#include "common/parallel.h"
#include "kernels/flash_parts.h"

namespace foveal::FOVEAL_ISA {
namespace {

// Multiply-accumulates that are worth waking another thread for.
constexpr int64_t THREAD_WORK = 1 << 19;

// The pieces of one sequence.
struct Pieces {
  int64_t first;    // its first piece among those of all sequences
  int64_t parts;    // ranges of keys of its only query, or 0: tiles
  int64_t results;  // where its parts' results begin, if there are several
};

struct Plan {
  int64_t pieces, results, work;
  bool singles, tiles;
};

int64_t tile_count(const Flash& flash, int64_t s) {
  return (query_count(flash, s) + tile_queries(flash) - 1) / tile_queries(flash);
}

Plan make_plan(const Flash& flash, Pieces* pieces) {
  Plan plan = {0, 0, 0, false, false};
  for (int64_t s = 0; s < flash.sequences.count; ++s) {
    const int64_t queries = query_count(flash, s);
    const bool single = queries == 1 && !flash.selection;
    const int64_t parts = single ? single_parts(flash, s) : 0;
    pieces[s] = {plan.pieces, parts, plan.results};
    plan.pieces += single ? parts : tile_count(flash, s) * flash.groups;
    if (parts > 1) plan.results += parts * single_result_size(flash);
    if (queries) plan.work += queries * visible(flash, s, queries - 1).count() * flash.heads * (flash.key_dim + flash.value_dim);
    single ? plan.singles = true : plan.tiles = true;
  }
  return plan;
}

int64_t sequence_of(const Pieces* pieces, int64_t count, int64_t piece) {
  int64_t low = 0, high = count;  // pieces[low].first <= piece < pieces[high].first
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (pieces[middle].first <= piece ? low : high) = middle;
  }
  return low;
}

void run_piece(const Flash& flash, const Pieces& pieces, int64_t s, int64_t index, float* results, char* scratch) {
  if (pieces.parts) {
    float* result = results + pieces.results + index * single_result_size(flash);
    return run_single(flash, s, index, pieces.parts, result, scratch);
  }
  // The last queries see most: they come first, so that no thread is left alone with a long piece.
  const int64_t tile = tile_count(flash, s) - 1 - index / flash.groups, first = tile * tile_queries(flash);
  const int64_t queries = smaller(tile_queries(flash), query_count(flash, s) - first);
  run_tile(flash, s, static_cast<int>(index % flash.groups), first, queries, scratch);
}

}  // namespace

void flash(const Flash& flash) {
  const int64_t count = flash.sequences.count;
  Scratch shared(Scratch::space<Pieces>(count));
  Pieces* pieces = shared.take<Pieces>(count);
  const Plan plan = make_plan(flash, pieces);
  const int threads = static_cast<int>(larger(1, smaller(flash.threads, plan.work / THREAD_WORK)));
  const int64_t share = larger(plan.singles ? single_scratch_bytes(flash) : 0, plan.tiles ? tile_scratch_bytes(flash) : 0);
  Scratch memory(threads * share + Scratch::space<float>(plan.results));
  char* scratch = memory.take<char>(threads * share);
  float* results = memory.take<float>(plan.results);
  auto body = [&](int piece, int thread) {
    const int64_t s = sequence_of(pieces, count, piece);
    run_piece(flash, pieces[s], s, piece - pieces[s].first, results, scratch + thread * share);
  };
  parallel(threads, static_cast<int>(plan.pieces), body);
  for (int64_t s = 0; s < count; ++s)
    if (pieces[s].parts > 1) combine_single(flash, s, pieces[s].parts, results + pieces[s].results);
}

}  // namespace foveal::FOVEAL_ISA
