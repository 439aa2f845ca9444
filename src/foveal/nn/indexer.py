"""The lightning indexer: glances at every token and picks those that attention reads."""

import torch
from torch import Tensor, nn

from foveal.cache.layouts import BlockCache
from foveal.config.formats import index_key_bytes
from foveal.config.model import IndexerConfig
from foveal.kernels import KeySource, apply_rope, quantise_index, select
from foveal.kernels.cpu.mixer_blocks import IndexerPart
from foveal.kernels.records import IndexKeyRecords
from foveal.nn.fused import layer_of
from foveal.nn.linear import ExactLinear, Linear
from foveal.nn.mixer import gather_queries
from foveal.nn.norm import LayerNorm
from foveal.nn.step import Step
from foveal.nn.watch import Glance


class Indexer(nn.Module):
    """DeepSeek Sparse Attention's indexer (DeepSeek-V3.2 report, section 2.1; `inference/model.py`, `Indexer`).

    `stored`: what keys are kept as. With "fp8", queries and keys are turned by a Hadamard matrix and rounded to e4m3
    with power-of-two scales, as DeepSeek runs it, with "int8" to whole numbers; with a torch dtype the turn would
    change nothing and is left out.
    """

    def __init__(self, config: IndexerConfig, hidden_size: int, dtype: torch.dtype, stored: torch.dtype | str) -> None:
        super().__init__()
        self.config, self.stored = config, stored
        index_key_bytes(config.head_dim, str(stored).removeprefix("torch."))  # refuses what cannot be turned
        self.wq_b = Linear(config.query_dim, config.heads * config.head_dim, dtype=dtype)
        self.wk = Linear(hidden_size, config.head_dim, dtype=dtype)
        self.k_norm = LayerNorm(config.head_dim, config.norm_eps)
        self.weights_proj = ExactLinear(hidden_size, config.heads, dtype=torch.float32)

    def forward(self, x_TD: Tensor, latent_TX: Tensor, step: Step, cache: BlockCache | None) -> Tensor | None:
        """The selection, int32 [T, topk]; None while no sequence of the batch is longer than topk, and where the batch
        is dense.

        Index keys are computed and cached in any case. Gradients end here: what comes in is learned from the language
        model's loss alone (DeepSeek-V3.2 report, section 2.1).
        """
        x_TD, latent_TX = x_TD.detach(), latent_TX.detach()
        keys = self._keys(x_TD, step, cache)
        rope = self.config.rope
        if step.watch is not None:
            step.glance = Glance(*self.query(x_TD, latent_TX, step.turns(rope)), keys)
        lengths = step.contexts.lengths
        members = [s for s, length in enumerate(lengths) if length > self.config.topk]
        if step.batch.dense or not members:
            return None
        if len(members) == len(lengths):
            rows_t: Tensor | slice = slice(None)
            queries = step.queries
        else:
            rows_t, queries = gather_queries(step.queries, members, x_TD.device)
        with torch.no_grad():  # which tokens are picked has no gradient; training compares the scores themselves
            if step.glance is None:
                q_tIJ, weights_tI = self.query(x_TD[rows_t], latent_TX[rows_t], step.turns(rope)[rows_t])
            else:
                q_tIJ, weights_tI = step.glance.q_TIJ[rows_t], step.glance.weights_TI[rows_t]
            chosen_tK = select(q_tIJ, weights_tI, keys.only(members), queries, topk=self.config.topk)
        if isinstance(rows_t, slice):
            return chosen_tK
        return self._everything(step).index_copy_(0, rows_t, chosen_tK)

    def _keys(self, x_TD: Tensor, step: Step, cache: BlockCache | None) -> KeySource:
        rope = self.config.rope
        k_TJ = self.k_norm(self.wk(x_TD)).to(x_TD.dtype)
        k_TJ = apply_rope(k_TJ[:, None], step.turns(rope), interleaved=rope.interleaved)[:, 0]
        if cache is not None:
            assert cache.index is not None
            return step.keep(cache.index, k_TJ)
        if isinstance(self.stored, torch.dtype):
            return step.keep(None, k_TJ.to(self.stored))
        with torch.no_grad():
            return KeySource(IndexKeyRecords.of(step.gather(k_TJ), self.stored), step.contexts)

    def query(self, x_TD: Tensor, latent_TX: Tensor, turns_TR: Tensor) -> tuple[Tensor, Tensor]:
        """Index queries [T, I, J], of the kind that keys are stored as, and head weights, float32 [T, I], all scales
        folded into the weights."""
        config = self.config
        q_TIJ = self.wq_b(latent_TX).unflatten(-1, (config.heads, config.head_dim))
        q_TIJ = apply_rope(q_TIJ, turns_TR, interleaved=config.rope.interleaved)
        weights_TI = self.weights_proj(x_TD.float()) * (config.heads**-0.5 * config.head_dim**-0.5)
        if isinstance(self.stored, torch.dtype):
            return q_TIJ, weights_TI
        with torch.no_grad():
            values, scale_TI = quantise_index(q_TIJ, self.stored)
        return values, weights_TI * scale_TI

    def fused(self) -> IndexerPart:
        """This, beside latent attention, for the kernels."""
        layers = layer_of(self.wq_b), layer_of(self.wk), layer_of(self.weights_proj)
        norm = self.k_norm.weight, self.k_norm.bias
        assert self.k_norm.eps == self.config.norm_eps
        return IndexerPart(self.config, *layers, norm, self.stored)

    def _everything(self, step: Step) -> Tensor:
        """The selection of queries that see no more than topk tokens: all of them."""
        positions_T1 = step.batch.positions_T[:, None]
        place_K = torch.arange(self.config.topk, device=positions_T1.device, dtype=torch.int32)
        return torch.where(place_K <= positions_T1, place_K, -1).to(torch.int32)
