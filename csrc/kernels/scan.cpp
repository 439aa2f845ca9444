// Selective scans. A block of channels goes through all tokens of its sequence while its states stay in level-one cache;
// four channels at a time share what they read of B and C, and their sums over the states are made together. The states
// keep their order in memory, so that one token costs one pass over them and no rearrangement.
#include "kernels/scan.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace foveal::FOVEAL_ISA {
namespace {

constexpr int64_t BLOCK_NUMBERS = 2048;  // of a block's states: with A as much again, half of level-one cache
constexpr int64_t MOST_CHANNELS = 512;   // of a block
constexpr int64_t NUMBERS = 1 << 15;     // updates of one number; fewer are not worth waking a second thread

// Rows of `size` numbers spread to rows of whole registers, and back.
void pad(const float* from, int64_t rows, int64_t size, float* to) {
  const int64_t padded = round_up(size, F32::width);
  std::memset(to, 0, rows * padded * sizeof(float));
  for (int64_t row = 0; row < rows; ++row) std::memcpy(to + row * padded, from + row * size, size * sizeof(float));
}
void unpad(const float* from, int64_t rows, int64_t size, float* to) {
  const int64_t padded = round_up(size, F32::width);
  for (int64_t row = 0; row < rows; ++row) std::memcpy(to + row * size, from + row * padded, size * sizeof(float));
}

void prefetch(const float* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(p + i);
}

// Some channels of one head of one sequence.
struct Block {
  int64_t sequence, head, first, count;
};

// A thread's memory.
struct Share {
  float *rate, *input;   // of each channel: dt log2(e), dt u
  float *b, *c;          // [padded], where the states do not fill registers; so are the next two
  float *a, *state;      // [channels, padded]

  static int64_t space(int64_t channels, int64_t padded) {
    return 2 * Scratch::space<float>(channels) + 2 * Scratch::space<float>(padded) +
           2 * Scratch::space<float>(channels * padded);
  }
  Share(char* memory, int64_t channels, int64_t padded)
      : rate(Scratch::take<float>(memory, channels)),
        input(Scratch::take<float>(memory, channels)),
        b(Scratch::take<float>(memory, padded)),
        c(Scratch::take<float>(memory, padded)),
        a(Scratch::take<float>(memory, channels * padded)),
        state(Scratch::take<float>(memory, channels * padded)) {}
};

// What one token does to a block. Rows are of `padded` numbers.
struct Token {
  const float *b, *c;
  F32 decay;      // SSD: exp(dt A)
  const float* a; // Mamba-1
  int64_t padded;
};

// `fixed`: the padded states of a channel where they are known here, which leaves registers for addresses, or 0.
// in_place: `in` is `out`.
template <bool by_state, int fixed, bool in_place, int count>
FOVEAL_INLINE void advance(const Token& token, const Share& share, int64_t channel, const float* in, float* out, float* y) {
  const int64_t padded = fixed ? fixed : token.padded, row = channel * padded;
  F32 sums[count];
  for (int i = 0; i < count; ++i) sums[i] = zero();
  for (int64_t j = 0; j < padded; j += F32::width) {
    const F32 b = load(token.b + j), c = load(token.c + j);
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      const int64_t place = row + i * padded + j;
      F32 decay = token.decay;
      if constexpr (by_state) decay = exp2(set1(share.rate[channel + i]) * load(token.a + place));
      const F32 h = fma(set1(share.input[channel + i]), b, decay * load((in_place ? out : in) + place));
      store(out + place, h);
      sums[i] = fma(h, c, sums[i]);
    }
  }
  if constexpr (count == 4)
    store_sums(y + channel, sums[0], sums[1], sums[2], sums[3]);
  else
    y[channel] = sum(sums[0]);
}

template <bool by_state, int fixed, bool in_place>
void advance_all(const Token& token, const Share& share, int64_t count, const float* in, float* out, float* y) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) advance<by_state, fixed, in_place, 4>(token, share, i, in, out, y);
  for (; i < count; ++i) advance<by_state, fixed, in_place, 1>(token, share, i, in, out, y);
}

// dt log2(e) and dt u of every channel.
void read_inputs(const float* u, const float* dt, int64_t count, const Share& share) {
  int64_t i = 0;
  for (; i + F32::width <= count; i += F32::width) {
    const F32 step = load(dt + i);
    store(share.rate + i, step * set1(LOG2E));
    store(share.input + i, step * load(u + i));
  }
  for (; i < count; ++i) share.rate[i] = dt[i] * LOG2E, share.input[i] = dt[i] * u[i];
}

