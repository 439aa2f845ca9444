"""`flash_attention`: attention over plain tensors in flash-attn's layout, causal or not, differentiable."""

from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal.kernels.dense import TILE_SCORES, widened
from foveal.kernels.dispatch import operation


@dataclass(frozen=True)
class _Mask:
    """Which keys a query sees: all, or by position."""

    causal: bool
    window: int | None
    sinks: int
    shift: int
    """Position of the first query."""

    def tile(self, lower: int, upper: int, start: int, stop: int, device: torch.device) -> Tensor | None:
        """bool [t, n]: which of the keys [start, stop) the queries [lower, upper) see; None: all."""
        before_window = 0 if self.window is None else upper + self.shift - self.window
        if not self.causal or (stop <= lower + self.shift + 1 and start >= before_window):
            return None
        position_t1 = torch.arange(lower + self.shift, upper + self.shift, device=device)[:, None]
        key_n = torch.arange(start, stop, device=device)
        seen_tn = key_n <= position_t1
        if self.window is not None:
            seen_tn &= (key_n > position_t1 - self.window) | (key_n < self.sinks)
        return seen_tn

    def none(self, lower: int, upper: int, start: int, stop: int) -> bool:
        """Whether the queries see none of the keys."""
        if not self.causal:
            return False
        behind = self.window is not None and start >= self.sinks and stop <= lower + self.shift + 1 - self.window
        return behind or start >= upper + self.shift


def flash_attention(
    q_STHP: Tensor,
    k_SNGP: Tensor,
    v_SNGV: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    version: str | None = None,
) -> Tensor:
    """softmax(scale q.k) v without a buffer of all scores, forward or backward (arXiv 2205.14135, 2307.08691).

    q_STHP: [batch, queries, heads, P]; k_SNGP: [batch, keys, kv heads, P]; v_SNGV: [batch, keys, kv heads, V]; heads
    are a multiple of kv heads; one floating dtype. `scale`: P**-0.5 unless given.
    `causal` is aligned to the bottom right, as in flash-attn >= 2.1: query t stands at position t + keys - queries, and
    sees the keys up to there; of these with `window` only the last `window` (itself included) and the first `sinks`. A
    query that sees nothing gives zeros.
    `version` forces a version of `flash_forward`; the backward pass is the same for all.

    Returns [batch, queries, heads, V] in q's dtype. ValueError: shapes or dtypes that do not fit each other, a window
    without `causal`, a window below 1, negative sinks.
    """
    _check(q_STHP, k_SNGP, v_SNGV)
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"a window must be at least 1 and needs causal=True, not window={window}, causal={causal}")
    if sinks < 0:
        raise ValueError(f"sinks must not be negative, not {sinks}")
    scale = q_STHP.shape[-1] ** -0.5 if scale is None else scale
    result = _FlashAttention.apply(q_STHP, k_SNGP, v_SNGV, causal, scale, window, sinks, version)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result


@operation(differentiable=True)
def flash_forward(
    q_STHP: Tensor, k_SNGP: Tensor, v_SNGV: Tensor, *, causal: bool, scale: float, window: int | None, sinks: int
) -> tuple[Tensor, Tensor]:
    """The result of `flash_attention` and each query's log-sum-exp of its scores, [S, T, H], at least float32; -inf
    where it sees nothing."""
    group = q_STHP.shape[2] // k_SNGP.shape[2]
    k_SNHP, v_SNHV = k_SNGP.repeat_interleave(group, 2), v_SNGV.repeat_interleave(group, 2)
    scores_SHTN = widened(torch.einsum("sthp,snhp->shtn", q_STHP, k_SNHP)) * scale
    queries, keys = q_STHP.shape[1], k_SNGP.shape[1]
    seen_TN = _Mask(causal, window, sinks, keys - queries).tile(0, queries, 0, keys, q_STHP.device)
    if seen_TN is not None:
        scores_SHTN = scores_SHTN.masked_fill(~seen_TN, float("-inf"))
    weights_SHTN = scores_SHTN.softmax(-1).nan_to_num(0.0) if keys else scores_SHTN
    out_STHV = torch.einsum("shtn,snhv->sthv", weights_SHTN.to(v_SNHV.dtype), v_SNHV)
    return out_STHV, scores_SHTN.logsumexp(-1).transpose(1, 2)


