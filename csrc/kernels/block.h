// A whole residual block of a decoder, x + operation(norm(x)), for a step of few tokens.
//
// Nothing is computed here: each block is the kernels of its parts, one after another, with their results in one scratch
// memory instead of tensors. It rounds where foveal/nn/gqa.py and foveal/nn/mlp.py round, so both give the same numbers.
#pragma once

#include "common/sequences.h"
#include "kernels/activation.h"
#include "kernels/linear.h"

namespace foveal {

// A linear layer.
struct Layer {
  Weight weight;
  const void* bias;  // or null
};

// What both kinds of block begin with.
struct BlockNorm {
  const void* weight;  // [hidden]
  int64_t hidden;
  float epsilon;
  Format format;       // of all activations, norm weights and biases: f32 or bf16
};

// Grouped-query attention.
struct GqaBlock {
  BlockNorm norm;
  Layer qkv, out;
  const void* q_norm;  // [head_dim] or null
  const void* k_norm;
  int heads, groups, head_dim;
  int64_t pairs;       // of the rope; 0: none
  bool interleaved;
  float scale;
  int64_t window;      // 0: none
};

// Gated feed-forward.
struct MlpBlock {
  BlockNorm norm;
  Layer gate_up, down;
  Activation activation;
};

// The tokens of a step and where their keys are.
struct BlockStep {
  const void* x;       // [tokens, hidden]
  void* out;           // the same shape; may be x
  int64_t tokens;
  int threads;
};

struct CacheStep {
  const float* turns;      // [tokens, pairs] complex numbers
  const int64_t* rows;     // [tokens]: cache rows of the tokens' own keys
  void* keys;              // [rows of the cache, groups, head_dim]
  void* values;
  Sequences sequences;
};

#define FOVEAL_DECLARE(isa)                                                 \
  namespace isa {                                                           \
  void gqa_block(const GqaBlock&, const BlockStep&, const CacheStep&);      \
  void mlp_block(const MlpBlock&, const BlockStep&);                        \
  }
FOVEAL_FOR_EACH_ISA(FOVEAL_DECLARE)
#undef FOVEAL_DECLARE

}  // namespace foveal
