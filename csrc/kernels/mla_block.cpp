// Latent attention as a block: see block.h. Queries are taken into the latent space, so that all heads read the same rows of
// the cache: those of a selection, or all. Heads are shared among the threads where weights are a matrix a head.
#include "kernels/block_indexer.h"
#include "kernels/latent.h"

namespace foveal::FOVEAL_ISA {
namespace {

constexpr int COLUMNS = 4;  // registers of latent numbers that one pass over a head's query makes

// The numbers of a few tokens between the parts of a block.
struct Buffers {
  char *hidden, *latent, *q, *latents, *absorbed, *attended, *values;
};

// out[0..count) += the sum over p of q[p] up[p, 0..count), rounded.
template <class Number>
void take_up(const float* q, int64_t nope, const Number* up, int64_t rank, Number* out, int64_t count) {
  if (count == COLUMNS * F32::width) {
    F32 total[COLUMNS] = {zero(), zero(), zero(), zero()};
    for (int64_t p = 0; p < nope; ++p)
      for (int i = 0; i < COLUMNS; ++i) total[i] = fma(set1(q[p]), load(up + p * rank + i * F32::width), total[i]);
    for (int i = 0; i < COLUMNS; ++i) store(out + i * F32::width, total[i]);
    return;
  }
  for (int64_t c = 0; c < count; c += F32::width) {
    const int n = static_cast<int>(count - c < F32::width ? count - c : F32::width);
    F32 total = zero();
    for (int64_t p = 0; p < nope; ++p) total = fma(set1(q[p]), load_up_to(up + p * rank + c, n), total);
    n == F32::width ? store(out + c, total) : store_partial(out + c, total, n);
  }
}

// Queries in the latent space: [tokens, heads, rank + rope], whose last numbers are left to the rope.
template <class Number>
void absorb(const MlaBlock& block, const BlockStep& step, const char* q, char* absorbed) {
  const int64_t width = block.nope + block.rope, columns = COLUMNS * F32::width;
  auto head = [&](int h, int) {
    Scratch scratch(block.nope * sizeof(float));
    float* wide = scratch.take<float>(block.nope);
    const Number* up = static_cast<const Number*>(block.up) + h * (block.nope + block.value) * block.rank;
    for (int64_t t = 0; t < step.tokens; ++t) {
      const int64_t place = t * block.heads + h;
      convert(reinterpret_cast<const Number*>(q) + place * width, block.norm.format, wide, Format::f32, block.nope);
      Number* out = reinterpret_cast<Number*>(absorbed) + place * (block.rank + block.rope);
      for (int64_t c = 0; c < block.rank; c += columns)
        take_up(wide, block.nope, up + c, block.rank, out + c, block.rank - c < columns ? block.rank - c : columns);
    }
  };
  parallel(step.threads, block.heads, head);
}

// What was read of the latents, [tokens, heads, rank], as each head's values: [tokens, heads, value].
void take_values(const MlaBlock& block, const BlockStep& step, const char* attended, char* values) {
  const Format format = block.norm.format;
  const Coding coding = format == Format::f32 ? Coding::f32 : Coding::bf16;
  auto head = [&](int h, int) {
    const void* up = at(block.up, (h * (block.nope + block.value) + block.nope) * block.rank, format);
    linear({at(attended, h * block.rank, format), block.heads * block.rank,
            {up, nullptr, nullptr, block.value, block.rank, 0, coding}, nullptr, at(values, h * block.value, format),
            step.tokens, format, 1, block.heads * block.value});
  };
  parallel(step.threads, block.heads, head);
}

// Turns `heads` heads of each token, or copies them where there is no rope.
void turn(const MlaBlock& block, const BlockStep& step, const float* turns, const char* x, int64_t x_token, int64_t x_head,
          char* out, int64_t out_token, int64_t out_head, int heads) {
  const Format format = block.norm.format;
  if (block.turned)
    return rope({x, x_token, x_head, out, out_token, out_head, turns, step.tokens, heads, block.rope, block.rope / 2,
                 block.interleaved, format, step.threads});
  for (int64_t t = 0; t < step.tokens; ++t)
    for (int h = 0; h < heads; ++h)
      std::memcpy(at(out, t * out_token + h * out_head, format), at(x, t * x_token + h * x_head, format),
                  block.rope * bytes_of(format));
}

// Normed latents with their turned rope keys, in `latents`, and from there in the cache.
void keep_latents(const MlaBlock& block, const BlockStep& step, const CachedStep& cache, const char* projected,
                  char* latents) {
  const Format format = block.norm.format;
  const int64_t width = block.rank + block.rope;
  for (int64_t t = 0; t < step.tokens; ++t)
    rms_norm({at(projected, t * width, format), width, nullptr, nullptr, block.kv_a_norm, at(latents, t * width, format), 1,
              block.rank, block.latent_epsilon, format, 1});
  turn(block, step, cache.turns, at(projected, block.rank, format), width, width, at(latents, block.rank, format), width,
       width, 1);
  if (cache.first.format == Format::e4m3)
    return write_latents({latents, width, format, step.tokens, block.rank, block.rope, cache.rows,
                          reinterpret_cast<uint8_t*>(cache.first.data), cache.first.stride, step.threads});
  for (int64_t t = 0; t < step.tokens; ++t)
    std::memcpy(cache.first.data + cache.rows[t] * cache.first.stride, at(latents, t * width, format),
                width * bytes_of(format));
}

void attend(const MlaBlock& block, const BlockStep& step, const CachedStep& cache, const char* queries, char* out) {
  const bool selects = block.sparse && cache.selection->topk;
  latent_attention({queries, out, block.norm.format, cache.first.data, cache.first.stride, cache.first.format, block.heads,
                    block.rank + block.rope, block.rank, block.scale, cache.sequences,
                    selects ? cache.selection->places : nullptr, selects ? cache.selection->topk : 0, step.threads});
}

// What queries are projected from.
const char* query_latent(const MlaBlock& block, const BlockStep& step, const Buffers& memory) {
  if (!is_there(block.q_a)) return memory.hidden;
  const int64_t rank = block.q_a.weight.outputs;
  apply(block.q_a, memory.hidden, memory.q, block.norm, step);
  rms_norm({memory.q, rank, nullptr, nullptr, block.q_a_norm, memory.latent, step.tokens, rank, block.latent_epsilon,
            block.norm.format, step.threads});
  return memory.latent;
}

}  // namespace

void mla_block(const MlaBlock& block, const BlockStep& step, const CachedStep& cache) {
  const Format format = block.norm.format;
  const int64_t heads = block.heads, each = step.tokens * bytes_of(format), head = block.nope + block.rope;
  const int64_t row = block.rank + block.rope, latent = is_there(block.q_a) ? block.q_a.weight.outputs : 0;
  const int64_t q = heads * head > latent ? heads * head : latent;
  Scratch scratch((block.norm.hidden + latent + q + 2 * row + heads * (row + block.rank + block.value)) * each + 9 * 64);
  auto take = [&](int64_t numbers) { return scratch.take<char>(numbers * each); };
  Buffers memory{take(block.norm.hidden), take(latent), take(q), take(row), take(heads * row), take(heads * block.rank),
                 take(heads * block.value)};
  char* projected = take(row);

  apply_norm(block.norm, step, memory.hidden);
  const char* from = query_latent(block, step, memory);
  if (block.indexer.topk) glance(block.norm, block.indexer, step, cache, memory.hidden, from);
  apply(block.q, from, memory.q, block.norm, step);
  apply(block.kv_a, memory.hidden, projected, block.norm, step);
  keep_latents(block, step, cache, projected, memory.latents);
  format == Format::f32 ? absorb<float>(block, step, memory.q, memory.absorbed)
                        : absorb<bf16>(block, step, memory.q, memory.absorbed);
  turn(block, step, cache.turns, at(memory.q, block.nope, format), heads * head, head, at(memory.absorbed, block.rank, format),
       heads * row, row, block.heads);
  attend(block, step, cache, memory.absorbed, memory.attended);
  take_values(block, step, memory.attended, memory.values);
  apply(block.out, memory.values, memory.hidden, block.norm, step);
  add_residual(block.norm, step, memory.hidden);
}

}  // namespace foveal::FOVEAL_ISA
