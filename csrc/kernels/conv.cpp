// Causal convolution. A block of channels goes through all tokens of its sequence; the rows that a token's taps read were
// read for the tokens before it, so each number comes from memory once.
#include "kernels/conv.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace foveal::FOVEAL_ISA {
namespace {

constexpr int64_t USUAL_TAPS = 4;     // of released models
constexpr int64_t CHANNELS = 256;     // of a block
constexpr int64_t NUMBERS = 1 << 15;  // products; fewer are not worth waking a second thread

// Some channels of one sequence.
template <class Number>
struct Block {
  PerToken<Number> x, past;  // the sequence's inputs, and the taps - 1 before them
  const Number *weight, *bias;
  int64_t count;             // of channels

  // The inputs at a place of the sequence; places before its first token are negative.
  FOVEAL_INLINE const Number* row(int64_t place, int64_t taps) const {
    return place < 0 ? past.of(place + taps - 1) : x.of(place);
  }
};

// Weights by tap, in the block's order of channels.
template <class Number>
FOVEAL_INLINE void turn_weights(const Number* weight, int64_t count, int64_t taps, Number* turned) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t tap = 0; tap < taps; ++tap) turned[tap * CHANNELS + i] = weight[i * taps + tap];
}

template <class Number>
void convolve(const Block<Number>& block, const Number* const* rows, const Number* weights, int64_t taps, Number* y) {
  int64_t i = 0;
  for (; i + F32::width <= block.count; i += F32::width) {
    F32 result = block.bias ? load(block.bias + i) : zero();
    for (int64_t tap = 0; tap < taps; ++tap)
      result = fma(load(weights + tap * CHANNELS + i), load(rows[tap] + i), result);
    store(y + i, result);
  }
  if (const int rest = static_cast<int>(block.count - i)) {
    F32 result = block.bias ? load_partial(block.bias + i, rest) : zero();
    for (int64_t tap = 0; tap < taps; ++tap)
      result = fma(load_partial(weights + tap * CHANNELS + i, rest), load_partial(rows[tap] + i, rest), result);
    store_partial(y + i, result, rest);
  }
}

template <class Number>
void run_block(const CausalConv& conv, int64_t sequence, int64_t first, char* memory) {
  const int64_t channels = conv.channels, taps = conv.taps;
  const int64_t begin = conv.sequences.offsets[sequence], length = conv.sequences.offsets[sequence + 1] - begin;
  const int64_t rest = channels - first, past = sequence * (taps - 1) * channels + first;
  const Block<Number> block = {
      {static_cast<const Number*>(conv.x) + begin * conv.x_stride + first, conv.x_stride},
      {static_cast<const Number*>(conv.state_in) + past, channels},
      static_cast<const Number*>(conv.weight) + first * taps,
      conv.bias ? static_cast<const Number*>(conv.bias) + first : nullptr,
      rest < CHANNELS ? rest : CHANNELS,
  };
  Number* weights = Scratch::take<Number>(memory, taps * CHANNELS);
  const Number** rows = Scratch::take<const Number*>(memory, taps);
  if (taps == USUAL_TAPS)  // known to the compiler, which then moves whole registers
    turn_weights(block.weight, block.count, USUAL_TAPS, weights);
  else
    turn_weights(block.weight, block.count, taps, weights);
  for (int64_t t = 0; t < length; ++t) {
    for (int64_t tap = 0; tap < taps; ++tap) rows[tap] = block.row(t - taps + 1 + tap, taps);
    convolve(block, rows, weights, taps, static_cast<Number*>(conv.y) + (begin + t) * channels + first);
  }
  Number* last = static_cast<Number*>(conv.state_out) + past;
  for (int64_t i = 0; i < taps - 1; ++i)
    std::memcpy(last + i * channels, block.row(length - taps + 1 + i, taps), block.count * sizeof(Number));
}

template <class Number>
void run(const CausalConv& conv) {
  const int64_t blocks = (conv.channels + CHANNELS - 1) / CHANNELS;
  const int threads = conv.sequences.tokens() * conv.channels * conv.taps < NUMBERS ? 1 : conv.threads;
  const int64_t space = Scratch::space<Number>(conv.taps * CHANNELS) + Scratch::space<const Number*>(conv.taps);
  Scratch scratch(threads * space);
  char* memory = scratch.take<char>(threads * space);
  auto body = [&](int item, int thread) {
    run_block<Number>(conv, item / blocks, item % blocks * CHANNELS, memory + thread * space);
  };
  parallel(threads, static_cast<int>(conv.sequences.count * blocks), body);
}

}  // namespace

void causal_conv(const CausalConv& conv) { conv.format == Format::f32 ? run<float>(conv) : run<bf16>(conv); }

}  // namespace foveal::FOVEAL_ISA
