"""`foveal generate`: the prompt from all sources, text and JSON."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from foveal import LLM, SamplingParams

_PROMPT = "Once upon a time"
_LENGTH = ("--max-tokens", "12")


@pytest.fixture(scope="module")
def expected(tiny_model: str) -> str:
    """What the library writes after the prompt."""
    return LLM(tiny_model, max_num_seqs=1).generate(_PROMPT, _greedy())[0].outputs[0].text


def _greedy() -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=12)


def test_streams_what_the_library_writes(run: Any, tiny_model: str, expected: str) -> None:
    """Guards against text that is doubled or lost between the steps of a stream."""
    assert run("generate", tiny_model, _PROMPT, *_LENGTH) == (0, expected + "\n", "")


def test_reads_standard_input(run: Any, tiny_model: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against `-` taken for the prompt itself."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(_PROMPT))
    assert run("generate", tiny_model, "-", *_LENGTH).out == expected + "\n"


def test_reads_a_file(run: Any, tiny_model: str, expected: str, tmp_path: Path) -> None:
    """Guards against a file name taken for the prompt."""
    file = tmp_path / "prompt.txt"
    file.write_text(_PROMPT)
    assert run("generate", tiny_model, "--file", str(file), *_LENGTH).out == expected + "\n"


def test_json_is_one_object(run: Any, tiny_model: str, expected: str) -> None:
    """Guards the fields that scripts read."""
    ended = run("generate", tiny_model, _PROMPT, *_LENGTH, "--json")
    answer = json.loads(ended.out)
    assert answer["model"] == tiny_model
    assert answer["prompt"] == _PROMPT
    assert answer["text"] == expected
    assert len(answer["token_ids"]) == 12
    assert answer["prompt_tokens"] == len(_PROMPT)
    assert answer["finish_reason"] == "length"
    assert 0 < answer["first_token_seconds"] <= answer["total_seconds"]
    assert answer["tokens_per_second"] > 0


def test_one_token_has_no_speed(run: Any, tiny_model: str) -> None:
    """Guards against a division by the time between one token and itself."""
    assert (
        json.loads(run("generate", tiny_model, _PROMPT, "--max-tokens", "1", "--json").out)["tokens_per_second"] is None
    )


def test_chat_uses_the_template(run: Any, tiny_model: str) -> None:
    """Guards against a question put raw to a chat model."""
    answer = json.loads(run("generate", tiny_model, "Hi", "--chat", *_LENGTH, "--json").out)
    llm = LLM(tiny_model, max_num_seqs=1)
    asked = llm.chat([{"role": "user", "content": "Hi"}], _greedy())[0]
    assert asked.prompt == "user:Hi\nassistant:"
    assert answer["token_ids"] == asked.outputs[0].token_ids


def test_sampling_options_arrive(run: Any, tiny_model: str) -> None:
    """Guards against a sampling option that is parsed and dropped."""
    settings = ("--temperature", "1.5", "--top-k", "50", "--top-p", "0.9", "--seed", "7")
    answer = json.loads(run("generate", tiny_model, _PROMPT, *_LENGTH, *settings, "--json").out)
    params = SamplingParams(temperature=1.5, top_k=50, top_p=0.9, seed=7, max_tokens=12)
    assert answer["token_ids"] == LLM(tiny_model, max_num_seqs=1).generate(_PROMPT, params)[0].outputs[0].token_ids


def test_stop_ends_the_text(run: Any, tiny_model: str, expected: str) -> None:
    """Guards `--stop`: the text ends before it."""
    stop = expected[4:6]
    answer = json.loads(run("generate", tiny_model, _PROMPT, *_LENGTH, "--stop", stop, "--json").out)
    assert answer["text"] == expected[: expected.index(stop)]
    assert answer["finish_reason"] == "stop"


def test_quantization(run: Any, tiny_model: str) -> None:
    """Guards against weights that are not rounded after all, and a wrong name that is not refused in one line."""
    rounded = LLM(tiny_model, max_num_seqs=1, quantization="int8").generate(_PROMPT, _greedy())[0].outputs[0].text
    assert run("generate", tiny_model, _PROMPT, *_LENGTH, "--quantization", "int8").out == rounded + "\n"
    ended = run("generate", tiny_model, _PROMPT, *_LENGTH, "--quantization", "int2")
    assert ended == (2, "", "foveal: quantization must be one of int8, int4, not 'int2'\n")
    ended = run("generate", tiny_model, _PROMPT, *_LENGTH, "--quantization", "int4")
    assert ended.code == 2 and "mlp.down_proj: int4 in groups of 32" in ended.err and ended.err.count("\n") == 1


def test_which_word_is_what(run: Any, tiny_model: str, expected: str, tmp_path: Path) -> None:
    """A prompt taken for a model, a model for a prompt."""
    file = tmp_path / "prompt.txt"
    file.write_text(_PROMPT)
    assert run("generate", "--file", str(file), tiny_model, *_LENGTH).out == expected + "\n"
    for words in ([], [tiny_model, _PROMPT, "more"], [tiny_model, _PROMPT, "--file", str(file)]):
        ended = run("generate", *words)
        assert ended.code == 2 and "exactly one of PROMPT and --file" in ended.err
    for lone in (tiny_model, "smollm2", "owner/name"):
        ended = run("generate", lone)
        assert ended.code == 2 and "names a model, and there is no text" in ended.err