// The same where the head has one dt.
void read_inputs(const float* u, float dt, int64_t count, const Share& share) {
  int64_t i = 0;
  for (; i + F32::width <= count; i += F32::width) store(share.input + i, set1(dt) * load(u + i));
  for (; i < count; ++i) share.input[i] = dt * u[i];
}

template <bool by_state, int fixed>
void scan_block(const Scan& scan, const Block& block, const Share& share) {
  const int64_t states = scan.states, padded = round_up(states, F32::width), channels = scan.heads * scan.channels;
  const int64_t begin = scan.sequences.offsets[block.sequence], end = scan.sequences.offsets[block.sequence + 1];
  const int64_t channel = block.head * scan.channels + block.first;
  const int64_t group = block.head / (scan.heads / scan.groups);
  const int64_t place = (block.sequence * channels + channel) * states;
  const float* in = scan.state_in + place;
  float *last = scan.state_out + place, *out = last;
  if (begin == end) {
    std::memcpy(last, in, block.count * states * sizeof(float));
    return;
  }
  Token token = {nullptr, nullptr, zero(), by_state ? scan.a + channel * states : nullptr, padded};
  if (padded != states) {
    pad(in, block.count, states, share.state);
    in = out = share.state;
    if (by_state) pad(token.a, block.count, states, share.a), token.a = share.a;
  }
  for (int64_t t = begin; t < end; ++t) {
    const float *u = scan.u.of(t) + channel, *dt = scan.dt.of(t) + (by_state ? channel : block.head);
    token.b = scan.b.of(t) + group * states, token.c = scan.c.of(t) + group * states;
    if (t + 1 < end) {
      prefetch(u + scan.u.stride, block.count);
      prefetch(dt + scan.dt.stride, by_state ? block.count : 1);
      prefetch(token.b + scan.b.stride, states), prefetch(token.c + scan.c.stride, states);
    }
    if constexpr (by_state) {
      read_inputs(u, dt, block.count, share);
    } else {
      read_inputs(u, *dt, block.count, share);
      token.decay = exp2(set1(*dt * scan.a[block.head] * LOG2E));
    }
    if (padded != states) {
      pad(token.b, 1, states, share.b), pad(token.c, 1, states, share.c);
      token.b = share.b, token.c = share.c;
    }
    const Checkpoints<float>& kept = scan.checkpoints;
    if (kept.states && (t - begin) % kept.chunk == 0)
      unpad(in, block.count, states, kept.states + (kept.row(block.sequence, begin, t) * channels + channel) * states);
    float* y = scan.y + t * channels + channel;
    if (in == out)
      advance_all<by_state, fixed, true>(token, share, block.count, in, out, y);
    else
      advance_all<by_state, fixed, false>(token, share, block.count, in, out, y);
    in = out;
  }
  if (padded != states) unpad(out, block.count, states, last);
}

template <bool by_state>
void run(const Scan& scan) {
  constexpr int USUAL_STATES = by_state ? 16 : 128;  // of released models
  const int64_t padded = round_up(scan.states, F32::width);
  int64_t most = BLOCK_NUMBERS * (by_state ? 1 : 2) / padded / 4 * 4;  // channels of a block
  most = most < 4 ? 4 : most > MOST_CHANNELS ? MOST_CHANNELS : most;
  const int64_t blocks = (scan.channels + most - 1) / most, of_sequence = scan.heads * blocks;
  const int64_t updates = scan.sequences.tokens() * scan.heads * scan.channels * scan.states;
  const int threads = updates < NUMBERS ? 1 : scan.threads;
  const int64_t space = Share::space(most, padded);
  Scratch scratch(threads * space);
  char* memory = scratch.take<char>(threads * space);
  auto body = [&](int item, int thread) {
    const int64_t first = item % blocks * most, rest = scan.channels - first;
    const Block block = {item / of_sequence, item % of_sequence / blocks, first, rest < most ? rest : most};
    const Share share(memory + thread * space, most, padded);
    padded == USUAL_STATES ? scan_block<by_state, USUAL_STATES>(scan, block, share)
                           : scan_block<by_state, 0>(scan, block, share);
  };
  parallel(threads, static_cast<int>(scan.sequences.count * of_sequence), body);
}

}  // namespace

void selective_scan(const Scan& scan) { run<true>(scan); }

void ssd(const Scan& scan) { run<false>(scan); }

}  // namespace foveal::FOVEAL_ISA
