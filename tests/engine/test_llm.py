"""The public face, on the fake model."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foveal.engine import llm as llm_module
from foveal.engine.llm import LLM
from foveal.engine.params import SamplingParams

from .fakes import EOS, VOCABULARY, ByteTokenizer, FakeModel, FakeStore, greedy_tokens

PLAN = SimpleNamespace(page_bytes=1000, slot_bytes=0, window=None, sinks=0, has_slots=False)
GREEDY = SamplingParams(temperature=0.0, max_tokens=5)


class FakeDecoder(FakeModel):
    """The fake model with what `LLM` asks of a decoder."""

    config = SimpleNamespace(blocks=(), vocab_size=VOCABULARY, max_positions=400, eos_token_ids=(EOS,))
    options = SimpleNamespace(dtype="float32")
    packed = False

    def pack(self) -> None:
        self.packed = True


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDecoder:
    fake = FakeDecoder()
    monkeypatch.setattr(llm_module, "resolve_model", lambda name: tmp_path)
    monkeypatch.setattr(llm_module, "load_model", lambda path, **options: fake)
    monkeypatch.setattr(llm_module, "load_tokenizer", lambda path: ByteTokenizer())
    monkeypatch.setattr(llm_module, "generation_defaults", lambda path: {})
    monkeypatch.setattr(llm_module, "plan_cache", lambda *settings: PLAN)
    monkeypatch.setattr(llm_module, "CacheStore", lambda plan, pages, slots, device: FakeStore(pages, slots))
    return fake


def test_generate_answers_in_order(decoder: FakeDecoder) -> None:
    """Guards against outputs in the order in which requests end, and parameters that reach the wrong prompt."""
    llm = LLM("fake")
    prompts = ["a", {"prompt_token_ids": [5, 6, 7]}, {"prompt": "c", "prompt_token_ids": [9]}]
    outputs = llm.generate(prompts, [SamplingParams(temperature=0.0, max_tokens=count) for count in (9, 1, 4)])
    assert [output.prompt for output in outputs] == ["a", None, "c"]
    assert [output.prompt_token_ids for output in outputs] == [[97], [5, 6, 7], [9]]
    for output, count in zip(outputs, (9, 1, 4), strict=True):
        assert output.outputs[0].token_ids == greedy_tokens(output.prompt_token_ids, count)
        assert output.outputs[0].text == ByteTokenizer().decode(output.outputs[0].token_ids)
    assert len(llm.generate("a", GREEDY)) == 1 and len(llm.generate("a")[0].outputs[0].token_ids) == 16
    assert llm.usage.pages_in_use == 0
    assert decoder.packed


def test_a_long_prompt_fails_alone(decoder: FakeDecoder) -> None:
    """Guards against an exception, or a missing answer, for a prompt that does not fit."""
    long, short = LLM("fake", max_model_len=20).generate(["x" * 20, "x"], GREEDY)
    assert long.error and "20 tokens" in long.error and long.prompt == "x" * 20
    assert short.error is None


def test_nonsense_is_refused_before_anything_runs(decoder: FakeDecoder) -> None:
    """Guards against half a batch that was computed for nothing, or stays behind in the engine."""
    llm = LLM("fake")
    for prompts in (["a", ""], ["a", {"prompt_token_ids": [VOCABULARY]}], ["a", {"ids": [1]}], ["a", 3], [[1, 2]]):
        with pytest.raises(ValueError):
            llm.generate(prompts, GREEDY)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 entries for 1 prompts"):
        llm.generate("a", [GREEDY, GREEDY])
    assert not decoder.batches and not llm.engine.has_work


def test_streams_are_cumulative_and_may_be_interleaved(decoder: FakeDecoder) -> None:
    """Guards against outputs of one stream that are lost because the other one ran the step."""
    llm = LLM("fake")
    first, second = llm.stream("a", GREEDY), llm.stream("b", GREEDY)
    pairs = list(zip(first, second, strict=True))
    assert [len(one.outputs[0].token_ids) for one, _ in pairs] == [1, 2, 3, 4, 5]
    assert pairs[-1][0].outputs == llm.generate("a", GREEDY)[0].outputs
    assert pairs[-1][1].outputs == llm.generate("b", GREEDY)[0].outputs


def test_a_closed_stream_leaves_nothing_behind(decoder: FakeDecoder) -> None:
    """Guards against a request that goes on after its reader has left."""
    llm = LLM("fake")
    stream = llm.stream("a", SamplingParams(max_tokens=300))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_work and llm.usage.pages_in_use == 0


def test_chat_goes_through_the_template(decoder: FakeDecoder) -> None:
    """Guards against a conversation that reaches the model without its template."""
    llm = LLM("fake")
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY)
    assert output.prompt == "user: hi\nassistant:"
    assert output.outputs == llm.generate("user: hi\nassistant:", GREEDY)[0].outputs
    assert [one.outputs for one in llm.chat([messages, messages], GREEDY)] == [output.outputs] * 2


def test_without_tokenizer(decoder: FakeDecoder) -> None:
    """Guards against loading a tokenizer that was declined, and against text without one."""
    llm = LLM("fake", skip_tokenizer_init=True, enforce_eager=True)
    (output,) = llm.generate({"prompt_token_ids": [1, 2]}, GREEDY)
    assert output.outputs[0].token_ids == greedy_tokens([1, 2], 5) and output.outputs[0].text == ""
    assert not decoder.packed
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        llm.generate("text", GREEDY)


def test_a_seed_repeats_the_whole_run(decoder: FakeDecoder) -> None:
    """Guards against unseeded sampling that cannot be repeated, and against a seed that changes nothing."""
    params = SamplingParams(max_tokens=20)

    def run(seed: int) -> list[Any]:
        return [output.outputs for output in LLM("fake", seed=seed).generate(["a", "b"], params)]

    assert run(1) == run(1) != run(2)


def test_end_tokens_of_both_config_files(decoder: FakeDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against chat models that never stop because their end token is only in generation_config.json."""
    decoder.scripted = {1: 7, 2: 8}
    for eos, count in ((8, 2), ([7, 8], 1), (None, 5)):
        defaults = json.loads(json.dumps({"eos_token_id": eos}))
        monkeypatch.setattr(llm_module, "generation_defaults", lambda path, found=defaults: found)
        assert len(LLM("fake").generate("a", GREEDY)[0].outputs[0].token_ids) == count