@flash_forward.add("torch", differentiable=False)
def _flash_forward_tiled(
    q_STHP: Tensor, k_SNGP: Tensor, v_SNGV: Tensor, *, causal: bool, scale: float, window: int | None, sinks: int
) -> tuple[Tensor, Tensor]:
    sequences, queries, heads, _ = q_STHP.shape
    keys, groups = k_SNGP.shape[1:3]
    out_STHV = q_STHP.new_zeros(sequences, queries, heads, v_SNGV.shape[-1])
    lse_STH = widened(q_STHP.new_empty(0)).new_full((sequences, queries, heads), float("-inf"))
    mask = _Mask(causal, window, sinks, keys - queries)
    k_SGPN, v_SGNV = (widened(x) for x in (k_SNGP.permute(0, 2, 3, 1), v_SNGV.transpose(1, 2)))
    tile = max(1, TILE_SCORES // max(1, sequences * heads * keys))
    for lower in range(0, queries, tile):
        upper = min(lower + tile, queries)
        stop = max(0, upper + mask.shift) if causal else keys
        if stop == 0:
            continue
        scores_SGtn = _grouped(q_STHP[:, lower:upper], groups) @ k_SGPN[..., :stop] * scale
        seen_tn = mask.tile(lower, upper, 0, stop, q_STHP.device)
        if seen_tn is not None:
            scores_SGtn = scores_SGtn.masked_fill(~seen_tn.repeat(heads // groups, 1), float("-inf"))
        lse_SGt = scores_SGtn.logsumexp(-1)
        weights_SGtn = (scores_SGtn - lse_SGt.masked_fill(lse_SGt.isneginf(), 0)[..., None]).exp()
        out_STHV[:, lower:upper] = _ungrouped(weights_SGtn @ v_SGNV[..., :stop, :], heads)
        lse_STH[:, lower:upper] = _ungrouped(lse_SGt[..., None], heads)[..., 0]
    return out_STHV, lse_STH


class _FlashAttention(torch.autograd.Function):
    """The forward pass of any version; a backward pass that computes each tile's weights again from the log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any,
        q_STHP: Tensor,
        k_SNGP: Tensor,
        v_SNGV: Tensor,
        causal: bool,
        scale: float,
        window: int | None,
        sinks: int,
        version: str | None,
    ) -> Tensor:
        options: dict[str, Any] = {"causal": causal, "scale": scale, "window": window, "sinks": sinks}
        forced: dict[str, Any] = {} if version is None else {"version": version}
        out_STHV, lse_STH = flash_forward(q_STHP, k_SNGP, v_SNGV, **options, **forced)
        ctx.save_for_backward(q_STHP, k_SNGP, v_SNGV, out_STHV, lse_STH)
        ctx.scale, ctx.mask = scale, _Mask(causal, window, sinks, k_SNGP.shape[1] - q_STHP.shape[1])
        return out_STHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_STHV: Tensor) -> tuple[Tensor | None, ...]:
        q_STHP, k_SNGP, v_SNGV, out_STHV, lse_STH = ctx.saved_tensors
        share_STH = (widened(d_out_STHV) * widened(out_STHV)).sum(-1)
        gradients = _gradients(q_STHP, k_SNGP, v_SNGV, lse_STH, share_STH, d_out_STHV, ctx.scale, ctx.mask)
        return (*gradients, None, None, None, None, None)


def _gradients(
    q_STHP: Tensor,
    k_SNGP: Tensor,
    v_SNGV: Tensor,
    lse_STH: Tensor,
    share_STH: Tensor,
    d_out_STHV: Tensor,
    scale: float,
    mask: _Mask,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, tile by tile (arXiv 2307.08691, algorithm 2). share: sums of out * d_out."""
    sequences, queries, heads, _ = q_STHP.shape
    keys, groups = k_SNGP.shape[1:3]
    k_SGNP, v_SGNV = (widened(x.transpose(1, 2)) for x in (k_SNGP, v_SNGV))
    d_q_STHP, d_k_SGNP, d_v_SGNV = torch.empty_like(q_STHP), torch.zeros_like(k_SGNP), torch.zeros_like(v_SGNV)
    tile = max(1, isqrt(TILE_SCORES // max(1, sequences * heads)))
    for lower in range(0, queries, tile):
        upper = min(lower + tile, queries)
        q_SGtP, d_out_SGtV = (_grouped(x[:, lower:upper], groups) for x in (q_STHP, d_out_STHV))
        lse_SGt1, share_SGt1 = (_grouped(x[:, lower:upper, :, None], groups) for x in (lse_STH, share_STH))
        d_q_SGtP = torch.zeros_like(q_SGtP)
        for start in range(0, keys, tile):
            stop = min(start + tile, keys)
            if mask.none(lower, upper, start, stop):
                continue
            k_SGnP, v_SGnV = k_SGNP[:, :, start:stop], v_SGNV[:, :, start:stop]
            weights_SGtn = (q_SGtP @ k_SGnP.mT * scale - lse_SGt1).exp()
            seen_tn = mask.tile(lower, upper, start, stop, q_STHP.device)
            if seen_tn is not None:
                weights_SGtn.masked_fill_(~seen_tn.repeat(heads // groups, 1), 0)
            d_scores_SGtn = weights_SGtn * (d_out_SGtV @ v_SGnV.mT - share_SGt1) * scale
            d_v_SGNV[:, :, start:stop] += weights_SGtn.mT @ d_out_SGtV
            d_k_SGNP[:, :, start:stop] += d_scores_SGtn.mT @ q_SGtP
            d_q_SGtP += d_scores_SGtn @ k_SGnP
        d_q_STHP[:, lower:upper] = _ungrouped(d_q_SGtP, heads)
    return d_q_STHP, d_k_SGNP.transpose(1, 2).to(k_SNGP.dtype), d_v_SGNV.transpose(1, 2).to(v_SNGV.dtype)


def _grouped(x_StHP: Tensor, groups: int) -> Tensor:
    """The heads of a group below one another, as rows of one product: [S, G, H / G * t, P], at least float32."""
    return widened(x_StHP.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3))


def _ungrouped(x_SGtP: Tensor, heads: int) -> Tensor:
    """The way back: [S, t, H, P]."""
    x_SGhtP = x_SGtP.unflatten(2, (heads // x_SGtP.shape[1], -1))
    return x_SGhtP.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _check(q_STHP: Tensor, k_SNGP: Tensor, v_SNGV: Tensor) -> None:
    tensors = {"q": q_STHP, "k": k_SNGP, "v": v_SNGV}
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
    if any(x.dim() != 4 for x in tensors.values()):
        raise ValueError(f"expected (batch, length, heads, dim), not {shapes}")
    if not q_STHP.shape[0] == k_SNGP.shape[0] == v_SNGV.shape[0]:
        raise ValueError(f"batch sizes differ: {shapes}")
    if k_SNGP.shape[1:3] != v_SNGV.shape[1:3]:
        raise ValueError(f"k and v differ in length or heads: {shapes}")
    if q_STHP.shape[3] != k_SNGP.shape[3]:
        raise ValueError(f"q and k differ in dim: {shapes}")
    if not k_SNGP.shape[2] or q_STHP.shape[2] % k_SNGP.shape[2]:
        raise ValueError(f"heads of q are not a multiple of those of k: {shapes}")
    if not q_STHP.dtype == k_SNGP.dtype == v_SNGV.dtype or not q_STHP.is_floating_point():
        raise ValueError(f"dtypes: q {q_STHP.dtype}, k {k_SNGP.dtype}, v {v_SNGV.dtype}; one floating dtype is needed")
