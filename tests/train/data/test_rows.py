"""Rows of text: any of them at once, pass after pass, in portions where there are many documents."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foveal.train.data.rows import TextRows
from foveal.train.data.shards import Shard

CONTEXT = 16


def shard(lengths: list[int]) -> Shard:
    """Documents whose tokens are all different numbers."""
    offsets = np.cumsum([0, *lengths])
    return Shard(np.arange(offsets[-1], dtype=np.uint32), offsets, np.arange(len(lengths), dtype=np.uint64), "key")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=40), portion=st.integers(1, 50))
def test_every_pass_has_every_token(lengths: list[int], portion: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many portions: each pass has each token once, but for what fills rows up."""
    monkeypatch.setattr("foveal.train.data.rows._PORTION", portion)
    rows = TextRows(shard(lengths), np.arange(len(lengths)), CONTEXT, (1,))
    portions = -(-len(lengths) // portion)
    number = 0
    for _ in range(2):
        seen: Counter[int] = Counter()
        while len(seen) < sum(lengths):
            seen.update(token for ids in rows.row(number).sequences for token in ids.tolist())
            number += 1
        assert seen.total() - len(seen) < CONTEXT * portions


@pytest.mark.parametrize("portion", [7, 1000])
def test_rows_do_not_depend_on_those_before(portion: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that skips rows, or a run that resumes, gets the same ones."""
    monkeypatch.setattr("foveal.train.data.rows._PORTION", portion)
    source = shard([5, 40, 3, 17, 9, 30, 12, 8, 25, 6, 11, 19])
    rows = TextRows(source, np.arange(12), CONTEXT, (3,))
    straight = [[ids.tolist() for ids in rows.row(number).sequences] for number in range(40)]
    for number in (39, 0, 13, 12, 38, 5):
        again = TextRows(source, np.arange(12), CONTEXT, (3,)).row(number)
        assert [ids.tolist() for ids in again.sequences] == straight[number]
    assert len({str(row) for row in straight}) > 20  # a pass has 12: others differ


def test_only_the_chosen_documents_are_read() -> None:
    """Held-out documents lie in the same memory map."""
    rows = TextRows(shard([10] * 6), np.array([1, 4]), CONTEXT, (0,))
    tokens = {token for number in range(6) for ids in rows.row(number).sequences for token in ids.tolist()}
    assert tokens == {*range(10, 20), *range(40, 50)}
