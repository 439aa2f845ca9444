// Gradients of the selective scan. A block of channels goes through all sequences, chunk by chunk from the last one; what
// it adds to the gradients of B and C, which are sums over channels, has memory of its own: threads change nothing.
//
// Four channels at a time, and as many of their states as fill a register, go through a chunk twice: forward from the
// chunk's checkpoint, which leaves the states and decays of its tokens in level-one cache, and back with the gradient
// of the states in registers. The states' memory is a chunk's, whatever the context.
#include "kernels/scan.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"

namespace foveal::FOVEAL_ISA {
namespace {

constexpr int64_t TOGETHER = 4;       // channels
constexpr int64_t NUMBERS = 1 << 13;  // updates of one number; fewer are not worth waking a second thread

// Some tokens of one sequence.
struct Chunk {
  int64_t sequence, first, count;
  const float* states;  // before the first of them: [channels, states]
};

// A thread's memory.
struct Share {
  float *b, *c, *d_b, *d_c;  // [chunk, padded]
  float *before, *decay;     // [chunk, TOGETHER, register]: the states before each token, and what they decay by
  float *d_input, *d_rate;   // [chunk, TOGETHER]: gradients of dt u, and of dt in exp(dt A)

  static int64_t space(int64_t chunk, int64_t padded) {
    return 4 * Scratch::space<float>(chunk * padded) + 2 * Scratch::space<float>(chunk * TOGETHER * F32::width) +
           2 * Scratch::space<float>(chunk * TOGETHER);
  }
  Share(char* memory, int64_t chunk, int64_t padded)
      : b(Scratch::take<float>(memory, chunk * padded)),
        c(Scratch::take<float>(memory, chunk * padded)),
        d_b(Scratch::take<float>(memory, chunk * padded)),
        d_c(Scratch::take<float>(memory, chunk * padded)),
        before(Scratch::take<float>(memory, chunk * TOGETHER * F32::width)),
        decay(Scratch::take<float>(memory, chunk * TOGETHER * F32::width)),
        d_input(Scratch::take<float>(memory, chunk * TOGETHER)),
        d_rate(Scratch::take<float>(memory, chunk * TOGETHER)) {}
};

FOVEAL_INLINE void store_up_to(float* p, F32 x, int64_t n) {
  n >= F32::width ? store(p, x) : store_partial(p, x, static_cast<int>(n));
}

template <int count>
FOVEAL_INLINE void add_sums(float* p, const F32* x) {
  if constexpr (count == 4) {
    float sums[4];
    store_sums(sums, x[0], x[1], x[2], x[3]);
    for (int i = 0; i < 4; ++i) p[i] += sums[i];
  } else {
    p[0] += sum(x[0]);
  }
}

// `count` channels and a register of their states, from state j on. Lanes past the last state hold zeros.
template <int count>
FOVEAL_INLINE void go_back(const ScanGradient& scan, const Chunk& chunk, const Share& share, int64_t channel,
                           int64_t j) {
  const int64_t states = scan.states, padded = round_up(states, F32::width), lanes = states - j;
  float* d_states = scan.d_state_in + chunk.sequence * scan.channels * states;
  F32 a[count], h[count], g[count], d_a[count];
  for (int i = 0; i < count; ++i) {
    const int64_t place = (channel + i) * states + j;
    a[i] = load_up_to(scan.a + place, lanes), h[i] = load_up_to(chunk.states + place, lanes);
    g[i] = load_up_to(d_states + place, lanes), d_a[i] = load_up_to(scan.d_a + place, lanes);
  }
  for (int64_t t = 0; t < chunk.count; ++t) {
    const float *u = scan.u.of(chunk.first + t) + channel, *dt = scan.dt.of(chunk.first + t) + channel;
    const F32 b = load(share.b + t * padded + j);
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      const int64_t place = (t * TOGETHER + i) * F32::width;
      const F32 decay = exp2(set1(dt[i] * LOG2E) * a[i]);
      store(share.before + place, h[i]), store(share.decay + place, decay);
      h[i] = fma(set1(dt[i] * u[i]), b, decay * h[i]);
    }
  }
  for (int64_t t = chunk.count - 1; t >= 0; --t) {
    const float *u = scan.u.of(chunk.first + t) + channel, *dt = scan.dt.of(chunk.first + t) + channel;
    const float* d_y = scan.d_y + (chunk.first + t) * scan.channels + channel;
    const int64_t row = t * padded + j;
    const F32 b = load(share.b + row), c = load(share.c + row);
    F32 d_b = load(share.d_b + row), d_c = load(share.d_c + row), d_input[count], d_rate[count];
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      const int64_t place = (t * TOGETHER + i) * F32::width;
      g[i] = fma(set1(d_y[i]), c, g[i]);
      d_c = fma(set1(d_y[i]), h[i], d_c);
      d_b = fma(set1(dt[i] * u[i]), g[i], d_b);
      d_input[i] = g[i] * b;
      h[i] = load(share.before + place);
      g[i] = g[i] * load(share.decay + place);
      const F32 d_exponent = g[i] * h[i];
      d_rate[i] = d_exponent * a[i];
      d_a[i] = fma(d_exponent, set1(dt[i]), d_a[i]);
    }
    store(share.d_b + row, d_b), store(share.d_c + row, d_c);
    add_sums<count>(share.d_input + t * TOGETHER, d_input), add_sums<count>(share.d_rate + t * TOGETHER, d_rate);
  }
  for (int i = 0; i < count; ++i) {
    const int64_t place = (channel + i) * states + j;
    store_up_to(d_states + place, g[i], lanes), store_up_to(scan.d_a + place, d_a[i], lanes);
  }
}

