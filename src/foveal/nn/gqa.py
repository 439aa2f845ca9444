"""Grouped-query attention."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foveal.cache.layouts import BlockCache
from foveal.config.model import GQAConfig
from foveal.kernels import KeySource, Queries, apply_rope, attention, sparse_attention, streaming_attention
from foveal.kernels.cpu.mixer_blocks import GQABlock, IndexerPart
from foveal.nn.fused import layer_of, norm_of
from foveal.nn.linear import FusedLinear, Linear
from foveal.nn.mixer import Mixer, by_form
from foveal.nn.norm import RMSNorm
from foveal.nn.step import Step
from foveal.nn.watch import Gaze


class GQA(Mixer):
    """Grouped-query attention (arXiv 2305.13245) with optional QK-norm, biases, window, rope and output
    gate; dense, over a window with or without sinks, or over a selection that all heads share."""

    def __init__(self, config: GQAConfig, hidden_size: int, norm_eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        # Gated, each head's query is followed by its gate.
        parts = {"q_proj": 2 * query if config.gated else query, "k_proj": key, "v_proj": key}
        self.qkv_proj = FusedLinear(hidden_size, parts, bias=config.qkv_bias, dtype=dtype)
        self.o_proj = Linear(query, hidden_size, bias=config.o_bias, dtype=dtype)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, norm_eps, dtype=dtype, centred=config.centred_norms)
            self.k_norm = RMSNorm(config.head_dim, norm_eps, dtype=dtype, centred=config.centred_norms)

    def forward(
        self, x_TD: Tensor, latent_TX: Tensor, step: Step, cache: BlockCache | None, selection_TK: Tensor | None
    ) -> Tensor:
        """See `Mixer.forward`."""
        config = self.config
        qkv_TXP = self.qkv_proj(x_TD).unflatten(-1, (-1, config.head_dim))
        if config.gated:
            q_and_gate_TXP, kv_TXP = qkv_TXP.split([2 * config.heads, 2 * config.kv_heads], 1)
            q_THP, gate_THP = q_and_gate_TXP.unflatten(1, (config.heads, 2)).unbind(2)
            qkv_TXP = torch.cat((q_THP, kv_TXP), 1)
        # Queries and keys stand side by side, so one rope serves both.
        qk_TXP, v_TGP = qkv_TXP.split([config.heads + config.kv_heads, config.kv_heads], 1)
        if config.qk_norm:
            q_THP, k_TGP = qk_TXP.split([config.heads, config.kv_heads], 1)
            qk_TXP = torch.cat((self.q_norm(q_THP), self.k_norm(k_TGP)), 1)
        plain_TXP = qk_TXP
        if config.rope:
            turns_TR = step.turns(config.rope, exact=config.sinks > 0)
            qk_TXP = apply_rope(qk_TXP, turns_TR, interleaved=config.rope.interleaved)
        q_THP, k_TGP = qk_TXP.split([config.heads, config.kv_heads], 1)
        keys = step.keep(cache.keys if cache else None, k_TGP)
        values = step.keep(cache.values if cache else None, v_TGP)
        if step.watch is not None:
            step.gaze = Gaze(q_THP.detach(), keys, config.scale)
        if selection_TK is not None:
            out_THP = self._sparse(q_THP, keys, values, step, selection_TK)
        elif config.sinks and config.rope:
            out_THP = self._streaming(q_THP, plain_TXP[:, : config.heads], keys, values, step)
        else:
            out_THP = attention(
                q_THP, keys, values, step.queries, scale=config.scale, window=config.window, sinks=config.sinks
            )
        if config.gated:
            out_THP = out_THP * gate_THP.sigmoid()
        return self.o_proj(out_THP.flatten(1))

    def _streaming(self, q_THP: Tensor, plain_THP: Tensor, keys: KeySource, values: KeySource, step: Step) -> Tensor:
        """[T, H, P]: the window, and sinks at the distance that they have in the cache. plain: queries before rope."""
        config, seen = self.config, step.contexts.lengths
        assert config.rope and config.window
        if max(seen) <= config.sinks + config.window:  # nothing is left out yet
            return attention(q_THP, keys, values, step.queries, scale=config.scale)
        turns_TR = step.turns(config.rope, exact=True, most=config.sinks + config.window - 1)
        sink_q_THP = apply_rope(plain_THP, turns_TR, interleaved=config.rope.interleaved)
        reach = {"window": config.window, "sinks": config.sinks}
        return streaming_attention(q_THP, sink_q_THP, keys, values, step.queries, scale=config.scale, **reach)

    def _sparse(self, q_THP: Tensor, keys: KeySource, values: KeySource, step: Step, selection_TK: Tensor) -> Tensor:
        """[T, H, P]: the selection alone, where it leaves something out."""
        scale, topk = self.config.scale, selection_TK.shape[1]

        def run(form: str, members: Sequence[int], queries: Queries, q_tHP: Tensor, chosen_tK: Tensor) -> Tensor:
            contexts = keys.contexts.only(members)
            k, v = (KeySource(source.records, contexts) for source in (keys, values))
            if form == "dense":
                return attention(q_tHP, k, v, queries, scale=scale)
            return sparse_attention(q_tHP, k, v, chosen_tK, queries, scale=scale)

        forms = ["sparse" if length > topk else "dense" for length in step.contexts.lengths]
        return by_form(forms, run, step.queries, (q_THP, selection_TK))

    def fused(self, norm: RMSNorm, *, sparse: bool, indexer: IndexerPart | None) -> GQABlock:
        """The block of `norm`, this and a sum, for the kernels."""
        heads = (norm_of(self.q_norm), norm_of(self.k_norm)) if self.config.qk_norm else None
        qkv, out = layer_of(self.qkv_proj), layer_of(self.o_proj)
        return GQABlock(self.config, norm_of(norm), qkv, out, heads, sparse, indexer)
