"""Incremental text on a byte tokenizer, where every character of several bytes is split over tokens."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from foveal.engine.detokenize import Detokenizer

from .fakes import ByteTokenizer

decode = ByteTokenizer().decode


def test_a_character_split_over_tokens_appears_whole() -> None:
    """Guards against half of an emoji in a stream."""
    detokenizer = Detokenizer(decode, prompt=list(b"say: "))
    texts = []
    for token in "a🦊é".encode():
        detokenizer.append(token)
        texts.append(detokenizer.safe_text)
    assert texts == ["a", "a", "a", "a", "a🦊", "a🦊", "a🦊é"]


def test_the_end_of_the_output_lets_out_what_was_held_back() -> None:
    """Guards against text that differs from the decoded tokens once nothing more can come."""
    detokenizer = Detokenizer(decode, prompt=[])
    tokens = "a🦊".encode()[:-1]
    for token in tokens:
        detokenizer.append(token)
    assert detokenizer.text == "a"
    detokenizer.finish()
    assert detokenizer.text == decode(tokens)


@given(st.lists(st.sampled_from([*b"ab ", *"é🦊".encode(), 0xFF, 256, 257]), max_size=60), st.binary(max_size=8))
def test_text_is_that_of_all_tokens_at_once(tokens: list[int], prompt: bytes) -> None:
    """Guards against characters lost or doubled where the window moves, for any bytes, valid or not."""
    prompt = prompt.decode(errors="ignore").encode()
    detokenizer = Detokenizer(decode, prompt=list(prompt))
    for token in tokens:
        before = detokenizer.text
        detokenizer.append(token)
        assert detokenizer.text.startswith(before)
    detokenizer.finish()
    if len(tokens) <= 30:  # longer runs without one whole character are let out as they are
        assert detokenizer.text == decode(tokens)


def test_a_character_begun_in_the_prompt_is_shown() -> None:
    """Guards against losing the character whose first bytes are the end of the prompt."""
    detokenizer = Detokenizer(decode, prompt=list("a🦊".encode()[:-1]))
    detokenizer.append("🦊".encode()[-1])
    detokenizer.append(ord("b"))
    assert detokenizer.text == "🦊b"


def test_a_decoder_that_takes_back_whole_characters() -> None:
    """Guards against doubled text with SentencePiece's byte fallback: there, one half character turns its whole run of
    bytes, characters shown before included, into replacement characters until it is complete."""

    def fallback(ids: Sequence[int]) -> str:
        text = decode(ids)
        return "\ufffd" * len(ids) if "\ufffd" in text else text

    detokenizer = Detokenizer(fallback, prompt=[])
    texts = []
    for token in "é🦊éa".encode():
        detokenizer.append(token)
        texts.append(detokenizer.text)
    assert texts[-1] == "é🦊éa" and not any("\ufffd" in text for text in texts)


def test_the_cost_of_a_token_does_not_grow() -> None:
    """Guards against decoding everything again with each token, also where the output is no UTF-8 at all."""
    longest = 0

    def counted(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    for pattern in (b"abc ", b"\xff", "🦊".encode()):
        detokenizer = Detokenizer(counted, prompt=[])
        for token in pattern * 200:
            detokenizer.append(token)
    assert longest <= 70


def test_a_stop_string_over_three_tokens_is_cut_and_never_shown() -> None:
    """Guards against looking for stop strings within one token, and against showing their beginning."""
    detokenizer = Detokenizer(decode, prompt=[], stop=["END", "xx"])
    shown, found = [], None
    for token in b"a ENE END more":
        found = detokenizer.append(token)
        shown.append(detokenizer.safe_text)
        if found:
            break
    assert found == "END" and detokenizer.text == "a ENE "
    assert shown == ["a", "a ", "a ", "a ", "a EN", "a ENE ", "a ENE ", "a ENE ", "a ENE "]


def test_the_first_stop_string_in_the_text_wins() -> None:
    """Guards against cutting at the stop string listed first although another one comes earlier."""
    detokenizer = Detokenizer(decode, prompt=[], stop=["p", "to"])
    assert detokenizer.append(256) == "to"
    assert detokenizer.text == "s"


def test_a_stop_string_does_not_begin_before_min_tokens() -> None:
    """Guards against a match that reaches back into text that may not stop."""
    detokenizer = Detokenizer(decode, prompt=[], stop=["ab"])
    assert detokenizer.append(ord("a"), may_stop=False) is None
    assert detokenizer.append(ord("b")) is None
    assert detokenizer.append(ord("a")) is None
    assert detokenizer.append(ord("b")) == "ab"
    assert detokenizer.text == "ab"