template <int count>
void run_channels(const ScanGradient& scan, const Chunk& chunk, const Share& share, int64_t channel) {
  std::memset(share.d_input, 0, chunk.count * TOGETHER * sizeof(float));
  std::memset(share.d_rate, 0, chunk.count * TOGETHER * sizeof(float));
  for (int64_t j = 0; j < scan.states; j += F32::width) go_back<count>(scan, chunk, share, channel, j);
  for (int64_t t = 0; t < chunk.count; ++t) {
    const int64_t token = chunk.first + t, place = token * scan.channels + channel;
    const float *u = scan.u.of(token) + channel, *dt = scan.dt.of(token) + channel;
    for (int i = 0; i < count; ++i) {
      const float d_input = share.d_input[t * TOGETHER + i];
      scan.d_u[place + i] = d_input * dt[i];
      scan.d_dt[place + i] = d_input * u[i] + share.d_rate[t * TOGETHER + i];
    }
  }
}

// One chunk for one block of channels.
void run_chunk(const ScanGradient& scan, const Chunk& chunk, const Share& share, int64_t block) {
  const int64_t states = scan.states, padded = round_up(states, F32::width);
  const int64_t size = chunk.count * padded * sizeof(float);
  std::memset(share.b, 0, size), std::memset(share.c, 0, size);
  std::memset(share.d_b, 0, size), std::memset(share.d_c, 0, size);
  for (int64_t t = 0; t < chunk.count; ++t) {
    std::memcpy(share.b + t * padded, scan.b.of(chunk.first + t), states * sizeof(float));
    std::memcpy(share.c + t * padded, scan.c.of(chunk.first + t), states * sizeof(float));
  }
  int64_t channel = block * scan.block, last = channel + scan.block;
  if (last > scan.channels) last = scan.channels;
  for (; channel + TOGETHER <= last; channel += TOGETHER) run_channels<TOGETHER>(scan, chunk, share, channel);
  for (; channel < last; ++channel) run_channels<1>(scan, chunk, share, channel);
  for (int64_t t = 0; t < chunk.count; ++t) {
    const int64_t place = (block * scan.sequences.tokens() + chunk.first + t) * states;
    std::memcpy(scan.d_b + place, share.d_b + t * padded, states * sizeof(float));
    std::memcpy(scan.d_c + place, share.d_c + t * padded, states * sizeof(float));
  }
}

void run_block(const ScanGradient& scan, const Share& share, int64_t block) {
  const int64_t first = block * scan.block, rest = scan.channels - first, all = scan.channels * scan.states;
  const int64_t bytes = (rest < scan.block ? rest : scan.block) * scan.states * sizeof(float);
  std::memset(scan.d_a + first * scan.states, 0, bytes);
  for (int64_t s = 0; s < scan.sequences.count; ++s) {
    const int64_t place = s * all + first * scan.states, chunk = scan.checkpoints.chunk;
    std::memcpy(scan.d_state_in + place, scan.d_state_out + place, bytes);
    const int64_t begin = scan.sequences.offsets[s], length = scan.sequences.offsets[s + 1] - begin;
    for (int64_t t = (length - 1) / chunk * chunk; t >= 0 && length; t -= chunk) {
      const float* states = scan.checkpoints.states + scan.checkpoints.row(s, begin, begin + t) * all;
      run_chunk(scan, {s, begin + t, length - t < chunk ? length - t : chunk, states}, share, block);
    }
  }
}

}  // namespace

void selective_scan_gradient(const ScanGradient& scan) {
  const int64_t chunk = scan.checkpoints.chunk, padded = round_up(scan.states, F32::width);
  const int threads = scan.sequences.tokens() * scan.channels * scan.states < NUMBERS ? 1 : scan.threads;
  const int64_t space = Share::space(chunk, padded);
  Scratch scratch(threads * space);
  char* memory = scratch.take<char>(threads * space);
  auto body = [&](int item, int thread) { run_block(scan, Share(memory + thread * space, chunk, padded), item); };
  parallel(threads, static_cast<int>((scan.channels + scan.block - 1) / scan.block), body);
}

}  // namespace foveal::FOVEAL_ISA
