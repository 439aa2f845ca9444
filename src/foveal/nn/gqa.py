"""Grouped-query attention."""

import torch
from torch import Tensor

from foveal.cache.layouts import BlockCache
from foveal.config.model import GQAConfig
from foveal.kernels import apply_rope, attention
from foveal.kernels.cpu.block import GQABlock
from foveal.nn.fused import layer_of, norm_of
from foveal.nn.linear import FusedLinear, Linear
from foveal.nn.mixer import Mixer
from foveal.nn.norm import RMSNorm
from foveal.nn.step import Step


class GQA(Mixer):
    """Grouped-query attention (arXiv 2305.13245) with optional QK-norm, biases, window and rope."""

    def __init__(self, config: GQAConfig, hidden_size: int, norm_eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        parts = {"q_proj": query, "k_proj": key, "v_proj": key}
        self.qkv_proj = FusedLinear(hidden_size, parts, bias=config.qkv_bias, dtype=dtype)
        self.o_proj = Linear(query, hidden_size, bias=config.o_bias, dtype=dtype)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(config.head_dim, norm_eps, dtype=dtype)

    def forward(self, x_TD: Tensor, latent_TX: Tensor, step: Step, cache: BlockCache | None) -> Tensor:
        """See `Mixer.forward`."""
        config = self.config
        qkv_TXP = self.qkv_proj(x_TD).unflatten(-1, (-1, config.head_dim))
        # Queries and keys stand side by side, so one rope serves both.
        qk_TXP, v_TGP = qkv_TXP.split([config.heads + config.kv_heads, config.kv_heads], 1)
        if config.qk_norm:
            q_THP, k_TGP = qk_TXP.split([config.heads, config.kv_heads], 1)
            qk_TXP = torch.cat((self.q_norm(q_THP), self.k_norm(k_TGP)), 1)
        if config.rope:
            qk_TXP = apply_rope(qk_TXP, step.turns(config.rope), interleaved=config.rope.interleaved)
        q_THP, k_TGP = qk_TXP.split([config.heads, config.kv_heads], 1)
        keys = step.keep(cache.keys if cache else None, k_TGP)
        values = step.keep(cache.values if cache else None, v_TGP)
        out_THP = attention(q_THP, keys, values, step.queries, scale=config.scale, window=config.window)
        return self.o_proj(out_THP.flatten(1))

    def fused(self, norm: RMSNorm) -> GQABlock:
        """The block of `norm`, this and a sum, for the kernels."""
        heads = (norm_of(self.q_norm), norm_of(self.k_norm)) if self.config.qk_norm else None
        return GQABlock(self.config, norm_of(norm), layer_of(self.qkv_proj), layer_of(self.o_proj), heads)
