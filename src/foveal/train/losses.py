"""Losses. What is large (logits, attention weights) lives for one tile, its gradient computed on the way."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal.config.model import RouterConfig
from foveal.kernels import index_divergence
from foveal.kernels.dense import widened
from foveal.kernels.moe import count_choices
from foveal.models.decoder import Decoder
from foveal.nn.moe import Router
from foveal.nn.watch import Sight

# Logits of one tile: on a GPU 256 MiB in float32, so that each reading of the head's weight serves hundreds of tokens.
TILE_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}

Compare = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""From the logits [t, V] (at least float32) of some tokens to each token's loss, [t], and its gradient by them."""


def next_token(targets_T: Tensor) -> Compare:
    """Cross entropy with the token that follows: int64 [T]."""

    def compare(logits_tV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        log_tV = logits_tV.log_softmax(-1)
        target_t1 = targets_T[rows][:, None]
        gradient_tV = log_tV.exp()
        gradient_tV.scatter_add_(1, target_t1, gradient_tV.new_full((len(target_t1), 1), -1.0))
        return -log_tV.gather(1, target_t1)[:, 0], gradient_tV

    return compare


def taught(teacher: Decoder, x_TD: Tensor, temperature: float) -> Compare:
    """KL(teacher || student) of the next token's distribution, at a temperature, times its square (arXiv 1503.02531).

    x_TD: the teacher's `trunk` over the same tokens.
    """

    def compare(logits_tV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        log_p_tV = (teacher.head(x_TD[rows]) / temperature).log_softmax(-1)
        log_q_tV = (logits_tV / temperature).log_softmax(-1)
        p_tV = log_p_tV.exp()
        loss_t = (p_tV * (log_p_tV - log_q_tV)).sum(-1) * temperature**2
        return loss_t, (log_q_tV.exp() - p_tV) * temperature

    return compare


def head_loss(decoder: Decoder, x_TD: Tensor, token_weights_T: Tensor, compare: Compare) -> Tensor:
    """Sum over tokens of token_weights * loss: a scalar, differentiable in x_TD and the head's weight.

    x_TD: what `Decoder.trunk` returned. The logits of all tokens, [T, V], are never there at once.
    """
    weight_VD = decoder.embed_tokens.weight if decoder.config.tied_embeddings else decoder.lm_head.weight
    loss = _HeadLoss.apply(decoder.norm(x_TD), weight_VD, token_weights_T, compare)  # type: ignore[no-untyped-call]
    assert isinstance(loss, Tensor)
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, token_weights_T: Tensor, compare: Compare) -> Tensor:
        loss = widened(x_TD.new_zeros(()))
        d_x_TD, d_weight_VD = torch.empty_like(x_TD), torch.zeros_like(widened(weight_VD))
        tile = max(1, TILE_LOGITS[x_TD.device.type] // len(weight_VD))
        for lower in range(0, len(x_TD), tile):
            rows = slice(lower, min(lower + tile, len(x_TD)))
            loss_t, d_logits_tV = compare(widened(x_TD[rows] @ weight_VD.T), rows)
            loss += (loss_t * token_weights_T[rows]).sum()
            d_logits_tV = (d_logits_tV * token_weights_T[rows, None]).to(x_TD.dtype)
            d_x_TD[rows] = d_logits_tV @ weight_VD
            d_weight_VD += d_logits_tV.T @ x_TD[rows]
        ctx.save_for_backward(d_x_TD, d_weight_VD.to(weight_VD.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return (*((gradient * d_loss).to(gradient.dtype) for gradient in ctx.saved_tensors), None, None)


@dataclass
class IndexLoss:
    """A watch (`foveal.nn.watch`) that sums every indexer's divergence from its block's attention.

    Over what the block attended to: everything in a dense step, otherwise the selection.
    """

    token_weights_T: Tensor
    total: Tensor | float = 0.0

    def __call__(self, sight: Sight) -> None:
        """See `Watch`."""
        glance, gaze = sight.glance, sight.gaze
        loss, _ = index_divergence(
            *(glance.q_TIJ, glance.weights_TI, glance.keys, gaze.q_THP, gaze.keys, sight.queries),
            self.token_weights_T,
            scale=gaze.scale,
            selection_TK=sight.selection_TK,
        )
        self.total = self.total + loss


def router_scores(logits_TE: Tensor, config: RouterConfig) -> Tensor:
    """Scores that sum to 1 for each token, [T, E]."""
    if config.scoring == "softmax":
        return logits_TE.softmax(-1)
    scores_TE = logits_TE.sigmoid()
    return scores_TE / scores_TE.sum(-1, keepdim=True)


def balance_loss(logits_TE: Tensor, per_token: int, offsets: tuple[int, ...], config: RouterConfig) -> Tensor:
    """The sequence-wise auxiliary loss without its factor (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20), summed
    over sequences and weighted by their tokens: sum_i f_i P_i, 1 where experts are used evenly.

    f counts the `per_token` experts of the highest scores, which the correction bias has no part in (equation 18).
    offsets: S + 1 rows at which sequences begin and end.
    """
    scores_TE = router_scores(logits_TE, config)
    experts, best_TA = scores_TE.shape[1], scores_TE.topk(per_token, -1).indices
    total = scores_TE.new_zeros(())
    for start, stop in pairwise(offsets):
        used_E = count_choices(best_TA[start:stop], experts) * (experts / (per_token * (stop - start)))
        total = total + (used_E * scores_TE[start:stop].sum(0)).sum()
    return total


def z_loss(logits_TE: Tensor) -> Tensor:
    """Sum over tokens of the squared log-sum-exp of the router's logits (ST-MoE, arXiv 2202.08906, equation 5)."""
    return logits_TE.logsumexp(-1).square().sum()


@torch.no_grad()
def move_bias(bias_E: Tensor, used_E: Tensor, rate: float) -> None:
    """Balance without a loss: experts that got fewer tokens than the mean are preferred next time, by `rate`
    (DeepSeek-V3, section 2.1.2; arXiv 2408.15664). The shifts are centred, which changes no choice."""
    shift_E = (used_E.float().mean() - used_E.float()).sign() * rate
    bias_E += shift_E - shift_E.mean()


def routers(decoder: Decoder) -> Iterator[tuple[RouterConfig, Tensor | None]]:
    """Each router's config and correction bias, in the order in which a step collects."""
    for module in decoder.modules():
        if isinstance(module, Router):
            yield module.config, module.e_score_correction_bias if module.config.correction_bias else None
