"""Multi-query associative recall (MQAR; Zoology, arXiv 2312.04927, section 3): pairs of a key and a value, then keys
again, each of which wants its value. Each is a single token."""

from collections.abc import Sequence
from itertools import chain
from random import Random


def draw_associations(
    draw: Random, ids: Sequence[int], pairs: int, queries: int | None = None
) -> tuple[list[int], list[bool]]:
    """The ids of `pairs` pairs and then of `queries` queries (None: as many), two tokens each, and which of them are
    answers: the value behind each query.

    Keys come from the first half of `ids`, values from the second, each at most once. Queries are in random order;
    none comes again before all others have come. Raises ValueError where `ids` has too few for so many pairs.
    """
    keys, values = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    if not 1 <= pairs <= len(keys):
        raise ValueError(f"{len(ids)} tokens make from 1 to {len(keys)} pairs of different ones, not {pairs}")
    told = list(zip(draw.sample(keys, pairs), draw.sample(values, pairs), strict=True))
    queries = pairs if queries is None else queries
    rounds = (draw.sample(told, pairs) for _ in range(-(-queries // pairs)))
    asked = list(chain.from_iterable(rounds))[:queries]
    return list(chain.from_iterable(told + asked)), [False, False] * pairs + [False, True] * queries
