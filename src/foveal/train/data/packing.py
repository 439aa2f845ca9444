"""Packing: one pass over documents as rows of exactly `context` tokens, and orders that depend on numbers alone."""

from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import cycle

import numpy as np
from numpy.typing import NDArray

_WINDOW = 1024
"""Short pieces packed with one another at a time."""

Piece = tuple[int, int, int]
"""Length, document, start in it."""


@dataclass(frozen=True)
class Epoch:
    """Where each row's tokens are."""

    pieces: NDArray[np.int64]
    """[pieces, 3]: length, document, start."""
    offsets: NDArray[np.int64]
    """Row r is pieces[offsets[r] : offsets[r + 1]]."""

    def row(self, number: int) -> list[Piece]:
        """The pieces of one row."""
        rows = self.pieces[self.offsets[number] : self.offsets[number + 1]].tolist()
        return [(length, document, start) for length, document, start in rows]


def random_words(count: int, *seed: int) -> NDArray[np.uint64]:
    """Random 64-bit numbers that depend on `seed` alone, on every machine and under every version of numpy: what numpy
    promises of Philox and SeedSequence, not of the methods of Generator."""
    words: NDArray[np.uint64] = np.random.Philox(np.random.SeedSequence(seed)).random_raw(count)
    return words


def shuffled(count: int, *seed: int) -> NDArray[np.int64]:
    """The numbers below `count` in an order that depends on `seed` alone."""
    return np.argsort(random_words(count, *seed), kind="stable").astype(np.int64)


def row_count(lengths: NDArray[np.int64], context: int) -> int:
    """Rows of one pass over documents of these lengths: the same for every seed."""
    return -(-int(lengths.sum()) // context)


def pack_epoch(lengths: NDArray[np.int64], context: int, *seed: int) -> Epoch:
    """One pass: every token of every document once, in `row_count` rows of exactly `context` tokens.

    A document of at least `context` tokens gives as many whole rows as it can, beginning at a place that varies with
    the seed. What is left of it and shorter documents are packed into rows by best fit, longest first, among _WINDOW
    random others; where nothing fits any more the longest one is cut to fill the row, and its rest is packed later. The
    last row is filled up with documents of this pass once more.
    """
    order = shuffled(len(lengths), *seed, 0)
    phases = random_words(len(lengths), *seed, 1)
    rows: list[list[Piece]] = []
    short: list[Piece] = []
    for document in order.tolist():
        length = int(lengths[document])
        whole, rest = divmod(length, context)
        if not whole:
            short.append((length, document, 0))
            continue
        phase = int(phases[document]) % (rest + 1)
        rows += [[(context, document, phase + i * context)] for i in range(whole)]
        ends = ((phase, document, 0), (rest - phase, document, phase + whole * context))
        short += [piece for piece in ends if piece[0]]
    # The ends of long documents stand next to one another in `short`.
    short = [short[i] for i in shuffled(len(short), *seed, 2).tolist()]
    rows += _pack(short, context)
    assert len(rows) == row_count(lengths, context)
    rows = [rows[i] for i in shuffled(len(rows), *seed, 3).tolist()]
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Epoch(np.array([piece for row in rows for piece in row], dtype=np.int64).reshape(-1, 3), offsets)


def _pack(pieces: Sequence[Piece], context: int) -> Iterator[list[Piece]]:
    pool: list[Piece] = []
    size = 0
    for start in range(0, len(pieces), _WINDOW):
        pool = sorted([*pool, *pieces[start : start + _WINDOW]])
        size = sum(piece[0] for piece in pool)
        while size >= context:
            yield _fill(pool, context)
            size -= context
    if size:
        # Less than a row is left of the pass.
        last = list(pool)
        again = cycle(pieces)
        while size < context:
            length, document, begin = next(again)
            last.append((min(length, context - size), document, begin))
            size += last[-1][0]
        yield last


def _fill(pool: list[Piece], context: int) -> list[Piece]:
    """Take a row out of a pool, sorted by length, of at least `context` tokens."""
    row: list[Piece] = []
    gap = context
    while gap:
        fitting = bisect_right(pool, gap, key=lambda piece: piece[0])
        length, document, start = pool.pop(fitting - 1 if fitting else -1)
        if length > gap:
            insort(pool, (length - gap, document, start + gap))
            length = gap
        row.append((length, document, start))
        gap -= length
    return row


class Mixer:
    """Which source each row comes from: after n rows, source s has given n x its share, rounded up or down.

    The quota method (Balinski and Young 1975, "The quota method of apportionment"): among those which another row
    would not bring above their share rounded up, the one with the lowest (rows + 1) / share. In whole numbers, so that
    no rounding adds up.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(weight) for weight in weights]
        self._shares = [weight / sum(exact) for weight in exact]
        self.rows = [0] * len(weights)
        """What each source has given: all the state there is."""

    def next(self) -> tuple[int, int]:
        """The source of the next row, and the row's number within that source."""
        total = sum(self.rows) + 1
        below = [s for s, share in enumerate(self._shares) if self.rows[s] < share * total]
        source = min(below, key=lambda s: (self.rows[s] + 1) / self._shares[s])
        self.rows[source] += 1
        return source, self.rows[source] - 1
