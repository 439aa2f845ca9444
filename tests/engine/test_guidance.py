"""Completions of a given form, on random tiny models with both kinds of tokenizer."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import make_oracle
from words import byte_level, save_words, sentencepiece

from foveal import LLM, Guidance, SamplingParams
from foveal.engine.outputs import CompletionOutput

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["cat", "naïve 😀", None, 3]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "kind", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tokens = save_words(byte_level("gpt-2") if request.param == "byte-level" else sentencepiece(), folder)
    # More rows than the tokenizer has tokens, as in many released checkpoints.
    make_oracle("llama", folder, vocab_size=tokens + 13, max_position_embeddings=1024, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(checkpoint, dtype="float32")


def guided(**settings: Any) -> SamplingParams:
    forms = {
        name: settings.pop(name) for name in ("json_object", "json_schema", "regex", "grammar") if name in settings
    }
    return SamplingParams(**{"max_tokens": 400, **settings, "guidance": Guidance(**forms)})


def complete(llm: LLM, prompt: str, params: SamplingParams) -> CompletionOutput:
    (output,) = llm.generate(prompt, params)
    assert output.error is None
    return output.outputs[0]


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Schemas whose instances are short."""
    simple = st.one_of(
        st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 5)),
        st.builds(
            lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
            st.integers(-99, 99),
            st.integers(0, 99),
        ),
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "pattern": "^[a-f]{2}x?$"}]),
        st.builds(
            lambda values: {"enum": values},
            st.lists(st.text(max_size=3) | st.integers(-5, 5), min_size=1, max_size=3, unique=True),
        ),
    )

    def larger(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        names = st.text("abcé_ ", min_size=1, max_size=4)
        objects = st.dictionaries(names, inner, max_size=3).flatmap(
            lambda properties: st.builds(
                lambda required: {
                    "type": "object",
                    "properties": properties,
                    "required": sorted(required),
                    "additionalProperties": False,
                },
                st.sets(st.sampled_from(sorted(properties))) if properties else st.just(set()),
            )
        )
        arrays = st.builds(lambda items, n: {"type": "array", "items": items, "maxItems": n}, inner, st.integers(0, 3))
        return objects | arrays | st.builds(lambda one, two: {"anyOf": [one, two]}, inner, inner)

    return st.recursive(simple, larger, max_leaves=4)


@settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
@given(schema=schemas(), seed=st.integers(0, 2**31), temperature=st.sampled_from([0.0, 0.7, 1.5]))
def test_any_schema_is_kept(llm: LLM, schema: dict[str, Any], seed: int, temperature: float) -> None:
    """Guards against tokens that break the form, half characters, and text that goes on after its end."""
    output = complete(llm, "the cat", guided(json_schema=schema, seed=seed, temperature=temperature))
    assert output.finish_reason == "stop", "a bounded schema ends by itself"
    jsonschema.validate(json.loads(output.text), schema)


def test_json_objects_expressions_and_grammars(llm: LLM) -> None:
    """Guards against forms that are taken for one another."""
    for seed in range(4):
        text = complete(llm, "the", guided(regex="(the|a) [0-9]{2,4}( (cat|hat)){1,2}!", seed=seed)).text
        assert re.fullmatch("(the|a) [0-9]{2,4}( (cat|hat)){1,2}!", text)
        text = complete(llm, "the", guided(grammar='start: "(" (start | "x") ")"', seed=seed, logit_bias={1: 5})).text
        assert re.fullmatch(r"\(+x\)+", text) and text.count("(") == text.count(")")
        output = complete(llm, "the", guided(json_object=True, seed=seed, temperature=2.0, max_tokens=600))
        if output.finish_reason == "stop":
            assert isinstance(json.loads(output.text), dict)
    text = complete(llm, "the", guided(json_schema=json.dumps({"const": [1, {"a": "😀"}]}))).text
    assert json.loads(text) == [1, {"a": "😀"}]


def test_others_in_the_batch_are_left_alone(llm: LLM) -> None:
    """Guards against a mask on the wrong row, and a guide that is shared by the completions of one request."""
    plain = [SamplingParams(temperature=t, seed=5, max_tokens=30) for t in (0.0, 1.0)]
    form = guided(json_schema=SCHEMA, seed=7, n=3)
    alone = [llm.generate("the mat", one)[0] for one in (*plain, form)]
    together = llm.generate(["the mat"] * 3, [plain[0], form, plain[1]])
    assert [together[place].outputs for place in (0, 2, 1)] == [one.outputs for one in alone]
    texts = [output.text for output in together[1].outputs]
    assert len(set(texts)) == 3
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_streams_and_preemption_change_nothing(checkpoint: Path, llm: LLM) -> None:
    """Guards against a guide that starts again, or stays ahead, when its sequence is computed again."""
    regex = "([a-d]{3} ){60}"
    params = [guided(regex=regex, seed=seed) for seed in range(4)]
    want = [llm.generate("the cat sat", one)[0].outputs for one in params]
    # Room for little more than one of them.
    tight = LLM(checkpoint, dtype="float32", max_model_len=400, kv_cache_memory=9 * 64 * 2 * 2 * 2 * 16 * 4)
    got = tight.generate(["the cat sat"] * 4, params)
    assert tight.engine.preemptions > 0
    assert [one.outputs for one in got] == want
    *early, last = llm.stream("the cat sat", params[0])
    assert [last.outputs] == want[:1] and last.outputs[0].text.startswith(early[3].outputs[0].text)


def test_the_end(llm: LLM) -> None:
    """Guards against an end before the grammar allows one, none where nothing can follow, and ignored stops."""
    eos = llm.tokenizer.eos_token_id
    eager = {"logit_bias": {eos: 100.0}, "temperature": 0.0}
    output = complete(llm, "a", guided(regex="[a-d]{3}[a-d]*", **eager))
    assert len(output.text) == 3 and output.token_ids[-1] == eos and output.finish_reason == "stop"
    output = complete(llm, "a", guided(regex="[a-d]{3}", ignore_eos=True, **eager))
    assert len(output.text) == 3 and eos not in output.token_ids and output.finish_reason == "stop"
    output = complete(llm, "a", guided(regex="[a-d]*", ignore_eos=True, max_tokens=9, **eager))
    assert output.finish_reason == "length" and eos not in output.token_ids
    output = complete(llm, "a", guided(json_schema={"const": "the end"}, stop="end"))
    assert output.text == '"the ' and output.stop_reason == "end"
    assert complete(llm, "a", guided(regex="", **eager)).text == ""
    assert complete(llm, "a", guided(json_schema=SCHEMA, max_tokens=2)).finish_reason == "length"


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"json_schema": {"type": "objekt"}}, "json_schema: .*objekt"),
        ({"json_schema": {"not": {"type": "object"}}}, "json_schema: .*not"),
        ({"json_schema": {"$ref": "http://example.org/schema"}}, "json_schema: .*example.org"),
        ({"regex": "[ab"}, "regex: .*unclosed character class"),
        ({"regex": "(?=a)b"}, "regex: .*look-around"),
        ({"grammar": "start: missing"}, "grammar: .*missing"),
    ],
)
def test_a_form_that_cannot_be_kept_is_refused(llm: LLM, settings: dict[str, Any], words: str) -> None:
    """Guards against a request that runs without its form, or dies in the middle."""
    with pytest.raises(ValueError, match=words):
        llm.generate("a", guided(**settings))
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    "settings, words",
    [
        ({}, "exactly one"),
        ({"regex": "a", "json_object": True}, "json_object and regex"),
        ({"regex": 3}, "regex must be"),
        ({"json_schema": [1]}, "json_schema must be"),
        ({"json_schema": {"const": {1, 2}}}, "no JSON"),
        ({"json_schema": "{"}, "no JSON"),
        ({"json_schema": "true"}, "must be an object"),
        ({"json_schema": '{"not":' * 100_000}, "no JSON"),
        ({"json_object": "yes"}, "json_object must be"),
    ],
)
def test_nonsense_is_refused_at_once(settings: dict[str, Any], words: str) -> None:
    """Guards against errors that come long after the mistake."""
    with pytest.raises(ValueError, match=words):
        Guidance(**settings)


