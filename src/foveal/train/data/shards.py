"""Encoded text on disk: a source's documents as one memory-mapped array of ids, with offsets and hashes beside it."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foveal.models.save import write_json
from foveal.train.data.files import building, content_hash, documents, find_files, short_hash
from foveal.train.data.settings import TextSettings
from foveal.train.data.tokenizer import Encoder

_VERSION = 1
"""Counts changes of what is written: shards of other versions are not used."""
_BATCH = 1 << 22
"""Characters encoded at once."""


@dataclass(frozen=True)
class Shard:
    """The documents of one source."""

    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    """All documents one after another, mapped from disk."""
    offsets: NDArray[np.int64]
    """One more than there are documents: document d is tokens[offsets[d] : offsets[d + 1]]."""
    hashes: NDArray[np.uint64]
    """Of each document's text."""
    key: str
    """Stands for the files' contents and the tokenizer."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, the end token included."""
        return np.diff(self.offsets)

    def held_out(self, share: float) -> NDArray[np.bool_]:
        """Which documents are kept from training: those with the lowest hashes, so that neither the order of files nor
        other documents matter and equal texts stay together. At least one, where share > 0 and there are two texts."""
        if share == 0 or len(np.unique(self.hashes)) < 2:
            return np.zeros(len(self.hashes), dtype=np.bool_)
        count = max(1, round(share * len(self.hashes)))
        limit: np.uint64 = np.sort(self.hashes)[count - 1]
        chosen: NDArray[np.bool_] = self.hashes <= min(limit, np.unique(self.hashes)[-2])
        return chosen

    def read(self, document: int, start: int, length: int) -> NDArray[np.int64]:
        """Ids of a part of one document."""
        first = int(self.offsets[document]) + start
        return self.tokens[first : first + length].astype(np.int64)


def open_shard(source: TextSettings, encoder: Encoder, cache: Path, name: str) -> Shard:
    """The source's documents, encoded now unless `cache` has them for these files and this tokenizer.

    The folder's name stands for everything that the ids depend on: after a change another one is built.
    Raises ValueError for what the files lack, OSError where the disk is full.
    """
    files = find_files(source.files)
    key = short_hash(_VERSION, source.field, source.separator, content_hash(files, cache), encoder.hash)
    folder = cache / f"text-{key}"
    with building(folder) as fresh:
        if fresh is not None:
            _build(fresh, source, files, encoder, name)
    offsets = np.load(folder / "offsets.npy")
    if len(offsets) < 2:
        raise ValueError(f"source {name}: no documents in {', '.join(map(str, files[:3]))}")
    tokens = np.memmap(folder / "tokens.bin", dtype=_dtype(encoder), mode="r")
    return Shard(tokens, offsets, np.load(folder / "hashes.npy"), key)


def _build(folder: Path, source: TextSettings, files: Sequence[Path], encoder: Encoder, name: str) -> None:
    lengths: list[int] = []
    hashes: list[int] = []
    shown, advance = _progress(f"encoding {name}", sum(path.stat().st_size for path in files))
    texts = (text for path in files for text in documents(path, source.field, source.separator, advance))
    with shown, (folder / "tokens.bin").open("wb") as file:
        for batch in _batches(texts):
            encoded = encoder.documents(batch)
            lengths += [len(ids) for ids in encoded]
            hashes += [_hash(text) for text in batch]
            for ids in encoded:
                file.write(np.array(ids, dtype=_dtype(encoder)).tobytes())
    np.save(folder / "offsets.npy", np.array([0, *accumulate(lengths)], dtype=np.int64))
    np.save(folder / "hashes.npy", np.array(hashes, dtype=np.uint64))
    manifest = {
        "files": [str(path) for path in files],
        "documents": len(lengths),
        "tokens": sum(lengths),
        "dtype": np.dtype(_dtype(encoder)).name,
        "tokenizer": encoder.hash,
    }
    write_json(folder / "manifest.json", manifest)


def _dtype(encoder: Encoder) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if encoder.size <= 1 << 16 else np.uint32


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _progress(title: str, total: int) -> tuple[AbstractContextManager[object], Callable[[int], None]]:
    """A bar over the bytes on disk, where somebody may see it."""
    if not sys.stderr.isatty():
        return nullcontext(), lambda count: None
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=total)
    return bar, lambda count: bar.advance(task, count)
