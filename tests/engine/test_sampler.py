"""Every sampling parameter against a naive computation."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveal.engine.params import SamplingParams
from foveal.engine.request import Request, SequenceState, seeded_generator
from foveal.engine.sampler import Sampler

V = 12
EOS = 11
DRAWS = 4000


def sequence(prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> SequenceState:
    request = Request("a", prompt or [0], SamplingParams(**params))
    return SequenceState(request, 0, [*request.prompt_ids, *(output or [])], seeded_generator(params.get("seed", 0), 0))


def random_logits(rows: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def naive_distribution(logits_V: Tensor, one: SequenceState) -> list[float]:
    """The definition of each parameter, one token at a time."""
    params, prompt = one.params, one.request.prompt_ids
    logits = [float(value) for value in logits_V]
    output = one.tokens[len(prompt) :]
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    if len(output) < params.min_tokens:
        for token in [*(params.stop_token_ids or []), *([] if params.ignore_eos else [EOS])]:
            logits[token] = -math.inf
    for token in set(one.tokens):
        divide = logits[token] > 0
        logits[token] = (
            logits[token] / params.repetition_penalty if divide else logits[token] * params.repetition_penalty
        )
    for token, count in Counter(output).items():
        logits[token] -= params.frequency_penalty * count + params.presence_penalty
    best = max(logits)
    weights = [math.exp((value - best) / params.temperature) for value in logits]
    order = sorted(range(V), key=lambda token: (-weights[token], token))
    kept = [token for token in order if weights[token] >= params.min_p * max(weights)]
    if params.top_k > 0:
        kept = kept[: params.top_k]
    total, nucleus = 0.0, []
    for token in kept:
        nucleus.append(token)
        total += weights[token] / sum(weights[other] for other in kept)
        if total >= params.top_p:
            break
    norm = sum(weights[token] for token in nucleus)
    return [weights[token] / norm if token in nucleus else 0.0 for token in range(V)]


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_k": -1},
    {"top_k": 50},
    {"top_k": 10**30},
    {"top_p": 0.7},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"logit_bias": {1: 3.0, 2: -100.0}},
    {"repetition_penalty": 1.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8},
    {"frequency_penalty": -0.8, "presence_penalty": 0.3, "repetition_penalty": 0.8},
    {"min_tokens": 9, "stop_token_ids": [3], "max_tokens": None},
    {"min_tokens": 9, "stop_token_ids": [3], "ignore_eos": True, "max_tokens": None},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.8, "min_p": 0.05, "frequency_penalty": 0.5, "logit_bias": {4: 1.0}},
]


@pytest.mark.parametrize("params", CASES, ids=str)
def test_frequencies_are_those_of_the_naive_distribution(params: dict[str, Any]) -> None:
    """Guards against a parameter that is ignored, applied in the wrong order, or to the wrong tokens."""
    one = sequence(prompt=[1, 2, 2], output=[3, 4, 4, 4], **params)
    logits_V = random_logits(1)[0]
    drawn = Counter(Sampler([EOS]).sample(logits_V.expand(DRAWS, V), [one] * DRAWS))
    for token, probability in enumerate(naive_distribution(logits_V, one)):
        if probability == 0.0:
            assert drawn[token] == 0, token
        # Five standard deviations.
        margin = 5 * math.sqrt(probability * (1 - probability) / DRAWS) + 1e-9
        assert drawn[token] / DRAWS == pytest.approx(probability, abs=margin), token


def test_rows_do_not_depend_on_each_other() -> None:
    """Guards against draws, filters or penalties that leak between the rows of a batch."""
    logits_LV = random_logits(len(CASES))
    rows = [sequence([1, 2], [3, 3], seed=row, **params) for row, params in enumerate(CASES)]
    alone = [
        Sampler([EOS]).sample(logits_LV[row : row + 1], [sequence([1, 2], [3, 3], seed=row, **params)])[0]
        for row, params in enumerate(CASES)
    ]
    assert Sampler([EOS]).sample(logits_LV, rows) == alone


def test_greedy() -> None:
    """Guards against ties going anywhere but to the lowest id, and against greedy rows that skip the processors."""
    logits_LV = torch.tensor([[0.0, 2.0, 2.0], [1.0, 2.0, 0.0], [0.0, 2.0, 1.9]])
    before_LV = logits_LV.clone()
    rows = [
        sequence(temperature=0.0),
        sequence(temperature=0.0, logit_bias={0: 1.5}),
        sequence([0], [1], temperature=1e-6, presence_penalty=0.5),
    ]
    assert Sampler().sample(logits_LV, rows) == [1, 0, 2]
    assert torch.equal(logits_LV, before_LV)


def test_ties_at_the_border_of_top_k_and_top_p() -> None:
    """Guards against keeping more tokens than asked for because their logits are equal."""
    uniform_LV = torch.zeros(DRAWS, V)
    assert set(Sampler().sample(uniform_LV, [sequence(top_k=2)] * DRAWS)) == {0, 1}
    assert set(Sampler().sample(uniform_LV, [sequence(top_p=0.24)] * DRAWS)) == {0, 1, 2}


def test_penalties_follow_the_output() -> None:
    """Guards against counts that are made once and never brought up to date."""
    one = sequence([0], [], temperature=0.0, frequency_penalty=1.0)
    logits_LV = torch.tensor([[0.0, 3.5, 2.0, 0.0]])
    for _ in range(5):
        one.tokens += Sampler().sample(logits_LV, [one])
    assert one.tokens[1:] == [1, 1, 2, 1, 2]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 0.999))
def test_a_wide_nucleus_is_found_in_a_large_vocabulary(seed: int, top_p: float) -> None:
    """Guards against the shortlist cutting a nucleus that is wider than it."""
    logits_V = torch.randn(3000, generator=torch.Generator().manual_seed(seed)) * (seed % 5 / 4)
    one = sequence(top_p=top_p, seed=seed)
    sorted_V, order_V = logits_V.softmax(-1).sort(descending=True, stable=True)
    size = int((sorted_V.cumsum(-1, dtype=torch.float64) < top_p).sum()) + 1
    drawn = Sampler().sample(logits_V.expand(50, -1), [one] * 50)
    assert set(drawn) <= set(order_V[:size].tolist())
    assert size < 50 or len(set(drawn)) > 1


def test_logprobs_are_of_raw_logits() -> None:
    """Guards against wrong ranks, a missing chosen token, and values after temperature."""
    logits_LV = random_logits(3)
    want_LV = logits_LV.log_softmax(-1)
    order = want_LV.argsort(dim=-1, descending=True).tolist()
    tokens = [order[0][0], order[1][5], order[2][1]]
    entries = Sampler(decode_token=str).logprobs(logits_LV, tokens, 2)
    assert [list(entry) for entry in entries] == [order[0][:2], [*order[1][:2], order[1][5]], order[2][:2]]
    for row, entry in enumerate(entries):
        for token, logprob in entry.items():
            assert logprob.rank == order[row].index(token) + 1
            assert logprob.logprob == pytest.approx(float(want_LV[row, token]))
            assert logprob.decoded_token == str(token)
    assert [list(entry) for entry in Sampler().logprobs(logits_LV, tokens, 0)] == [[token] for token in tokens]


def test_logprobs_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against rows that get lost between tiles, and against a copy of all rows."""
    logits_LV, tokens = random_logits(300).bfloat16(), [row % V for row in range(300)]
    want = Sampler().logprobs(logits_LV.float(), tokens, 3)
    sizes: list[int] = []
    log_softmax = Tensor.log_softmax

    def watched(tile_LV: Tensor, **options: Any) -> Tensor:
        sizes.append(len(tile_LV))
        return log_softmax(tile_LV, **options)

    monkeypatch.setattr(Tensor, "log_softmax", watched)
    assert Sampler().logprobs(logits_LV, tokens, 3) == want
    assert sizes == [128, 128, 44]
    entries = Sampler().logprobs(logits_LV[200:201], tokens[200:201], 3)
    assert entries == want[200:201]
