"""Trained tokenizers, and what data asks of any tokenizer."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from foveal.models.tokenizer import load_tokenizer
from foveal.train.data import DataSettings, TextSettings, TokenizerSettings, open_tokenizer
from foveal.train.data.tokenizer import Encoder, save_tokenizer, train_tokenizer

TEXTS = ["In 1984, 27 men: don't!", "  two  spaces\n\n\ttabs ", "naïve 你好 😀", "12345678901", ""]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A trained tokenizer, saved."""
    settings = TokenizerSettings(vocab_size=400)
    save_tokenizer(train_tokenizer(["the year 1984 and the year 1985 " * 20], settings), settings, tmp_path)
    return tmp_path


def test_the_directory_is_standard(folder: Path) -> None:
    """transformers and foveal read the same tokenizer from it, and text survives, bytes it never saw included."""
    for loaded in (AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)):
        assert [loaded.decode(loaded.encode(text)) for text in TEXTS] == TEXTS
        assert (loaded.eos_token, loaded.eos_token_id, len(loaded)) == ("<|endoftext|>", 0, loaded.vocab_size)
        assert loaded.encode("a<|im_start|>b")[1] == 1
    assert "year" in loaded.get_vocab()


def test_digits_stand_alone(folder: Path) -> None:
    """A number that is one token can only be recalled, not copied digit by digit."""
    loaded = load_tokenizer(folder)
    assert [loaded.decode([i]) for i in loaded.encode("1984")] == ["1", "9", "8", "4"]
    assert not [token for token in loaded.get_vocab() if len(token) > 1 and any(c.isdigit() for c in token)]


@pytest.mark.parametrize("wrong", [{"vocab_size": 258}, {"special_tokens": ()}, {"special_tokens": ("<a>", "<a>")}])
def test_settings_that_cannot_be_met(wrong: dict[str, Any]) -> None:
    """Every byte and every special token needs an id, and documents need an end."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TokenizerSettings(**wrong)


def test_training_happens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same settings and files find the trained tokenizer; another size or another text does not."""
    (tmp_path / "a.txt").write_text("the quick brown fox " * 30)
    data = DataSettings(TokenizerSettings(vocab_size=300), (TextSettings((tmp_path / "a.txt",)),))
    first = open_tokenizer(data, tmp_path / "cache").get_vocab()
    calls: list[int] = []
    monkeypatch.setattr(
        "foveal.train.data.tokenizer.train_tokenizer", lambda *given: calls.append(1) or train_tokenizer(*given)
    )
    assert open_tokenizer(data, tmp_path / "cache").get_vocab() == first and not calls
    (tmp_path / "a.txt").write_text("a lazy dog " * 30)
    assert open_tokenizer(data, tmp_path / "cache").get_vocab() != first and calls


def test_long_texts_are_encoded_in_parts(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut at line ends: the same ids as whole."""
    texts = ["one two\n" * 40, "short", "no line end at all " * 9]
    encoder = Encoder(tokenizer)
    whole = encoder.documents(texts)
    monkeypatch.setattr("foveal.train.data.tokenizer._PART", 50)
    parts = encoder.documents(texts)
    assert parts[:2] == whole[:2]
    assert [tokenizer.decode(ids) for ids in parts] == [f"{text}<|endoftext|>" for text in texts]


def test_settings_of_a_given_tokenizer_do_not_change_data(tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer.json that truncates or pads would cut documents without a word."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(5)
    backend.enable_padding(length=30)
    ids = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")).documents(["fox " * 50])
    assert ids == Encoder(tokenizer).documents(["fox " * 50]) and len(ids[0]) > 50


def test_no_end_token_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    """Without one documents could not end."""
    with pytest.raises(ValueError, match="eos_token"):
        Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer))