@pytest.mark.parametrize("eos", ["2", [2, None], True])
def test_an_end_token_that_is_none_is_named(decoder: FakeDecoder, monkeypatch: pytest.MonkeyPatch, eos: object) -> None:
    """Guards against a TypeError from sorting, or a token that never comes."""
    monkeypatch.setattr(llm_module, "generation_defaults", lambda path: {"eos_token_id": eos})
    with pytest.raises(ValueError, match=r"generation_config\.json: 'eos_token_id' must be"):
        LLM("fake")


def test_options_arrive(decoder: FakeDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an option that is taken and dropped, and against torch's name of fp8."""
    options: dict[str, Any] = {}
    formats: list[tuple[str, ...]] = []

    def load_model(path: Path, **given: Any) -> FakeDecoder:
        options.update(given)
        return decoder

    def plan_cache(config: Any, dtype: Any, *given: str) -> SimpleNamespace:
        formats.append(given)
        return PLAN

    monkeypatch.setattr(llm_module, "load_model", load_model)
    monkeypatch.setattr(llm_module, "plan_cache", plan_cache)
    mine = ByteTokenizer()
    fp8 = torch.float8_e4m3fn
    llm = LLM(
        "fake",
        mla_form="absorbed",
        kv_cache_dtype=fp8,
        index_dtype=fp8,
        tokenizer=mine,
        device="cpu",
        quantization="int4",
        adapter="beside",
        streaming="4+60",
    )
    assert options == {
        "adapter": "beside",
        "streaming": "4+60",
        "dtype": "auto",
        "device": "cpu",
        "index_dtype": "fp8",
        "mla_form": "absorbed",
        "quantization": "int4",
    }
    assert formats == [("fp8", "fp8")] and llm.tokenizer is mine
    LLM("fake", kv_cache_dtype=torch.bfloat16)
    assert formats[1] == ("bfloat16", "auto")


def test_prompt_logprobs_take_bounded_memory(decoder: FakeDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a long prompt whose logits are all there at once."""
    monkeypatch.setattr(llm_module, "_PROMPT_LOGIT_BYTES", 4 * VOCABULARY * 10)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    (output,) = LLM("fake").generate("x" * 35, params)
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 35
    assert [len(batch.ids_T) for batch in decoder.batches] == [10, 10, 10, 5]


def test_a_device_that_torch_does_not_know_is_refused(tmp_path: Path) -> None:
    """Guards against torch's RuntimeError for a mistake of the user's."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="'gpu'"):
        LLM(tmp_path, device="gpu", skip_tokenizer_init=True)


def test_options_are_checked(decoder: FakeDecoder) -> None:
    """Guards against options that are silently ignored or clipped."""
    with pytest.raises(TypeError, match="tensor_parallel_size"):
        LLM("fake", tensor_parallel_size=2)  # type: ignore[call-arg]
    for length in (1, 401):
        with pytest.raises(ValueError, match=f"not {length}"):
            LLM("fake", max_model_len=length)
    with pytest.raises(ValueError, match="max_num_seqs"):
        LLM("fake", max_num_seqs=0)
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        LLM("fake", max_num_batched_tokens=0)
