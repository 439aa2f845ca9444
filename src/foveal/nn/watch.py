"""What a sparse block computes from, for those who teach its indexer or measure it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from foveal.kernels import KeySource, Queries


@dataclass(frozen=True)
class Glance:
    """What index scores are computed from (see `foveal.kernels.select`)."""

    q_TIJ: Tensor
    weights_TI: Tensor
    keys: KeySource


@dataclass(frozen=True)
class Gaze:
    """What dense attention is computed from (see `foveal.kernels.attention`)."""

    q_THP: Tensor
    keys: KeySource
    """Rows [G, P]; latent attention: one absorbed key for all heads."""
    scale: float


@dataclass(frozen=True)
class Sight:
    """One block with an indexer, in one step."""

    glance: Glance
    gaze: Gaze
    queries: Queries
    selection_TK: Tensor | None
    """int32 [T, K], -1 last; None: everything was seen."""


Watch = Callable[[Sight], None]
"""Called by each block that has an indexer, first layer first."""
