"""Several processes must learn what one learns, whatever they divide, and read each other's checkpoints."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import context_gradients, read_state, together, train
from tiny import CONFIG, stage

from foveal.nn.batch import Batch
from foveal.train.parallel import Parallel, join
from foveal.train.parallel.context import share_context
from foveal.train.parallel.directions import part_sizes
from foveal.train.schema import ParallelSettings, Recipe
from foveal.train.trainer import Trainer

Make = Callable[..., Recipe]
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
INDEXER = {"heads": 4, "head_dim": 16, "topk": 8, "rope_dim": 8}
DENSE = CONFIG | {"first_k_dense_replace": 2}  # routers round to float32, so that float64 would not tell much


@pytest.fixture
def run(recipe: Make, tmp_path: Path) -> Callable[..., Recipe]:
    """run(output, expert=..., context=...): three layers, two of them with experts; documents short and long; the
    stages that have losses of their own. In float64: in float32 a rounding now and then chooses another expert."""
    (tmp_path / "three.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 3}))
    chosen = random.Random(0)
    words = ["tan", "kilo", "sopi", "mu", "relo", "ki"]
    documents = [" ".join(chosen.choices(words, k=chosen.choice([3, 15, 40, 120]))) for _ in range(100)]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    balance = {"balance_weight": 0.1, "z_weight": 0.01}
    stages = stage("pretrain", 2, optimizer="muon", **balance) + stage("warmup", 1) + stage("sparse", 3, **balance)
    stages = stages.replace("tokens_per_step = 128", "tokens_per_step = 256")

    def make(output: str, stages: str = stages, model: str = 'dtype = "float64"', **sizes: int) -> Recipe:
        model = f'config = "three.json"\n{model}'
        given = recipe(stages, model=model, output=output, evaluate_tokens=192, checkpoint_minutes=1e-9)
        return replace(given, parallel=ParallelSettings(timeout_minutes=2.0, **sizes))

    return make


def figures(recipe: Recipe) -> list[dict[str, float]]:
    """What was logged, apart from times."""
    lines = [json.loads(line) for line in (recipe.run.output / "log.jsonl").read_text().splitlines()]
    names = ("update", "loss", "index_loss", "balance_loss", "z_loss", "gradient_norm", "tokens")
    names += ("held_out_loss", "held_out_loss_sparse")
    return [{name: line[name] for name in names if name in line} for line in lines if "resumed_from" not in line]


def agree(one: Recipe, several: Recipe, tolerance: float = 1e-5) -> None:
    expected, found = figures(one), figures(several)
    assert len(expected) == 6 + 3 and [x.keys() for x in expected] == [x.keys() for x in found]
    for wanted, values in zip(expected, found, strict=True):
        for name, value in wanted.items():
            assert values[name] == pytest.approx(value, rel=tolerance), (wanted["update"], name)


def test_two_processes_divide_rows_and_experts(run: Callable[..., Recipe]) -> None:
    """Another result than one process has, in any stage; and a checkpoint of two that one cannot go on from."""
    one, two = run("one"), run("two", expert=2)
    Trainer(one).train()
    together(2, train, two, 4)
    Trainer(replace(two, parallel=ParallelSettings())).train()
    agree(one, two)


def read_state_of(recipe: Recipe, stage: int, folder: Path, sizes: list[tuple[int, int]]) -> None:
    """Processes and expert parallelism that all read one state, bit for bit."""
    states = []
    for ranks, expert in sizes:
        file = folder / f"state-{ranks}-{expert}.pt"
        settings = replace(recipe.parallel, expert=expert, context=1)
        together(ranks, read_state, replace(recipe, parallel=settings), stage, file)
        states.append(torch.load(file))
    assert {name.rpartition(".")[2] for name in states[0]} >= {"exp_avg_sq", "momentum", "weight"}
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in states[0].items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "expert", "context"),
    [(2, 1, 1), (2, 1, 2), (2, 2, 2), (4, 1, 1), (4, 2, 1), (4, 4, 1), (4, 1, 2), (4, 1, 4), (4, 4, 2), (4, 2, 4)],
)
def test_divided(run: Callable[..., Recipe], ranks: int, expert: int, context: int) -> None:
    """Another result than one process has."""
    one, several = run("one"), run("several", expert=expert, context=context)
    Trainer(one).train()
    together(ranks, train, several)
    agree(one, several)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [((2, 1), (4, 1)), ((4, 1), (1, 1)), ((4, 2), (4, 4)), ((4, 4), (2, 2)), ((1, 1), (4, 2))]
)
def test_other_numbers_go_on(
    run: Callable[..., Recipe], tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """Parameters or optimiser states that change on the way from one number of processes to another; Muon's as well."""
    one, several = run("one"), run("several", expert=before[1])
    Trainer(one).train()
    together(before[0], train, several, 1)
    read_state_of(several, 0, tmp_path, [before, after])
    together(after[0], train, replace(several, parallel=replace(several.parallel, expert=after[1])))
    agree(one, several)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_activations_again(run: Callable[..., Recipe], dtype: str) -> None:
    """Layers computed again while their weights are cut, experts counted twice; masters of bfloat16 parts."""
    model = f'checkpoint_activations = true\ndtype = "{dtype}"'
    one, several = run("one", model=model), run("several", model=model, expert=2, context=2)
    Trainer(one).train()
    together(4, train, several)
    agree(one, several, 1e-5 if dtype == "float64" else 0.1)
    losses = [[x["loss"] for x in figures(r) if "loss" in x] for r in (one, several)]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


