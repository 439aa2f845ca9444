"""Documents in files: finding them, reading them one by one, knowing when they changed."""

import fcntl
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from foveal.models.save import replacing

_BLOCK = 1 << 24
"""Characters read at once: documents longer than this are put together from several blocks."""
_ENDINGS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")

Advance = Callable[[int], None]
"""Told how many bytes of a file on disk were read since the last call."""


def find_files(patterns: Iterable[Path]) -> list[Path]:
    """All files that files, folders and glob patterns name, each once, in the order of the patterns and by name.

    Raises ValueError for one that names nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        if pattern.is_dir():
            files = [path for path in sorted(pattern.rglob("*")) if path.name.endswith(_ENDINGS) and path.is_file()]
        elif pattern.is_file():
            files = [pattern]
        else:
            files = [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True)) if Path(name).is_file()]
        if not files:
            raise ValueError(
                f"no text in {pattern} (looked for a file, a folder with {', '.join(_ENDINGS)}, a pattern)"
            )
        found.update(dict.fromkeys(path.resolve() for path in files))
    return list(found)


def documents(path: Path, field: str, separator: str, advance: Advance = lambda count: None) -> Iterator[str]:
    """The documents of one file, without empty ones and without newlines at their ends.

    Raises ValueError, naming file and line, for what is not UTF-8, not gzip or not JSON with a string as `field`.
    """
    with path.open("rb") as raw:
        binary = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        text = io.TextIOWrapper(binary, encoding="utf-8")
        done = 0
        try:
            for document in _json_lines(text, field) if _has_lines(path) else _separated(text, separator):
                advance(raw.tell() - done)
                done = raw.tell()
                if document := document.strip("\r\n"):
                    yield document
        except (ValueError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path}: {error}") from None
        advance(raw.tell() - done)


def _has_lines(path: Path) -> bool:
    """Whether each line is a JSON object."""
    return path.name.removesuffix(".gz").endswith(".jsonl")


def _separated(file: io.TextIOBase, separator: str) -> Iterator[str]:
    rest = ""
    while block := file.read(_BLOCK):
        *whole, rest = (rest + block).split(separator)
        yield from whole
    yield rest


def _json_lines(file: io.TextIOBase, field: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON ({error})") from None
        if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
            raise ValueError(f"line {number} has no text as {field!r}")
        yield entry[field]


def content_hash(paths: Iterable[Path], cache: Path) -> str:
    """A hash of what the files hold, in order, and of how they are read.

    `cache`/files.json remembers each file's, by size and time.
    """
    memory = cache / "files.json"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or not ours: it only saves time
        known = {}
    digests, fresh = [], {}
    for path in paths:
        stat = path.stat()
        entry = known.get(str(path))
        if not entry or entry[:2] != [stat.st_size, stat.st_mtime_ns]:
            with path.open("rb") as file:
                entry = [stat.st_size, stat.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()]
            fresh[str(path)] = entry
        digests.append((entry[2], _has_lines(path)))
    if fresh:
        _write_atomically(memory, json.dumps(known | fresh, indent=1))
    return short_hash(*digests)


def short_hash(*parts: object) -> str:
    """16 hexadecimal digits that stand for the parts' JSON."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _write_atomically(path: Path, text: str) -> None:
    """Write a small file so that nobody ever reads half of it, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        mine.write_text(text, encoding="utf-8")
        mine.replace(path)
    finally:
        mine.unlink(missing_ok=True)


@contextmanager
def building(target: Path) -> Iterator[Path | None]:
    """A folder to fill, which becomes `target` when all went well; None where `target` is already there.

    One process builds; others wait for it. What was killed leaves nothing that could be taken for whole.
    OSError, with the file's or the target's name, where it cannot be written.
    """
    if target.is_dir():
        yield None
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the process ends, however it ends
        if target.is_dir():
            yield None
            return
        try:
            with replacing(target) as folder:
                yield folder
        except OSError as error:
            if error.filename is None:  # a full disk does not say which
                raise OSError(error.errno, error.strerror, str(target)) from None
            raise
