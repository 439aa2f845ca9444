"""Associative recall: what is drawn can be answered, and answers are counted where they stand."""

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import sparse_decoder
from torch import Tensor
from torch.nn.functional import one_hot

from foveal.evaluate import associations
from foveal.evaluate.associations import association_accuracy
from foveal.evaluate.tasks.associations import draw_associations
from foveal.nn.batch import Batch

IDS = range(10, 74)


@pytest.mark.parametrize(("pairs", "queries"), [(1, 5), (7, 3), (8, 20), (32, 32)])
def test_answers_are_the_values_of_their_keys(pairs: int, queries: int) -> None:
    """Every key and value comes once among the pairs; queries go round all keys; what is marked follows its key."""
    ids, answers = draw_associations(Random(pairs), IDS, pairs, queries)
    told = dict(zip(ids[: 2 * pairs : 2], ids[1 : 2 * pairs : 2], strict=True))
    asked, found = ids[2 * pairs :: 2], ids[2 * pairs + 1 :: 2]
    assert len(told) == len(set(told.values())) == pairs and len(asked) == queries
    assert max(told) < 42 <= min(told.values())
    assert found == [told[key] for key in asked]
    assert answers == [False, False] * pairs + [False, True] * queries
    assert all(len(set(asked[start : start + pairs])) == pairs for start in range(0, queries - pairs + 1, pairs))
    assert pairs == 1 or asked[:pairs] != list(told)[: len(asked[:pairs])]


def test_too_many_pairs_are_an_error() -> None:
    """Instead of keys that come twice."""
    with pytest.raises(ValueError, match="from 1 to 32 pairs of different ones, not 33"):
        draw_associations(Random(0), IDS, 33)


class Recaller:
    """A model that knows the answer, except of every third key."""

    config = SimpleNamespace(max_positions=130)
    embed_tokens = SimpleNamespace(weight=torch.zeros(1))

    def trunk(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """As `Decoder.trunk`: one-hot rows of what follows each token's first place in its sequence."""
        ids, following = batch.ids_T.tolist(), []
        for row, token in enumerate(ids):
            start = max(offset for offset in batch.q_offsets if offset <= row)
            place = ids.index(token, start)
            following.append(ids[place + 1] if token % 3 and place < row else 0)
        return one_hot(torch.tensor(following), 80).float(), {}

    def head(self, x_TV: Tensor) -> Tensor:
        """What was foreseen."""
        return x_TV


@pytest.mark.parametrize("begin", [(), (1, 2)])
def test_accuracy_counts_the_answers_alone(monkeypatch: pytest.MonkeyPatch, begin: tuple[int, ...]) -> None:
    """Guards against rows that slip by one, beginnings that are not counted, and parts that come in another order."""
    monkeypatch.setattr(associations, "_AT_ONCE", 150)  # several parts
    model: Any = Recaller()
    found = association_accuracy(model, IDS, 16, 5, seed=3, begin=begin)
    draw = Random("associations 16 3")
    keys = [key for _ in range(5) for key in draw_associations(draw, IDS, 16)[0][:32:2]]
    assert found.mean == pytest.approx(sum(key % 3 > 0 for key in keys) / 80) and found.count == 80
    with pytest.raises(ValueError, match="more than 130 positions"):
        association_accuracy(model, IDS, 32, 1, begin=(1, 2, 3))


def test_sparse_layers_answer_from_their_selection() -> None:
    """A model of the real kind takes it, in both forms, and the same rows give the same answer."""
    decoder = sparse_decoder(torch.float32)
    dense, sparse = (association_accuracy(decoder, range(3, 200), 16, 6, dense=dense) for dense in (True, False))
    assert dense == association_accuracy(decoder, range(3, 200), 16, 6, dense=True)
    assert 0 <= sparse.mean < 0.5 and sparse.error is not None