@pytest.mark.slow
def test_distilling(run: Callable[..., Recipe]) -> None:
    """A teacher that is the model itself: its weights are whole twice in a step."""
    distil = stage("distil", 4, temperature=2.0).replace("tokens_per_step = 128", "tokens_per_step = 256")
    one, several = run("one", distil), run("several", distil, expert=2, context=2)
    Trainer(one).train()
    together(4, train, several)
    for wanted, values in zip(figures(one), figures(several), strict=True):
        assert values == pytest.approx(wanted, rel=1e-4)


MODELS = {
    "latent": (DENSE, None, False),
    "latent, again": (DENSE, None, True),
    "grouped": (LLAMA, INDEXER, False),
    "window": (LLAMA | {"model_type": "mistral", "sliding_window": 10}, None, False),
    "dynamic rope": (
        LLAMA
        | {
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        },
        None,
        False,
    ),
}


def test_contexts() -> None:
    """Tokens at wrong positions, keys of the wrong sequence, gradients that do not come back."""
    settings = ParallelSettings(context=2, timeout_minutes=1.0)
    together(2, context_gradients, settings, MODELS["latent"], [50, 5, 20], False)


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_all_contexts(model: str, ranks: int, dense: bool) -> None:
    """As above, for every way to attend; lengths that nothing divides."""
    settings = ParallelSettings(context=ranks, timeout_minutes=1.0)
    together(ranks, context_gradients, settings, MODELS[model], [61, 3, 1, 20], dense)


class Group:
    """Rank r of several."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.size = (lambda: rank), (lambda: ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shares_of_a_context(ranks: int) -> None:
    """A token that nobody computes, or two do; work that is not balanced."""
    batch = Batch.packed([torch.arange(n) for n in (64, 7, 1, 56)])
    rows, work = [], []
    for rank in range(ranks):
        own, rows_t = share_context(batch, Group(rank, ranks))  # type: ignore[arg-type]
        assert torch.equal(own.ids_T, batch.ids_T[rows_t]) and torch.equal(own.positions_T, batch.positions_T[rows_t])
        starts = [int(own.positions_T[start]) for start in own.q_offsets[:-1]]
        assert starts == list(own.queries.positions)
        ends = [int(own.positions_T[stop - 1]) + 1 for stop in own.q_offsets[1:]]
        assert ends == list(own.contexts.lengths)
        first_rows = [int(rows_t[a]) - start for (a, _), start in zip(pairwise(own.q_offsets), starts, strict=True)]
        assert first_rows == list(own.contexts.starts)
        rows.append(rows_t)
        work.append(int(own.positions_T.sum()))
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(128))
    assert max(work) < 1.3 * min(work)


@pytest.mark.parametrize(("count", "ranks"), [(8, 4), (7, 4), (5, 4), (2, 4), (1, 1)])
def test_parts_are_cut_as_fsdp_cuts(count: int, ranks: int) -> None:
    """Rows of a matrix that Muon would put in the wrong place."""
    expected = [len(part) for part in torch.arange(count).chunk(ranks)]
    assert part_sizes(count, ranks) == expected + [0] * (ranks - len(expected))


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group where nothing asks for one, or a size that is quietly ignored."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert type(join(ParallelSettings())) is Parallel
    with pytest.raises(ValueError, match=r"parallel.expert = 2 does not divide 1 process"):
        join(ParallelSettings(expert=2))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"parallel.context = 3 does not divide 4 processes"):
        join(ParallelSettings(context=3))