def test_what_contradicts_a_form() -> None:
    """Guards against a parameter that is accepted and cannot be honoured."""
    with pytest.raises(ValueError, match="min_tokens = 3"):
        guided(regex="a", min_tokens=3)
    with pytest.raises(ValueError, match="guidance must be"):
        SamplingParams(guidance="a")  # type: ignore[arg-type]


def test_a_model_that_cannot_write_it_says_so(tmp_path: Path) -> None:
    """Guards against a step that fails for all where one request's form has no tokens; here no token has a letter z."""
    tokenizer = sentencepiece()
    data = json.loads(tokenizer.to_str())
    del data["model"]["vocab"]["<0x7A>"]
    data["model"]["vocab"]["spare"] = 3 + 0x7A
    data["model"]["byte_fallback"] = False
    save_words(type(tokenizer).from_str(json.dumps(data)), tmp_path)
    make_oracle("llama", tmp_path, vocab_size=320, num_hidden_layers=1)
    llm = LLM(tmp_path, dtype="float32")
    lost, other = llm.generate(["a", "a"], [guided(regex="azb"), guided(regex="atb")])
    assert lost.error and lost.error.startswith("guidance: ") and lost.outputs[0].finish_reason == "error"
    assert other.outputs[0].text == "atb"
    assert llm.usage.pages_in_use == 0


def test_without_the_package(llm: LLM, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an import error where the optional package is missing."""
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    fresh = LLM(checkpoint, dtype="float32", max_model_len=64)
    with pytest.raises(ValueError, match=r"foveal\[serve\]"):
        fresh.generate("a", guided(regex="a"))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        LLM(checkpoint, skip_tokenizer_init=True, max_model_len=64).generate(
            {"prompt_token_ids": [5]}, guided(regex="a")
        )
