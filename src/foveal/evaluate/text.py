"""Texts to evaluate on: files as documents, documents as windows of tokens."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

SEPARATOR = "<|endoftext|>"
# Characters that are tokenized at a time: all of a long text would take long before the first window is known.
_PIECE = 1 << 18
# Tokens that a tokenizer may have put around or into a text without a byte of it.
_EXTRA = 16


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one document, behind what the tokenizer puts before every text."""

    ids: tuple[int, ...]
    predicted_bytes: int
    """UTF-8 bytes of the text that the model predicts: of all tokens but the first."""


def read_documents(path: Path) -> list[str]:
    """The documents of a text file (split at <|endoftext|>) or a .jsonl file (one a line); either may be gzipped.

    A JSON line holds its text in the field "text", or in its only field of text. Raises ValueError for a file that is
    damaged or holds no text, OSError for one that cannot be opened.
    """
    text = _read(path)
    if ".jsonl" in path.suffixes:
        documents = [_field(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        documents = text.split(SEPARATOR)
    kept = [stripped for document in documents if (stripped := document.strip())]
    if not kept:
        raise ValueError(f"{path} holds no text")
    return kept


def prefix_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: a begin token, or nothing."""
    ids = list(tokenizer.encode(""))
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def cut_windows(documents: Sequence[str], tokenizer: Any, length: int, limit: int | None = None) -> list[Window]:
    """Windows of `length` tokens, one after another without overlap, in turn from every document; at most `limit`.

    What does not fill a window is left out, unless no document fills one: then the windows are as long as they can be.
    Raises ValueError where nothing is left that could be predicted.
    """
    if length < 2:
        raise ValueError(f"a window needs at least 2 tokens, not {length}")
    if limit is not None and limit < 1:
        raise ValueError(f"the number of windows must be at least 1, not {limit}")
    for least in (length, 2):
        # A token has at least a byte: many short documents need not be tokenized to be left out.
        streams = [_windows(one, tokenizer, length, least) for one in documents if len(one.encode()) + _EXTRA >= least]
        windows = list(islice(_in_turn(streams), limit))
        if windows:
            return windows
    raise ValueError("the text has fewer than two tokens")


def _windows(document: str, tokenizer: Any, length: int, least: int) -> Iterator[Window]:
    prefix = prefix_ids(tokenizer)
    tokens = _tokens(document, tokenizer)
    while len(ids := [*prefix, *islice(tokens, length - len(prefix))]) >= least:
        predicted = tokenizer.decode(ids[1:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        yield Window(tuple(ids), len(predicted.encode()))


def _tokens(document: str, tokenizer: Any) -> Iterator[int]:
    start = 0
    while start < len(document):
        stop = min(start + _PIECE, len(document))
        if stop < len(document):  # a word is not torn apart; the space before it belongs to it
            space = max(document.rfind(" ", start + 1, stop), document.rfind("\n", start + 1, stop))
            stop = stop if space < 0 else space
        yield from tokenizer.encode(document[start:stop], add_special_tokens=False)
        start = stop


def _in_turn(streams: Sequence[Iterator[Window]]) -> Iterator[Window]:
    """The first window of every stream, the second of every stream, and so on."""
    live = list(streams)
    while live:
        remaining = []
        for stream in live:
            if (window := next(stream, None)) is not None:
                yield window
                remaining.append(stream)
        live = remaining


def _read(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def _field(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
    texts = (
        {name: value for name, value in record.items() if isinstance(value, str)} if isinstance(record, dict) else {}
    )
    if "text" in texts:
        return texts["text"]
    if len(texts) != 1:
        raise ValueError(f"{path}, line {number}: needs a field 'text', or a single field of text, not {sorted(texts)}")
    return next(iter(texts.values()))
