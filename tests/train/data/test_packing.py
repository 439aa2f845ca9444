"""Packing and mixing: nothing lost, nothing torn without need, shares exact."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveal.train.data.packing import Mixer, pack_epoch, random_words, row_count

LENGTHS = st.lists(st.integers(2, 70), min_size=1, max_size=60)


@given(LENGTHS, st.integers(4, 40), st.integers(0, 3))
def test_every_token_comes_once_and_rows_are_full(lengths: list[int], context: int, seed: int) -> None:
    """Guards against lost or doubled text: in a pass every token comes once, but for what fills the last row up."""
    epoch = pack_epoch(np.array(lengths), context, seed)
    rows = [epoch.row(i) for i in range(len(epoch.offsets) - 1)]
    assert len(rows) == row_count(np.array(lengths), context)
    assert all(sum(length for length, _, _ in row) == context for row in rows)
    seen = Counter((d, start + i) for row in rows for length, d, start in row for i in range(length))
    assert set(seen) == {(d, i) for d, length in enumerate(lengths) for i in range(length)}
    assert sum(seen.values()) - len(seen) < context


@given(LENGTHS, st.integers(4, 40))
def test_long_documents_stay_long(lengths: list[int], context: int) -> None:
    """A document gives all the whole rows it can, and they are not shared with others."""
    epoch = pack_epoch(np.array(lengths), context, 5)
    rows = [epoch.row(i) for i in range(len(epoch.offsets) - 1)]
    whole = Counter(row[0][1] for row in rows if len(row) == 1)
    assert all(whole[d] >= length // context for d, length in enumerate(lengths))


def test_documents_that_fit_are_not_cut() -> None:
    """Best fit: 6 + 2 and 5 + 3 fill rows of 8 without a cut, in whatever order they come."""
    lengths = np.array([6, 5, 2, 3] * 50)
    epoch = pack_epoch(lengths, 8, 0)
    assert len(epoch.pieces) == len(lengths)


def test_passes_differ_and_seeds_repeat() -> None:
    """Each pass has an order of its own, and the same seed gives the same one."""
    lengths = np.arange(2, 60)
    first, again, other = (pack_epoch(lengths, 16, 1, epoch).pieces.tolist() for epoch in (0, 0, 1))
    assert first == again != other


def test_random_numbers_are_pinned() -> None:
    """A stream must not change under another version of numpy: a resumed run would see other data."""
    assert random_words(2, 1, 2).tolist() == [5527141919257688469, 1364028082176693913]


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_shares_are_exact_after_any_number_of_rows(weights: list[float]) -> None:
    """The quota property: n x share, rounded up or down, for every n; rows of a source are counted without gaps."""
    mixer = Mixer(weights)
    drawn: list[list[int]] = [[] for _ in weights]
    for total in range(1, 120):
        source, number = mixer.next()
        drawn[source].append(number)
        for given_rows, weight in zip(mixer.rows, weights, strict=True):
            assert abs(given_rows - total * weight / sum(weights)) < 1 + 1e-9
    assert all(numbers == list(range(len(numbers))) for numbers in drawn)


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [2, 1, 1]])
def test_sources_alternate(weights: list[float]) -> None:
    """Rows of one source do not come in blocks."""
    mixer = Mixer(weights)
    rarest = len(weights) - 1
    places = [i for i in range(40) if mixer.next()[0] == rarest]
    assert {b - a for a, b in pairwise(places)} <= {sum(weights) // weights[-1] + d for d in (-1, 0, 1)}
