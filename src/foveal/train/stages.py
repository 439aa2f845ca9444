"""The kinds of stages: which parameters learn, how the model attends, and from which losses it learns."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["pretrain", "finetune", "warmup", "sparse", "distil"]


@dataclass(frozen=True)
class StageKind:
    """What a stage of one kind does."""

    doc: str
    learns: Literal["all", "base", "indexer"]
    """base: everything but the indexers."""
    dense: bool
    """Sparse layers attend to everything."""
    language: bool
    """The next token's loss."""
    index: bool
    """The indexers' loss, over what was attended to."""
    distils: bool = False
    """The divergence from a teacher."""


KINDS: dict[Kind, StageKind] = {
    "pretrain": StageKind("next-token loss, dense attention", "base", True, True, False),
    "finetune": StageKind("next-token loss, indexers frozen", "base", False, True, False),
    "warmup": StageKind("indexers alone learn where dense attention looks", "indexer", True, False, True),
    "sparse": StageKind("sparse attention, both losses", "all", False, True, True),
    "distil": StageKind("sparse attention, a teacher's distribution", "all", False, False, True, distils=True),
}
