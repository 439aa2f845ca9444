"""What training data costs: the tokenizer, encoding, and reading rows; and how many documents packing has to cut,
beside cutting them wherever a row ends.

Sources: the 92 books of text/classics_simple.txt.gz, the same cut into paragraphs of at least 200 characters, and
retrieval documents hidden in the books. Seconds are wall clock.
"""

import argparse
import gzip
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from report import circumstances, print_table

from foveal.train.data import Corpus, DataSettings, RetrievalSettings, TextSettings, TokenizerSettings, open_tokenizer
from foveal.train.data.corpus import OpenSource
from foveal.train.data.packing import pack_epoch, shuffled

ROWS = 200


@dataclass(frozen=True)
class Figures:
    """One source."""

    source: str
    documents: int | None
    tokens: int | None
    bytes_per_token: float | None
    cut: float | None
    """Share of the documents shorter than the context that are not in one piece."""
    cut_anywhere: float | None
    """The same, where documents are put one after another and cut at every `context` tokens."""
    read: float
    """Tokens a second."""


@contextmanager
def stopwatch(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds what the block takes."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def cut_shares(lengths: NDArray[np.int64], context: int) -> tuple[float | None, float | None]:
    """By best fit, and by cutting anywhere."""
    short = np.flatnonzero(lengths < context)
    if not len(short):
        return None, None
    pieces = np.bincount(pack_epoch(lengths, context, 0).pieces[:, 1], minlength=len(lengths))
    order = shuffled(len(lengths), 0)
    ends = np.array([*accumulate(lengths[order])])
    crosses = np.empty(len(lengths), dtype=bool)
    crosses[order] = (ends - 1) // context != (ends - lengths[order]) // context
    return float((pieces[short] > 1).mean()), float(crosses[short].mean())


def measure(source: OpenSource, corpus: Corpus, context: int, size: Callable[[str], int]) -> Figures:
    """The figures of one source."""
    source.rows.row(0)
    start = time.perf_counter()
    for number in range(1, ROWS + 1):
        source.rows.row(number)
    read = ROWS * context / (time.perf_counter() - start)
    if source.name not in corpus.shards:
        return Figures(source.name, None, None, None, None, None, read)
    lengths = corpus.shards[source.name].lengths
    tokens = int(lengths.sum())
    return Figures(source.name, len(lengths), tokens, size(source.name) / tokens, *cut_shares(lengths, context), read)


def paragraphs(text: str) -> str:
    """One JSON object a paragraph."""
    found = (part.strip() for part in text.replace("<|endoftext|>", "\n\n").split("\n\n"))
    return "\n".join(json.dumps({"text": part}) for part in found if len(part) >= 200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=6144)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    books = Path(os.environ["FOVEAL_TEST_DATA"]) / "text" / "classics_simple.txt.gz"
    text = gzip.decompress(books.read_bytes()).decode()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "paragraphs.jsonl"
        lines.write_text(paragraphs(text))
        data = DataSettings(
            TokenizerSettings(vocab_size=arguments.vocab_size),
            (TextSettings((books,), name="books"), TextSettings((lines,), name="paragraphs")),
            (RetrievalSettings(name="retrieval", haystack="books"),),
            held_out=0,
        )
        trained_on = DataSettings(data.tokenizer, data.text[:1], held_out=0)
        with stopwatch(seconds, "training the tokenizer"):
            tokenizer = open_tokenizer(trained_on, Path(folder))
        with stopwatch(seconds, "encoding both"):
            corpus = Corpus.build(data, tokenizer, Path(folder))
        with stopwatch(seconds, "opening them again"):
            Corpus.build(data, tokenizer, Path(folder))
        sizes = {"books": len(text.encode()), "paragraphs": sum(map(len, map(str.encode, _texts(lines))))}
        sources = corpus.open("train", arguments.context, 0)
        figures = [measure(source, corpus, arguments.context, sizes.__getitem__) for source in sources]
    if arguments.json:
        print(json.dumps({**circumstances(), "seconds": seconds, "sources": [vars(row) for row in figures]}, indent=2))
        return
    print(", ".join(f"{name} {value}" for name, value in circumstances().items()))
    print(", ".join(f"{name}: {value:.2f} s" for name, value in seconds.items()))
    print(f"\nContext {arguments.context}, vocabulary {len(tokenizer)}\n")
    header = ["source", "documents", "tokens", "bytes a token", "cut", "cut anywhere", "tokens/s read"]
    print_table(header, [_cells(row) for row in figures])


def _texts(lines: Path) -> Iterator[str]:
    return (json.loads(line)["text"] for line in lines.read_text().splitlines())


def _cells(row: Figures) -> list[str]:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        row.source,
        shown(row.documents, ",d"),
        shown(row.tokens, ",d"),
        shown(row.bytes_per_token, ".2f"),
        shown(row.cut, ".1%"),
        shown(row.cut_anywhere, ".1%"),
        f"{row.read:.2e}",
    ]


if __name__ == "__main__":
    main()
