"""Documents in files: what is found, what is refused, and when a file counts as changed."""

import gzip
import json
import os
from pathlib import Path

import pytest

from foveal.train.data.files import building, content_hash, documents, find_files


def read(path: Path, field: str = "text") -> list[str]:
    return list(documents(path, field, "<|endoftext|>"))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.md"])
def test_text_is_split_at_the_separator(tmp_path: Path, name: str) -> None:
    """Line ends around documents go, indentation stays, empty documents are none."""
    text = "  one\n\ntwo\r\n<|endoftext|>\n<|endoftext|>naïve 😀<|endoftext|>\n\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert read(path) == ["  one\n\ntwo", "naïve 😀"]


def test_documents_may_span_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A separator that lies across two blocks still separates."""
    monkeypatch.setattr("foveal.train.data.files._BLOCK", 7)
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>".join(["some words", "x" * 50, "é"]))
    assert read(path) == ["some words", "x" * 50, "é"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    """One document a line, from the field that is asked for."""
    lines = "\n".join(json.dumps({"text": "no", "body": text}) for text in ("one\ntwo", "", "three")) + "\n\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
    assert read(path, "body") == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": 1}', "line 2 has no text as 'text'"),
        ("a.jsonl", b'{"text": "x"}\n["x"]', "line 2 has no text"),
        ("a.jsonl", b'\n{"text": "x"', "line 2 is not JSON"),
        ("a.txt", b"caf\xe9", "utf-8"),
        ("a.txt.gz", b"plain", "gzip"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-10], "ended"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:10] + b"\0" * 20, "decompressing"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """A run over thousands of files must say which one is wrong, and where."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_progress_covers_the_bytes_on_disk(tmp_path: Path) -> None:
    """The bar ends at its end, compressed files included."""
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(os.urandom(5000).hex().encode()))
    steps: list[int] = []
    assert len(list(documents(path, "text", "<|endoftext|>", steps.append))) == 1
    assert sum(steps) == path.stat().st_size


def test_files_folders_and_patterns(tmp_path: Path) -> None:
    """Each file once; folders are searched whole, for known endings alone."""
    for name in ("b.txt", "a.jsonl.gz", "sub/c.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = lambda *patterns: [str(p.relative_to(tmp_path)) for p in find_files(tmp_path / x for x in patterns)]  # noqa: E731
    assert names(".") == ["a.jsonl.gz", "b.txt", "sub/c.txt"]
    assert names("notes.md", "b.txt", "*.txt") == ["notes.md", "b.txt"]
    assert names("**/*.txt") == ["b.txt", "sub/c.txt"]
    with pytest.raises(ValueError, match=r"no text in .*\*\.csv"):
        names("*.csv")


def test_a_hash_follows_contents(tmp_path: Path) -> None:
    """Same contents, same hash, wherever they lie and whenever they were written; anything else differs."""
    for folder, text in (("one", "abc"), ("two", "abc"), ("three", "abd")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text)
    hashes = [content_hash([tmp_path / folder / "a.txt"], tmp_path) for folder in ("one", "two", "three")]
    assert hashes[0] == hashes[1] != hashes[2]
    (tmp_path / "one" / "a.txt").write_text("abcd")
    assert content_hash([tmp_path / "one" / "a.txt"], tmp_path) != hashes[0]
    (tmp_path / "one" / "a.jsonl").write_text("abc")
    assert content_hash([tmp_path / "one" / "a.jsonl"], tmp_path) != hashes[0]


def test_unchanged_files_are_not_read_again(tmp_path: Path) -> None:
    """Starting a run must not read all text: size and time tell."""
    path = tmp_path / "a.txt"
    path.write_text("abc")
    before, stat = content_hash([path], tmp_path), path.stat()
    path.write_text("xyz")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content_hash([path], tmp_path) == before
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert content_hash([path], tmp_path) != before


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    """What fails half-way leaves nothing, and the next try builds."""
    target = tmp_path / "cache" / "built"
    with pytest.raises(KeyError), building(target) as folder:
        assert folder is not None
        (folder / "half").write_text("x")
        raise KeyError
    assert not target.exists()
    for expected in (True, False):
        with building(target) as folder:
            assert (folder is not None) == expected
    assert list(target.iterdir()) == []
