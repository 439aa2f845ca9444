// Rope. A token's turns are spread into two rows of factors once, in level-one cache, and serve all of its heads: every
// output register is then x * along + partner(x) * across, where the partner is the other number of the pair.
#include "kernels/rope.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace foveal::FOVEAL_ISA {
namespace {

// Numbers for one thread at a time; fewer are not worth waking a second thread.
constexpr int64_t NUMBERS = 1 << 14;

struct Factors {
  float along[2 * MOST_ROPE_PAIRS], across[2 * MOST_ROPE_PAIRS];
};

void spread(const float* turns, int64_t pairs, bool interleaved, Factors& factors) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float real = turns[2 * i], imaginary = turns[2 * i + 1];
    const int64_t first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + pairs;
    factors.along[first] = factors.along[second] = real;
    factors.across[first] = -imaginary;
    factors.across[second] = imaginary;
  }
}

template <class Number>
void turn_neighbours(const Number* x, Number* out, int64_t count, const Factors& factors) {
  int64_t i = 0;
  for (; i + F32::width <= count; i += F32::width) {
    const F32 value = load(x + i);
    store(out + i, fma(value, load(factors.along + i), swap_pairs(value) * load(factors.across + i)));
  }
  if (const int rest = static_cast<int>(count - i)) {
    const F32 value = load_partial(x + i, rest);
    const F32 across = swap_pairs(value) * load_partial(factors.across + i, rest);
    store_partial(out + i, fma(value, load_partial(factors.along + i, rest), across), rest);
  }
}

template <class Number>
void turn_halves(const Number* x, Number* out, int64_t pairs, const Factors& factors) {
  const Number* y = x + pairs;
  int64_t i = 0;
  for (; i + F32::width <= pairs; i += F32::width) {
    const F32 first = load(x + i), second = load(y + i), real = load(factors.along + i);
    const F32 imaginary = load(factors.across + pairs + i);
    store(out + i, first * real - second * imaginary);
    store(out + pairs + i, fma(first, imaginary, second * real));
  }
  if (const int rest = static_cast<int>(pairs - i)) {
    const F32 first = load_partial(x + i, rest), second = load_partial(y + i, rest);
    const F32 real = load_partial(factors.along + i, rest);
    const F32 imaginary = load_partial(factors.across + pairs + i, rest);
    store_partial(out + i, first * real - second * imaginary, rest);
    store_partial(out + pairs + i, fma(first, imaginary, second * real), rest);
  }
}

template <class Number>
void turn_token(const Rope& rope, int64_t token) {
  Factors factors;
  spread(rope.turns + token * 2 * rope.pairs, rope.pairs, rope.interleaved, factors);
  for (int64_t head = 0; head < rope.heads; ++head) {
    const Number* x = static_cast<const Number*>(rope.x) + token * rope.x_token_stride + head * rope.x_head_stride;
    Number* out = static_cast<Number*>(rope.out) + token * rope.out_token_stride + head * rope.out_head_stride;
    if (rope.interleaved)
      turn_neighbours(x, out, 2 * rope.pairs, factors);
    else
      turn_halves(x, out, rope.pairs, factors);
    if (out != x) std::memcpy(out + 2 * rope.pairs, x + 2 * rope.pairs, (rope.size - 2 * rope.pairs) * sizeof(Number));
  }
}

}  // namespace

void rope(const Rope& rope) {
  const int64_t of_token = rope.heads * rope.size;
  const int64_t at_once = of_token < NUMBERS ? NUMBERS / (of_token ? of_token : 1) : 1;
  auto body = [&](int item, int) {
    const int64_t stop = (item + 1) * at_once < rope.tokens ? (item + 1) * at_once : rope.tokens;
    for (int64_t token = item * at_once; token < stop; ++token)
      rope.format == Format::f32 ? turn_token<float>(rope, token) : turn_token<bf16>(rope, token);
  };
  parallel(rope.threads, static_cast<int>((rope.tokens + at_once - 1) / at_once), body);
}

}  // namespace foveal::FOVEAL_ISA
