"""The selections that an indexer's is compared with."""

from pathlib import Path

import pytest
import torch
from oracle import make_oracle

from foveal import load_model
from foveal.models.decoder import Block
from foveal.nn.batch import Batch
from foveal.nn.selectors import Oracle, Random, Recency, random, recent
from foveal.nn.step import Step


def rows(selection_TK: torch.Tensor) -> list[list[int]]:
    return [[place for place in row if place >= 0] for row in selection_TK.tolist()]


def test_recency_is_sinks_and_the_last() -> None:
    chosen = rows(recent(torch.tensor([3, 9, 10, 50]), 10))
    assert chosen == [[0, 1, 2, 3], list(range(10)), [0, 1, 2, 3, *range(5, 11)], [0, 1, 2, 3, *range(45, 51)]]


@pytest.mark.parametrize(("topk", "expected"), [(1, [20]), (2, [0, 20]), (5, [0, 1, 18, 19, 20])])
def test_few_tokens_are_not_all_sinks(topk: int, expected: list[int]) -> None:
    assert rows(recent(torch.tensor([20]), topk)) == [expected]


def test_random_is_even_distinct_and_in_order() -> None:
    """Guards against tokens drawn twice, or some of them never."""
    positions = torch.full((4000,), 99)
    chosen_TK = torch.cat([random(positions[:1], 10, seed) for seed in range(4000)])
    assert (chosen_TK.diff(dim=1) > 0).all()
    assert chosen_TK.min() >= 0 and chosen_TK.max() <= 99
    counts = torch.bincount(chosen_TK.flatten(), minlength=100)
    assert (counts - 400).abs().max() < 5 * 20  # 400 each, with a standard deviation of 20


def test_random_does_not_depend_on_chunks() -> None:
    positions = torch.arange(200)
    whole = random(positions, 16, seed=3)
    torch.testing.assert_close(whole[70:90], random(positions[70:90], 16, seed=3))
    assert rows(whole)[7] == list(range(8))
    assert not torch.equal(whole[100:], random(positions, 16, seed=4)[100:])
    assert not torch.equal(whole[100], whole[101])


@pytest.mark.parametrize("family", ["llama", "deepseek_v32"])
@torch.no_grad()
def test_the_oracle_chooses_what_attention_looks_at(family: str, tmp_path: Path) -> None:
    """Against the attention weights that transformers returns."""
    changes = {"index_topk": 256} if family == "deepseek_v32" else {}
    oracle = make_oracle(family, tmp_path, attn_implementation="eager", **changes)
    model = load_model(tmp_path)
    ids = torch.randint(3, 128, (2, 60), generator=torch.Generator().manual_seed(0))
    shares_SNN = oracle(ids, output_attentions=True).attentions[0].mean(1)
    block = next(module for module in model.modules() if isinstance(module, Block))
    step = Step(Batch.packed(ids))
    h_TD = block.norm(model.embed_tokens(step.batch.ids_T))
    selection_TK = Oracle(9, block.operation)(h_TD, block.operation.query_latent(h_TD), step, None)
    assert selection_TK is not None and selection_TK.dtype == torch.int32
    for chosen, shares_N in zip(rows(selection_TK), shares_SNN.flatten(0, 1), strict=True):
        seen = int((shares_N > 0).sum())
        assert chosen == sorted(shares_N.topk(min(9, seen)).indices.tolist())


def test_nothing_is_selected_where_everything_fits() -> None:
    """The contract of `Indexer.forward`."""
    step = Step(Batch.packed([torch.arange(10), torch.arange(4)]))
    nothing = torch.zeros(14, 1)
    assert Recency(10)(nothing, nothing, step, None) is None
    selection_TK = Random(9, seed=0)(nothing, nothing, step, None)
    assert selection_TK is not None and rows(selection_TK)[10:] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    dense = Step(Batch.packed([torch.arange(10)], dense=True))
    assert Recency(3)(nothing[:10], nothing[:10], dense, None) is None


def test_a_selection_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 token, not 0"):
        Recency(0)
