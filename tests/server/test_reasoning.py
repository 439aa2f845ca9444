"""Reasoning parted from the answer, however the text is cut."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from foveal import Guidance
from foveal.server.reasoning import ReasoningSplitter, after_reasoning, opens_reasoning, reasons

PIECES = st.sampled_from(["<think>", "</think>", "<th", "ink>", "</", "\n", " ", "the", "<", "a b"])


def split(pieces: list[str], *, inside: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(inside=inside)
    parts = [*map(splitter.feed, pieces), splitter.finish()]
    return "".join(part.reasoning for part in parts), "".join(part.content for part in parts)


@pytest.mark.parametrize(
    "text, inside, reasoning, content",
    [
        ("<think>\nhm\n</think>\n\nyes", False, "hm", "yes"),
        ("hm, <b> so\n</think>\n\nyes </think> no", True, "hm, <b> so", "yes </think> no"),
        ("yes <think>no</think>", False, "", "yes <think>no</think>"),
        ("  plain\n", False, "", "  plain\n"),
        ("<think>cut off", False, "cut off", ""),
        ("<thin", False, "", "<thin"),
        ("hm </thi", True, "hm </thi", ""),
        ("</think>yes", True, "", "yes"),
        ("", True, "", ""),
    ],
)
def test_what_is_reasoning(text: str, inside: bool, reasoning: str, content: str) -> None:
    """Guards against marks in either part, an answer taken for reasoning, and lost text."""
    assert split([text], inside=inside) == (reasoning, content)
    assert split(list(text), inside=inside) == (reasoning, content)


@given(st.lists(PIECES, max_size=12), st.booleans(), st.lists(st.integers(0, 60), max_size=8))
@example(["</th", "ink>"], True, [])
def test_any_cut_gives_the_same(pieces: list[str], inside: bool, cuts: list[int]) -> None:
    """Guards against a mark that leaks because it came in two pieces."""
    text = "".join(pieces)
    ends = sorted({min(cut, len(text)) for cut in cuts})
    again = [text[start:stop] for start, stop in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert split(pieces, inside=inside) == split([text], inside=inside) == split(again, inside=inside)


def test_a_stream_shows_what_is_certain_at_once() -> None:
    """Guards against a splitter that waits for the end."""
    splitter = ReasoningSplitter(inside=True)
    assert splitter.feed("one two").reasoning == "one two"
    assert splitter.feed(" </th").reasoning == ""
    assert splitter.feed("en").reasoning == " </then"
    assert splitter.feed("</think>\nyes").content == "yes"


def test_templates_and_prompts() -> None:
    """Guards against splitting the answers of models that do not reason, or whose reasoning is switched off."""
    assert reasons("{% if x %}<think>{% endif %}{{ y.split('</think>') }}")
    assert not reasons("{{ messages }}") and not reasons(None)
    assert opens_reasoning("<|im_start|>assistant\n<think>\n")
    assert not opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_grammars_do_not_mix() -> None:
    """Guards against a form that is dropped where reasoning comes first."""
    with pytest.raises(ValueError, match="grammar"):
        after_reasoning(Guidance(grammar='start: "a"'), {})
