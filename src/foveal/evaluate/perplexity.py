"""Perplexity by position: how well the next token is foreseen, after how much context."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from foveal.evaluate.estimate import Estimate, of_groups
from foveal.evaluate.prefill import Prefill
from foveal.evaluate.text import Window
from foveal.kernels.transfer import upload
from foveal.models.decoder import Decoder

# Logits of one tile of rows: never those of all positions.
TILE_LOGITS = 1 << 23
# With so many windows they are the groups of a standard error; with fewer, stretches of so many tokens are.
_WINDOWS, _STRETCH = 8, 64

Advance = Callable[[int], None]
"""Told how many more tokens are done."""


@dataclass(frozen=True)
class Bucket:
    """Predictions after `start` to `stop` - 1 tokens of context."""

    start: int
    stop: int
    nats: Estimate
    """Mean negative log-likelihood of a token."""

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return exp(self.nats.mean)

    @property
    def perplexity_error(self) -> float | None:
        """Standard error of the perplexity, to first order."""
        return None if self.nats.error is None else self.perplexity * self.nats.error

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON."""
        error = self.nats.error
        return {
            "from": self.start,
            "to": self.stop,
            "tokens": self.nats.count,
            "nats": self.nats.mean,
            "nats_error": error,
            "bits": self.nats.mean / log(2),
            "bits_error": None if error is None else error / log(2),
            "perplexity": self.perplexity,
            "perplexity_error": self.perplexity_error,
        }


@dataclass(frozen=True)
class Perplexity:
    """All predictions together, and by position."""

    whole: Bucket
    buckets: list[Bucket]


@torch.no_grad()
def token_losses(prefill: Prefill, ids: Sequence[int], first: int = 1) -> Tensor:
    """-ln p(token | all tokens before it) of the tokens from position `first` on: float32 [len(ids) - first], on the
    CPU."""
    assert first >= 1
    losses = []
    for positions, x_LD in prefill.run(ids[:-1], first - 1):
        targets_L = upload(ids[positions.start + 1 : positions.stop + 1], x_LD.device)
        losses.append(row_losses(prefill.decoder, x_LD, targets_L))
    return torch.cat(losses).cpu()


def row_losses(decoder: Decoder, x_LD: Tensor, targets_L: Tensor) -> Tensor:
    """Cross entropies, float32 [L], of rows that `Decoder.trunk` gave; logits a tile of rows at a time."""
    rows = max(1, TILE_LOGITS // decoder.config.vocab_size)
    tiles = zip(x_LD.split(rows), targets_L.split(rows), strict=True)
    return torch.cat([cross_entropy(decoder.head(x_tD), targets_t, reduction="none") for x_tD, targets_t in tiles])


def window_losses(
    decoder: Decoder,
    windows: Sequence[Window],
    advance: Advance | None = None,
    *,
    kv_cache_dtype: str = "auto",
    dense: bool = False,
) -> list[Tensor]:
    """`token_losses` of every window, for `by_position` and `difference`; the keyword options are `Prefill`'s."""
    length = max(len(window.ids) for window in windows)
    prefill = Prefill(decoder, length, kv_cache_dtype=kv_cache_dtype, dense=dense)
    losses = []
    for window in windows:
        losses.append(token_losses(prefill, window.ids))
        if advance:
            advance(len(window.ids))
    return losses


def by_position(losses: Sequence[Tensor], edges: Sequence[int] | None = None) -> Perplexity:
    """Mean losses in buckets of position between `edges` (None: powers of two from 64 on).

    losses: for each window those of its second token (position 1: one token of context), third, and so on. Buckets
    without any are left out. Raises ValueError for edges that do not rise.
    """
    longest = 1 + max(len(one) for one in losses)
    edges = default_edges(longest) if edges is None else checked_edges(edges)
    buckets = [_bucket(losses, start, stop) for start, stop in pairwise(edges)]
    whole = _bucket(losses, 1, longest)
    assert whole is not None
    return Perplexity(whole, [bucket for bucket in buckets if bucket is not None])


def difference(losses: Sequence[Tensor], others: Sequence[Tensor], edges: Sequence[int] | None = None) -> Perplexity:
    """How much higher `losses` are than `others` on the same tokens, with paired standard errors.

    A bucket's mean is then a difference in nats; its `perplexity` is the ratio of the two perplexities.
    """
    assert [len(one) for one in losses] == [len(one) for one in others], "not the same tokens"
    return by_position([mine - other for mine, other in zip(losses, others, strict=True)], edges)


def default_edges(length: int) -> list[int]:
    """1, 64, 128, 256 and so on up to `length`."""
    edges = [1]
    while edges[-1] < length:
        edges.append(min(max(64, 2 * edges[-1]), length))
    return edges


def checked_edges(edges: Sequence[int]) -> list[int]:
    """`edges`, if they are positions that rise. Position 0 has no context and nothing is predicted there."""
    if len(edges) < 2 or edges[0] < 0 or any(low >= high for low, high in pairwise(edges)):
        raise ValueError(f"positions must be at least two rising numbers from 0 on, not {list(edges)}")
    return list(edges)


def _bucket(losses: Sequence[Tensor], start: int, stop: int) -> Bucket | None:
    start = max(1, start)
    parts = [part for one in losses if len(part := one[start - 1 : stop - 1])]
    if not parts:
        return None
    if len(parts) < _WINDOWS:
        parts = [stretch for part in parts for stretch in part.split(_STRETCH)]
    sums = torch.stack([part.double().sum() for part in parts])
    return Bucket(start, stop, of_groups(sums, torch.tensor([len(part) for part in parts])))
