// Linear attention and the delta rule, token by token: a state [keys, values] for each head.
//
// S = exp(g) S + k u^T, o = S^T q, where u = v, or by the delta rule u = beta (v - (exp(g) S)^T k).
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/tokens.h"

namespace foveal {

struct LinearAttention {
  PerToken<float> q, k;    // [tokens, groups * keys]; a group serves heads / groups heads that follow one another
  PerToken<float> v;       // [tokens, heads * values]
  PerToken<float> decay;   // g, at most 0: [tokens, heads * keys], or [tokens, heads]
  PerToken<float> beta;    // [tokens, heads]; of the delta rule only
  const float* state_in;   // [sequences, heads, keys, values]
  float* state_out;        // the same, elsewhere
  float* out;              // [tokens, heads * values]
  int64_t heads, groups, keys, values;
  bool decay_by_key;
  Spans sequences;
  int threads;
};

#define FOVEAL_DECLARE(isa)                         \
  namespace isa {                                   \
  void linear_attention(const LinearAttention&);    \
  void delta_rule(const LinearAttention&);          \
  }
FOVEAL_FOR_EACH_ISA(FOVEAL_DECLARE)
#undef FOVEAL_DECLARE

}  // namespace foveal
