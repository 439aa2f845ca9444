"""Documents from files, windows from documents."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from foveal.evaluate import text
from foveal.evaluate.text import cut_windows, prefix_ids, read_documents


def test_text_is_split_at_the_separator(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\n<|endoftext|>\n\n<|endoftext|>\ntwo é\n", encoding="utf-8")
    assert read_documents(file) == ["one", "two é"]
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert read_documents(packed) == ["one", "two é"]


def test_json_lines(tmp_path: Path) -> None:
    """`text` wins; a single field of text needs no name."""
    file = tmp_path / "a.jsonl.gz"
    lines = [{"text": "one", "title": "x"}, {"story": "two", "id": 3}]
    file.write_bytes(gzip.compress("\n\n".join(map(json.dumps, lines)).encode()))
    assert read_documents(file) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.txt.gz", gzip.compress(b"whole", mtime=0)[:-6], "not a whole gzip file"),
        ("a.txt.gz", b"plain", "not a whole gzip file"),
        ("a.jsonl", b'{"text": "x"}\n{', "line 2: not JSON"),
        ("a.jsonl", b'{"a": "x", "b": "y"}', r"line 1: needs a field 'text'.*\['a', 'b'\]"),
        ("a.jsonl", b"[1]", "line 1: needs a field 'text'"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_windows_follow_one_another_in_turn_from_every_document(tokenizer: Any) -> None:
    """Guards against overlaps, gaps, and windows of the first document alone."""
    documents = ["abcdefgh", "zyxwv", "12"]
    windows = cut_windows(documents, tokenizer, 3)
    assert [tokenizer.decode(one.ids) for one in windows] == ["abc", "zyx", "def"]
    assert [one.predicted_bytes for one in windows] == [2, 2, 2]
    assert [tokenizer.decode(one.ids) for one in cut_windows(documents, tokenizer, 3, limit=2)] == ["abc", "zyx"]


def test_short_texts_give_short_windows(tokenizer: Any) -> None:
    assert [tokenizer.decode(one.ids) for one in cut_windows(["abcd", "x", "yz"], tokenizer, 10)] == ["abcd", "yz"]
    with pytest.raises(ValueError, match="fewer than two tokens"):
        cut_windows(["a", "b"], tokenizer, 10)


@pytest.mark.parametrize(("length", "limit"), [(1, None), (10, 0)])
def test_senseless_sizes_are_refused(tokenizer: Any, length: int, limit: int | None) -> None:
    with pytest.raises(ValueError, match="at least"):
        cut_windows(["abcd"], tokenizer, length, limit)


def test_every_window_begins_with_the_begin_token(tokenizer: Any) -> None:
    """Guards against windows in the middle of a document that a model trained with a begin token has never seen."""
    backend = Tokenizer.from_str(tokenizer._tokenizer.to_str())
    backend.add_special_tokens(["<s>"])
    begin = backend.token_to_id("<s>")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    with_begin = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    assert prefix_ids(with_begin) == [begin]
    assert prefix_ids(tokenizer) == []
    windows = cut_windows(["abcdé"], with_begin, 3)
    assert [one.ids[0] for one in windows] == [begin, begin, begin]
    assert [with_begin.decode(one.ids[1:]) for one in windows] == ["ab", "cd", "é"]
    assert [one.predicted_bytes for one in windows] == [2, 2, 2]


def test_long_documents_are_read_piece_by_piece(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against characters lost or doubled where pieces meet."""
    monkeypatch.setattr(text, "_PIECE", 7)
    document = "the quick  brown\nfox jumpsoverthelazy dog"
    window = cut_windows([document], tokenizer, len(document))[0]
    assert tokenizer.decode(window.ids) == document
