"""Multi-head latent attention: one small latent a token instead of keys and values by head."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foveal.cache.layouts import BlockCache
from foveal.config.model import MLAConfig
from foveal.costs import MLAForm, cheapest_mla_form
from foveal.kernels import (
    Columns,
    Contexts,
    KeySource,
    OneHead,
    Queries,
    Rows,
    apply_rope,
    attention,
    linear,
    sparse_attention,
)
from foveal.kernels.cpu.mixer_blocks import IndexerPart, MLABlock
from foveal.nn.fused import layer_of, norm_of
from foveal.nn.linear import ExactLinear, Linear
from foveal.nn.mixer import Mixer, by_form
from foveal.nn.norm import RMSNorm
from foveal.nn.step import Step
from foveal.nn.watch import Gaze

FORMS = ("auto", "expanded", "absorbed")
# Numbers of the keys and values that are expanded at a time.
EXPANDED_NUMBERS = 1 << 26


class MLA(Mixer):
    """MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1), dense or over a selection.

    Each sequence takes the form with the fewest multiply-accumulates (`foveal.costs.mla_macs`): expanded (per-head keys
    and values) or absorbed (queries in the latent space) when it sees everything, and the same two as masked or sparse
    when a selection leaves something out. `form` forces one of the two. All give the same numbers.
    """

    def __init__(self, config: MLAConfig, hidden_size: int, dtype: torch.dtype, form: str = "auto") -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"mla_form must be one of {', '.join(FORMS)}, not {form!r}")
        self.config, self.form = config, form
        query = config.heads * (config.nope_dim + config.rope_dim)
        rank, eps, bias = config.kv_lora_rank, config.latent_norm_eps, config.bias
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden_size, query, dtype=dtype)
        else:
            self.q_a_proj = Linear(hidden_size, config.q_lora_rank, bias=bias, dtype=dtype)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps, dtype=dtype)
            self.q_b_proj = Linear(config.q_lora_rank, query, dtype=dtype)
        self.kv_a_proj_with_mqa = Linear(hidden_size, rank + config.rope_dim, bias=bias, dtype=dtype)
        self.kv_a_layernorm = RMSNorm(rank, eps, dtype=dtype)
        self.kv_b_proj = UnpackedLinear(rank, config.heads * (config.nope_dim + config.value_dim), dtype=dtype)
        self.o_proj = Linear(config.heads * config.value_dim, hidden_size, bias=bias, dtype=dtype)

    def query_latent(self, x_TD: Tensor) -> Tensor:
        """[T, q_lora_rank], normed; the hidden state where there is no query latent."""
        if self.config.q_lora_rank is None:
            return x_TD
        return self.q_a_layernorm(self.q_a_proj(x_TD))

    def forward(
        self, x_TD: Tensor, latent_TX: Tensor, step: Step, cache: BlockCache | None, selection_TK: Tensor | None
    ) -> Tensor:
        """See `Mixer.forward`."""
        config = self.config
        project = self.q_proj if config.q_lora_rank is None else self.q_b_proj
        q_THX = project(latent_TX).unflatten(-1, (config.heads, -1))
        q_nope_THP, q_pe_THR = q_THX.split([config.nope_dim, config.rope_dim], -1)
        c_kv_TC, k_pe_TR = self.kv_a_proj_with_mqa(x_TD).split([config.kv_lora_rank, config.rope_dim], -1)
        # One rope for the queries of all heads and the one key.
        pe_TXR = torch.cat((q_pe_THR, k_pe_TR[:, None]), 1)
        if config.rope:
            pe_TXR = apply_rope(pe_TXR, step.turns(config.rope), interleaved=config.rope.interleaved)
        q_pe_THR, k_pe_TR = pe_TXR[:, :-1], pe_TXR[:, -1]
        latents = step.keep(cache.latent if cache else None, torch.cat((self.kv_a_layernorm(c_kv_TC), k_pe_TR), -1))
        if step.watch is not None:
            with torch.no_grad():
                step.gaze = Gaze(self._absorbed(q_nope_THP, q_pe_THR), one_head(latents), config.scale)
        out_THV = self._attend(q_nope_THP, q_pe_THR, latents, step, selection_TK)
        return self.o_proj(out_THV.flatten(1))

    def fused(self, norm: RMSNorm, *, sparse: bool, indexer: IndexerPart | None) -> MLABlock | None:
        """The block of `norm`, this and a sum, for the kernels; None where the expanded form is forced.

        They know the absorbed form alone: in steps of few tokens no other is cheaper, but for contexts of hardly more.
        """
        if self.form == "expanded":
            return None
        latent = self.config.q_lora_rank is not None
        return MLABlock(
            self.config,
            norm_of(norm),
            (layer_of(self.q_a_proj), norm_of(self.q_a_layernorm)) if latent else None,
            layer_of(self.q_b_proj if latent else self.q_proj),
            (layer_of(self.kv_a_proj_with_mqa), norm_of(self.kv_a_layernorm)),
            self.kv_b_proj.weight,
            layer_of(self.o_proj),
            sparse,
            indexer,
        )

    def _attend(
        self, q_nope_THP: Tensor, q_pe_THR: Tensor, latents: KeySource, step: Step, selection_TK: Tensor | None
    ) -> Tensor:
        """[T, H, V], each sequence in its own form."""
        topk = None if selection_TK is None else selection_TK.shape[1]
        forms = [
            self._form(count, context, topk, bounded=step.batch.bounded)
            for count, context in zip(step.queries.lengths, step.contexts.lengths, strict=True)
        ]

        def run(
            form: MLAForm, members: Sequence[int], queries: Queries, nope: Tensor, pe: Tensor, chosen: Tensor | None
        ) -> Tensor:
            return self._run(form, nope, pe, latents.only(members), queries, chosen)

        return by_form(forms, run, step.queries, (q_nope_THP, q_pe_THR, selection_TK))

    def _form(self, queries: int, context: int, topk: int | None, *, bounded: bool) -> MLAForm:
        """bounded: the context is only known not to be longer, so the form must not depend on its rows."""
        if self.form == "auto" and not bounded:
            form = cheapest_mla_form(self.config, queries, context, topk)
            # In training the masked form would keep the weights of all keys for the backward pass.
            return "sparse" if form == "masked" and torch.is_grad_enabled() else form
        selects = topk is not None and context > topk
        if self.form == "expanded" and not bounded:
            return "masked" if selects else "expanded"
        return "sparse" if selects else "absorbed"

    def _run(
        self,
        form: MLAForm,
        q_nope_THP: Tensor,
        q_pe_THR: Tensor,
        latents: KeySource,
        queries: Queries,
        selection_TK: Tensor | None,
    ) -> Tensor:
        scale = self.config.scale
        if form in ("expanded", "masked"):
            q_THP = torch.cat((q_nope_THP, q_pe_THR), -1)
            return self._expanded(q_THP, latents, queries, selection_TK if form == "masked" else None)
        q_THX = self._absorbed(q_nope_THP, q_pe_THR)
        keys = one_head(latents)
        values = KeySource(Columns(keys.records, self.config.kv_lora_rank), latents.contexts)
        if form == "sparse":
            assert selection_TK is not None
            out_THC = sparse_attention(q_THX, keys, values, selection_TK, queries, scale=scale)
        else:
            out_THC = attention(q_THX, keys, values, queries, scale=scale)
        _, up_v_HVC = self._up_projections()
        return torch.bmm(out_THC.transpose(0, 1), up_v_HVC.transpose(1, 2)).transpose(0, 1)

    def _absorbed(self, q_nope_THP: Tensor, q_pe_THR: Tensor) -> Tensor:
        """Queries in the latent space, [T, H, C + R]."""
        up_k_HPC, _ = self._up_projections()
        absorbed_THC = torch.bmm(q_nope_THP.transpose(0, 1), up_k_HPC).transpose(0, 1)
        return torch.cat((absorbed_THC, q_pe_THR), -1)

    def _up_projections(self) -> tuple[Tensor, Tensor]:
        """W_UK [H, P, C] and W_UV [H, V, C]."""
        config = self.config
        both_HXC = self.kv_b_proj.weight.unflatten(0, (config.heads, -1))
        return both_HXC[:, : config.nope_dim], both_HXC[:, config.nope_dim :]

    def _expanded(self, q_THP: Tensor, latents: KeySource, queries: Queries, selection_TK: Tensor | None) -> Tensor:
        """Attention over per-head keys and values, a few heads at a time: all of them at a long context would take
        gigabytes."""
        config, lengths = self.config, latents.contexts.lengths
        latent_NX = torch.cat([latents.context(s, 0, length) for s, length in enumerate(lengths)])
        c_kv_NC, k_pe_NR = latent_NX.split([config.kv_lora_rank, config.rope_dim], -1)
        contexts = Contexts.packed(lengths)
        width = config.nope_dim + config.value_dim
        heads = max(1, EXPANDED_NUMBERS // (len(latent_NX) * (width + config.rope_dim)))
        parts = []
        for q_ThP, weight_XC in zip(q_THP.split(heads, 1), self.kv_b_proj.weight.split(heads * width), strict=True):
            kv_NhX = linear(c_kv_NC, weight_XC).unflatten(-1, (-1, width))
            k_nope_NhP, v_NhV = kv_NhX.split([config.nope_dim, config.value_dim], -1)
            k_NhP = torch.cat((k_nope_NhP, k_pe_NR[:, None].expand(-1, kv_NhX.shape[1], -1)), -1)
            keys, values = KeySource(Rows(k_NhP), contexts), KeySource(Rows(v_NhV), contexts)
            parts.append(attention(q_ThP, keys, values, queries, scale=config.scale, selection_TK=selection_TK))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class UnpackedLinear(ExactLinear):
    """A linear layer whose weight is also read by itself (absorption), so it stays as it is."""

    def pack(self) -> None:
        """Nothing."""


def one_head(latents: KeySource) -> KeySource:
    """Latent rows as the keys of one head that all queries share."""
    return KeySource(OneHead(latents.records), latents.contexts)
