"""`foveal chat` with its conversation on standard input."""

import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from foveal import LLM
from foveal.engine import RequestOutput


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that reach the model, in order."""
    prompts: list[str] = []
    stream = LLM.stream

    def recording(self: LLM, prompt: Any, params: Any = None) -> Iterator[RequestOutput]:
        prompts.append(prompt["prompt"])
        return stream(self, prompt, params)

    monkeypatch.setattr(LLM, "stream", recording)
    return prompts


def _say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_keeps_the_conversation(run: Any, tiny_model: str, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a model that forgets the turns before; the end of input ends the chat."""
    _say(monkeypatch, "one", "", "two")
    ended = run("chat", tiny_model, "--max-tokens", "4")
    assert ended.code == 0
    assert asked[0] == "user:one\nassistant:"
    assert len(asked) == 2
    answer = asked[1].removeprefix(asked[0]).removesuffix("\nuser:two\nassistant:")
    assert ended.out.startswith(answer + "\n")


def test_reset_forgets_and_exit_ends(
    run: Any, tiny_model: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against commands that are sent to the model as messages."""
    _say(monkeypatch, "one", "/reset", "two", "/exit", "three")
    assert run("chat", tiny_model, "--max-tokens", "4").code == 0
    assert asked == ["user:one\nassistant:", "user:two\nassistant:"]


def test_an_unknown_command_is_named(
    run: Any, tiny_model: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a mistyped command that is sent to the model."""
    _say(monkeypatch, "/rest now")
    ended = run("chat", tiny_model)
    assert "/rest " in ended.err
    assert asked == []
