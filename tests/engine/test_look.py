"""The look: what sparse layers selected, against a whole forward with every score in sight."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import VOCAB, make_oracle

from foveal import LLM, SamplingParams, load_model
from foveal.engine.look import LayerSight, TokenSelection
from foveal.engine.outputs import CompletionOutput
from foveal.kernels import Contexts, KeySource, Rows
from foveal.kernels.divergence import attention_shares, future
from foveal.kernels.recall import attention_recall
from foveal.models.decoder import Decoder
from foveal.nn.batch import Batch
from foveal.nn.watch import Sight

from .fakes import make_world, request

TOPK = 12
PROMPT = torch.randint(3, VOCAB, (90,), generator=torch.Generator().manual_seed(1)).tolist()
LOOK = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, selection=True)


@pytest.fixture(scope="module", params=["deepseek_v32", "glm_moe_dsa"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    make_oracle(request.param, path)
    return path


def look(llm: LLM, ids: list[int], params: SamplingParams = LOOK) -> CompletionOutput:
    (output,) = llm.generate({"prompt_token_ids": ids}, params)
    assert output.error is None
    return output.outputs[0]


def positions(runs: Any) -> list[int]:
    return [place for first, last in zip(runs[::2], runs[1::2], strict=True) for place in range(first, last)]


class Whole:
    """Selections and recalls of every token of a sequence in one forward without a cache, [N, N] and all."""

    def __init__(self, decoder: Decoder, ids: list[int]) -> None:
        self._masses: list[torch.Tensor] = []
        batch = Batch.packed([torch.tensor(ids)])
        with torch.no_grad():
            output = decoder.step(_collecting(batch), watch=self._watch)
        self.layers = output.collected["selection"]

    def _watch(self, sight: Sight) -> None:
        count = len(sight.gaze.q_THP)
        k_NGP = sight.gaze.keys.context(0, 0, count)
        hidden_TN = future(0, count, count, k_NGP.device)
        shares_TN = attention_shares(sight.gaze.q_THP, k_NGP, sight.gaze.scale, hidden_TN)
        chosen_TK = sight.selection_TK
        assert chosen_TK is not None
        self._masses.append((shares_TN.gather(1, chosen_TK.clamp(min=0).long()) * (chosen_TK >= 0)).sum(1))

    def token(self, row: int) -> tuple[list[list[int]], list[float]]:
        chosen = [[place for place in layer[row].tolist() if place >= 0] for layer in self.layers]
        return chosen, [float(mass[row]) for mass in self._masses]


def _collecting(batch: Batch) -> Batch:
    return Batch(batch.ids_T, batch.positions_T, batch.q_offsets, batch.k_lengths, collect=frozenset({"selection"}))


def test_selections_and_recall_are_those_of_a_whole_forward(folder: Path) -> None:
    """Guards against selections of another row, layer or sequence, and recalls over the wrong keys, through chunks,
    pages, fused steps and neighbours."""
    llm = LLM(folder, dtype="float32", skip_tokenizer_init=True, max_num_batched_tokens=37)
    other = SamplingParams(temperature=0.0, max_tokens=15, ignore_eos=True)
    short = {"prompt_token_ids": PROMPT[:5]}
    outputs = llm.generate([short, {"prompt_token_ids": PROMPT}, short], [other, LOOK, LOOK])
    decoder = load_model(folder, dtype="float32")
    for output in outputs[1:]:
        completion = output.outputs[0]
        ids = [*output.prompt_token_ids, *completion.token_ids]
        whole = Whole(decoder, ids)
        assert completion.selection is not None and len(completion.selection) == len(completion.token_ids)
        for place, one in enumerate(completion.selection):
            seen = len(output.prompt_token_ids) + place
            chosen, recall = whole.token(seen - 1)
            assert one.seen == seen
            assert [positions(runs) for runs in one.layers] == chosen
            assert all(len(layer) == min(seen, TOPK) for layer in chosen)
            known = [value for value in one.recall if value is not None]
            assert known == pytest.approx(recall, abs=1e-4)
    assert outputs[0].outputs[0].selection is None


def test_layers_that_share_a_selection_have_no_recall_of_their_own(folder: Path) -> None:
    """Guards against a recall that is given for the wrong layer."""
    llm = LLM(folder, dtype="float32", skip_tokenizer_init=True)
    (first, *_) = look(llm, PROMPT).selection or []
    sparse = [sight for sight in llm.layer_sights if sight.kind == "sparse"]
    assert len(first.layers) == len(first.recall) == len(sparse)
    assert all(sight.reach == TOPK for sight in sparse)
    shared = [place for place, value in enumerate(first.recall) if value is None]
    assert all(first.layers[place] == first.layers[place - 1] for place in shared)
    assert bool(shared) == ("glm" in str(folder))


def test_it_changes_nothing_else(folder: Path) -> None:
    """Guards against a look that alters tokens, is lost by preemption, or is shared by the completions of a request."""
    roomy = LLM(folder, dtype="float32", skip_tokenizer_init=True, seed=3)
    plain = SamplingParams(temperature=1.0, n=2, seed=5, max_tokens=70, ignore_eos=True)
    asked = SamplingParams(temperature=1.0, n=2, seed=5, max_tokens=70, ignore_eos=True, selection=True)
    prompts = [{"prompt_token_ids": PROMPT[:40]}, {"prompt_token_ids": PROMPT[10:60]}]
    want = roomy.generate(prompts, plain)
    got = roomy.generate(prompts, asked)
    page_bytes = roomy.cache_bytes(1)
    tight = LLM(folder, dtype="float32", skip_tokenizer_init=True, max_model_len=128, kv_cache_memory=5 * page_bytes)
    again = tight.generate(prompts, asked)
    assert tight.engine.preemptions > 0
    for one, two, three in zip(want, got, again, strict=True):
        for plainly, looked, preempted in zip(one.outputs, two.outputs, three.outputs, strict=True):
            assert plainly.token_ids == looked.token_ids == preempted.token_ids
            assert looked.selection is not None and preempted.selection is not None
            assert [token.layers for token in looked.selection] == [token.layers for token in preempted.selection]
    *_, last = roomy.stream(prompts[0], asked)
    assert [one.token_ids for one in last.outputs] == [one.token_ids for one in got[0].outputs]
    assert [len(one.selection or ()) for one in last.outputs] == [70, 70]


def test_nothing_is_recorded_unasked() -> None:
    """Guards against requests that pay for a look they did not ask for."""
    world = make_world()
    world.run(request("plain", 100), request("long", 300, max_tokens=3))
    assert world.model.batches and not any(batch.collect for batch in world.model.batches)
    assert not world.model.watched


def test_models_that_select_nothing(tmp_path: Path) -> None:
    """Guards against an error, or an invented selection, where a model has no indexer."""
    make_oracle("mistral", tmp_path / "mistral")
    make_oracle("jamba", tmp_path / "jamba")
    llm = LLM(tmp_path / "mistral", dtype="float32", skip_tokenizer_init=True)
    selection = look(llm, PROMPT).selection
    assert selection == [TokenSelection(90 + place, (), ()) for place in range(10)]
    assert llm.layer_sights == tuple(LayerSight(layer, "window", 24) for layer in range(3))
    assert llm.cache_bytes(10_000) == llm.cache_bytes(100)
    llm = LLM(tmp_path / "jamba", dtype="float32", skip_tokenizer_init=True)
    kinds = [sight.kind for sight in llm.layer_sights]
    assert kinds == ["recurrent", "recurrent", "dense", "recurrent"]
    assert llm.cache_bytes(64) < llm.cache_bytes(65) == llm.cache_bytes(128)


@pytest.mark.parametrize("groups", [1, 2])
def test_recall_is_summed_over_tiles(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against tiles that are weighed alike, whatever attention they hold."""
    generator = torch.Generator().manual_seed(groups)
    q_HP = torch.randn(4, 8, generator=generator)
    k_NGP = 3 * torch.randn(50, groups, 8, generator=generator)
    keys = KeySource(Rows(k_NGP), Contexts.packed([20, 30]))
    chosen_K = torch.tensor([0, 7, 8, 26], dtype=torch.int32)
    logits_HN = torch.einsum("hp,nhp->hn", q_HP, k_NGP[20:47].repeat_interleave(4 // groups, 1)) * 0.3
    expected = logits_HN.softmax(-1)[:, chosen_K].sum(1).mean()
    for scores in (4, 40, 1 << 20):
        monkeypatch.setattr("foveal.kernels.recall._TILE_SCORES", scores)
        assert attention_recall(q_HP, keys, 1, 27, chosen_K, scale=0.3) == pytest.approx(float(expected), rel=1e-5)
