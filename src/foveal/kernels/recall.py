"""How much of what attention would look at a selection holds."""

import torch
from torch import Tensor

from foveal.kernels.dense import widened
from foveal.kernels.keys import KeySource

# Scores of one tile: heads x keys.
_TILE_SCORES = 1 << 19


def attention_recall(
    q_HP: Tensor, keys: KeySource, sequence: int, seen: int, chosen_K: Tensor, *, scale: float
) -> float:
    """The share of one query's dense attention that falls on chosen keys, 0 to 1: the sum over `chosen_K` (int [K],
    positions, no -1) of softmax(scale * q.k) over the sequence's first `seen` keys, averaged over heads.

    q_HP: [H, P]; keys: rows [G, P]. The keys are read tile by tile; beside a tile this takes one byte a key. (For a
    running engine; `foveal.evaluate.recall` measures all queries of a text.)
    """
    groups_heads = (keys.context(sequence, 0, 1).shape[-2], -1)
    q_GhP = widened(q_HP).unflatten(0, groups_heads)
    chosen_N = torch.zeros(seen, dtype=torch.bool, device=q_HP.device)
    chosen_N[chosen_K.long()] = True
    whole_Gh = part_Gh = torch.full(q_GhP.shape[:2], -torch.inf, dtype=q_GhP.dtype, device=q_HP.device)
    tile = max(1, _TILE_SCORES // len(q_HP))
    for start in range(0, seen, tile):
        stop = min(start + tile, seen)
        k_GPn = widened(keys.context(sequence, start, stop)).permute(1, 2, 0)
        logits_Ghn = (q_GhP @ k_GPn) * scale
        whole_Gh = torch.logaddexp(whole_Gh, logits_Ghn.logsumexp(-1))
        logits_Ghn.masked_fill_(~chosen_N[start:stop], -torch.inf)
        part_Gh = torch.logaddexp(part_Gh, logits_Ghn.logsumexp(-1))
    return float((part_Gh - whole_Gh).exp().mean())
