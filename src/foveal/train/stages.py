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
    index: bool
    """The indexers' loss, over what was attended to."""
    distils: bool = False
    """The base learns from a teacher's next token instead of the text's."""


KINDS: dict[Kind, StageKind] = {
    "pretrain": StageKind("next-token loss, dense attention", "base", dense=True, index=False),
    "finetune": StageKind("next-token loss, indexers frozen", "base", dense=False, index=False),
    "warmup": StageKind("indexers alone learn where dense attention looks", "indexer", dense=True, index=True),
    "sparse": StageKind("sparse attention, both losses", "all", dense=False, index=True),
    "distil": StageKind("sparse attention, a teacher's distribution", "all", dense=False, index=True, distils=True),
}
