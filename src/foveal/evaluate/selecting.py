"""A model under another selection than its own: what an indexer's is compared with."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from foveal.models.decoder import Block, Decoder
from foveal.nn.gqa import GQA
from foveal.nn.indexer import Indexer
from foveal.nn.mla import MLA
from foveal.nn.selectors import Oracle, Random, Recency, Selector

KINDS = ("indexer", "dense", "recency", "random", "oracle")


@dataclass(frozen=True)
class Selection:
    """Which tokens attention layers look at.

    kind: "indexer" (the model's own), "dense" (all), "recency" (4 sinks and the most recent), "random", or "oracle"
    (those that dense attention looks at most). topk: how many; None: as many as the model's indexers choose.
    """

    kind: str
    topk: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a selection is one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.topk is not None and self.topk < 1:
            raise ValueError(f"a selection has at least 1 token, not {self.topk}")
        if self.kind == "dense" and self.topk is not None:
            raise ValueError(f"dense attention has no top-k, so {self.topk} means nothing")

    @property
    def name(self) -> str:
        """For tables."""
        return self.kind if self.topk is None else f"{self.kind} {self.topk}"


@contextmanager
def selecting(decoder: Decoder, selection: Selection) -> Iterator[None]:
    """Let every attention layer without a window select so, and restore it afterwards.

    Caches must be new inside and must not be used afterwards: what a layer keeps depends on what those before it saw.
    Raises ValueError where the model has no indexer and one is needed, or a top-k is.
    """
    blocks = [block for block in decoder.modules() if isinstance(block, Block) and _attends(block)]
    topk = selection.topk or decoder.config.index_topk
    if selection.kind == "indexer" and decoder.config.index_topk is None:
        raise ValueError(f"the model has no indexer ({decoder.config.family} without an adapter): nothing selects")
    if selection.kind != "dense" and topk is None:
        raise ValueError(f"selection {selection.kind!r} needs a top-k, as the model has no indexer that has one")
    kept = [(block, block.indexer, block.sparse) for block in blocks]
    configs = [(block.indexer, block.indexer.config) for block in blocks if isinstance(block.indexer, Indexer)]
    fused = decoder.fused
    try:
        for place, block in enumerate(blocks):
            _set(block, selection.kind, topk or 0, place)
        if fused:
            decoder.fuse()
        yield
    finally:
        for block, indexer, sparse in kept:
            block.indexer, block.sparse = indexer, sparse
        for indexer, config in configs:
            indexer.config = config
        if fused:
            decoder.fuse()


def _attends(block: Block) -> bool:
    operation = block.operation
    return isinstance(operation, MLA) or (isinstance(operation, GQA) and operation.config.window is None)


def _set(block: Block, kind: str, topk: int, place: int) -> None:
    if kind == "indexer":
        if isinstance(block.indexer, Indexer):
            block.indexer.config = replace(block.indexer.config, topk=topk)
        return
    block.indexer = _selector(block, kind, topk, place)
    block.sparse = block.indexer is not None


def _selector(block: Block, kind: str, topk: int, place: int) -> Selector | None:
    if kind == "dense":
        return None
    if kind == "recency":
        return Recency(topk)
    if kind == "random":
        return Random(topk, seed=place)
    assert isinstance(block.operation, GQA | MLA)
    return Oracle(topk, block.operation)
