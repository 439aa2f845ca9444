// A whole residual block of a decoder, x + operation(norm(x)), for a step of few tokens.
//
// Nothing is computed here: each block is the kernels of its parts, one after another, with their results in one scratch
// memory instead of tensors. It rounds where the modules in foveal/nn round.
#pragma once

#include "common/sequences.h"
#include "common/tokens.h"
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

// A layer that may not be there has no values.
inline bool is_there(const Layer& layer) { return layer.weight.values; }

// The lightning indexer beside a block's attention.
struct BlockIndexer {
  Layer queries;            // from the query latent
  Layer keys;               // from the hidden state
  Layer weights;            // of heads, from the hidden state; f32 whatever the format
  const float* key_weight;  // of the keys' layer norm: [size]
  const float* key_bias;
  float epsilon;
  int heads;
  int64_t size;
  int64_t pairs;            // of the rope, which turns the first dimensions
  bool interleaved;
  float scale;              // of the heads' weights
  int64_t topk;             // 0: there is no indexer
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
  bool sparse;         // attends to a selection, its own indexer's or an earlier block's
  BlockIndexer indexer;
};

// Gated feed-forward.
struct MlpBlock {
  BlockNorm norm;
  Layer gate_up, down;
  Activation activation;
};

// Multi-head latent attention, in the absorbed form.
struct MlaBlock {
  BlockNorm norm;
  Layer q_a;                // to the query latent, where there is one
  const void* q_a_norm;     // [query latent]
  Layer q;                  // [heads (nope + rope)] from the query latent, or the hidden state
  Layer kv_a;               // [rank + rope] from the hidden state
  const void* kv_a_norm;    // [rank]
  const void* up;           // [heads, nope + value, rank]
  Layer out;
  float latent_epsilon;
  int heads;
  int64_t nope, rope, value, rank;
  bool turned, interleaved; // whether rope turns queries and keys, and how
  float scale;
  bool sparse;              // attends to a selection, its own indexer's or an earlier block's
  BlockIndexer indexer;
};

// How tokens choose experts: foveal/nn/moe.py, Router.
struct Router {
  Weight weight;            // [experts, hidden]
  const float* bias;        // [experts] or null: counts for choosing only
  bool sigmoid;             // scores; otherwise softmax
  bool normalise;
  float scale;
  int groups, groups_kept;
  bool top_two;             // a group's score: the sum of its two best, otherwise its best
  float masked;             // the score of experts outside the kept groups
};

// Routed experts, and one for all tokens where there is one.
struct MoeBlock {
  BlockNorm norm;
  Router router;
  Weight gate_up, down;     // of expert 0; the others follow
  int64_t experts, per_token;
  Layer shared_gate_up, shared_down, shared_gate;
};

// The short convolution before a recurrence; its activation is silu.
struct BlockConv {
  const void* weight;       // [channels, taps]
  const void* bias;         // [channels] or null
  int64_t taps;
};

// Mamba's selective state space.
struct MambaBlock {
  BlockNorm norm;
  Layer in, x, dt, out;
  BlockConv conv;
  const float* a;           // [inner, state]
  const float* d;           // [inner]
  const void *dt_norm, *b_norm, *c_norm;  // or null
  int64_t inner, state, rank;
};

// Mamba-2's state space duality.
struct Mamba2Block {
  BlockNorm norm;
  Layer in, out;
  BlockConv conv;
  const float *a, *d, *dt_bias;  // [heads]
  float dt_least, dt_most;
  const void* out_norm;     // [heads head_dim]: of each group for itself
  int64_t heads, head_dim, state, groups;
};

// The gated delta rule, and Kimi Delta Attention (KDA), which has a decay for each key and makes it and the output's gates
// through a bottleneck.
struct DeltaBlock {
  BlockNorm norm;
  Layer in;                 // [q, k, v, z] of each group; of KDA all q, k, v
  Layer ba;                 // [beta, dt] of each group; of KDA all beta
  Layer f_a, f_b, g_a, g_b; // of KDA: to dt and to the gates
  Layer out;
  BlockConv conv;
  const float* a;           // [heads]
  const float* dt_bias;     // [heads], of KDA [heads, keys]
  const void* out_norm;     // [values]
  int64_t heads, groups, keys, values;
};

// The tokens of a step and where their keys are.
struct BlockStep {
  const void* x;       // [tokens, hidden]
  void* out;           // the same shape; may be x
  int64_t tokens;
  int threads;
};

// Rows of a cache: keys or values of grouped-query attention without gaps, latents, index keys (eight-bit ones in pages).
struct CachedRows {
  char* data;
  int64_t stride;          // bytes from a row, or a page, to the next
  Format format;
};

// What a step's queries attend to: of the latest indexer.
struct Selection {
  const int32_t* places;   // [tokens, topk]
  int64_t topk;            // 0: everything
  int32_t* room;           // for those of the blocks' own indexers
};

struct CachedStep {
  const float* turns;        // [tokens, pairs] complex numbers
  const float* index_turns;
  const int64_t* rows;       // [tokens]: cache rows of the tokens' own keys
  CachedRows first, second;  // keys and values; latents
  CachedRows index;          // index keys
  Sequences sequences;
  Selection* selection;      // read and written by blocks that select
};

// Recurrent states in slots; stride: from slot to slot.
struct StateStep {
  CachedRows inputs, states;       // of the convolution, and of the recurrence (floats)
  const int64_t *in, *out, *fresh; // [sequences]: slots; fresh: starts from zeros, `in` is not read
  Spans sequences;
};

#define FOVEAL_DECLARE(isa)                                                 \
  namespace isa {                                                           \
  void gqa_block(const GqaBlock&, const BlockStep&, const CachedStep&);     \
  void mla_block(const MlaBlock&, const BlockStep&, const CachedStep&);     \
  void mamba_block(const MambaBlock&, const BlockStep&, const StateStep&);  \
  void mamba2_block(const Mamba2Block&, const BlockStep&, const StateStep&);\
  void delta_block(const DeltaBlock&, const BlockStep&, const StateStep&);  \
  void kda_block(const DeltaBlock&, const BlockStep&, const StateStep&);    \
  void mlp_block(const MlpBlock&, const BlockStep&);                        \
  void moe_block(const MoeBlock&, const BlockStep&);                        \
  }
FOVEAL_FOR_EACH_ISA(FOVEAL_DECLARE)
#undef FOVEAL_DECLARE

}  // namespace foveal
