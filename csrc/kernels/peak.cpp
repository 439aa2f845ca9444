// The products of common/tile.h without their memory: as many accumulators, one pair of operands in registers.
#include "kernels/peak.h"

#include "common/tile.h"

namespace foveal::FOVEAL_ISA {
namespace {

template <class Dot>
int64_t multiply(int64_t rounds) {
  constexpr int CHAINS = TILE_ROWS * COLUMN_REGISTERS;
  Word ones[F32::width];
  for (Word& word : ones) word = 0x3f803f80;  // two bf16 that are 1, or a float near 1
  F32 sum[CHAINS];
#pragma GCC unroll 32
  for (int i = 0; i < CHAINS; ++i) sum[i] = set1(static_cast<float>(i));  // different, or the compiler would keep one
  for (int64_t round = 0; round < rounds; ++round) {
    const Word* operands = ones;
    __asm__ volatile("" : "+r"(operands));  // so that it knows nothing of what is multiplied
#pragma GCC unroll 32
    for (int i = 0; i < CHAINS; ++i) sum[i] = Dot::multiply_add(operands, operands, sum[i]);
  }
  F32 total = zero();
  for (int i = 0; i < CHAINS; ++i) total = total + sum[i];
  volatile float sink = foveal::FOVEAL_ISA::sum(total);
  (void)sink;
  return rounds * CHAINS * F32::width * Dot::numbers;
}

#if defined(FOVEAL_AMX)
int64_t multiply_tile_registers(int64_t rounds) {
  const Tiles tiles;
  zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>(), zero_tile<4>(), zero_tile<5>();
  for (int64_t round = 0; round < rounds; ++round)
    multiply_bf16<0, 4, 5>(), multiply_bf16<1, 4, 5>(), multiply_bf16<2, 4, 5>(), multiply_bf16<3, 4, 5>();
  return rounds * 4 * AMX * AMX * AMX * Bf16Dot::numbers;
}
#endif

}  // namespace

int64_t multiply_registers(Format format, int64_t rounds) {
#if defined(FOVEAL_AMX)
  if (format == Format::bf16) return multiply_tile_registers(rounds);
#endif
  return format == Format::bf16 ? multiply<Bf16Dot>(rounds) : multiply<FloatDot>(rounds);
}

}  // namespace foveal::FOVEAL_ISA
