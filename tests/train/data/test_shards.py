"""Encoded text on disk: built once, rebuilt when something changed, safe with several processes."""

import gzip
import json
import multiprocessing
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from foveal.train.data import Corpus, DataSettings, Feed, TextSettings, TokenizerSettings, open_tokenizer
from foveal.train.data.shards import Shard, open_shard
from foveal.train.data.tokenizer import Encoder

DOCUMENTS = ["The quick brown fox", "1 2 3\n\nlines", "naïve 😀", "The quick brown fox"]


@pytest.fixture
def source(tmp_path: Path) -> TextSettings:
    """Four documents in a text file."""
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(DOCUMENTS))
    return TextSettings((tmp_path / "a.txt",))


def built(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("text-*"))


def test_documents_come_back(tmp_path: Path, source: TextSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every document, whole or in part, with its end; two bytes a token; the manifest says what it is."""
    encoder = Encoder(tokenizer)
    shard = open_shard(source, encoder, tmp_path / "cache", "a")
    assert shard.tokens.dtype == np.uint16 and isinstance(shard.tokens, np.memmap)
    for number, text in enumerate(DOCUMENTS):
        ids = shard.read(number, 0, int(shard.lengths[number]))
        assert ids.dtype == np.int64 and tokenizer.decode(ids) == f"{text}<|endoftext|>"
        assert shard.read(number, 1, 2).tolist() == ids[1:3].tolist()
    (folder,) = (tmp_path / "cache").glob("text-*")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["documents"] == 4 and manifest["tokens"] == len(shard.tokens)
    assert manifest["files"] == [str(source.files[0])] and manifest["tokenizer"] == encoder.hash


def test_large_vocabularies_take_four_bytes(
    tmp_path: Path, source: TextSettings, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Ids beyond 65535 must not wrap around."""
    encoder = Encoder(tokenizer)
    encoder.size = 70_000
    encoder.documents = lambda texts: [[69_999, encoder.end] for _ in texts]  # type: ignore[method-assign]
    shard = open_shard(source, encoder, tmp_path / "cache", "a")
    assert shard.tokens.dtype == np.uint32 and shard.read(3, 0, 2).tolist() == [69_999, encoder.end]


def test_stale_shards_are_noticed(
    tmp_path: Path, source: TextSettings, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unchanged: not encoded again. Another text or another tokenizer: encoded again."""
    encoder, cache = Encoder(tokenizer), tmp_path / "cache"
    first = open_shard(source, encoder, cache, "a")
    monkeypatch.setattr(encoder, "documents", lambda texts: pytest.fail("encoded again"))
    assert open_shard(source, encoder, cache, "a").key == first.key
    monkeypatch.undo()
    source.files[0].write_text("another text")
    second = open_shard(source, encoder, cache, "a")
    assert len(second.lengths) == 1 and second.key != first.key
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    changed = json.loads((tmp_path / "tokenizer.json").read_text())
    changed["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    other = type(tokenizer.backend_tokenizer).from_str(json.dumps(changed))
    third = open_shard(source, Encoder(type(tokenizer)(tokenizer_object=other, eos_token="<|endoftext|>")), cache, "a")
    assert third.key != second.key and len(built(cache)) == 3


def test_no_documents_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Nothing to train on is a mistake, not an endless wait."""
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n")
    with pytest.raises(ValueError, match=r"source a: no documents in .*a\.txt"):
        open_shard(TextSettings((tmp_path / "a.txt",)), Encoder(tokenizer), tmp_path / "cache", "a")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_leaves_nothing_half_done(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The error says so, and once there is room the build succeeds."""
    (tmp_path / "a.txt").write_text("the quick brown fox " * 40_000)
    source, cache = TextSettings((tmp_path / "a.txt",)), tmp_path / "cache"
    with largest_file(100_000), pytest.raises(OSError, match="too large") as caught:
        open_shard(source, Encoder(tokenizer), cache, "a")
    assert str(caught.value.filename).startswith(str(cache))
    assert not built(cache)
    assert len(open_shard(source, Encoder(tokenizer), cache, "a").tokens) > 100_000


def _build(folder: Path, source: TextSettings, start: object, results: object) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
    start.wait()  # type: ignore[attr-defined]
    results.put(len(open_shard(source, Encoder(tokenizer), folder / "cache", "a").tokens))  # type: ignore[attr-defined]


def test_processes_build_together(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """All ranks of a run open the corpus at once: one builds, all read the same."""
    (tmp_path / "a.txt").write_text("the quick brown fox " * 20_000)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(3), context.Queue()
    source = TextSettings((tmp_path / "a.txt",))
    processes = [context.Process(target=_build, args=(tmp_path, source, start, results)) for _ in range(3)]
    for process in processes:
        process.start()
    sizes = {results.get(timeout=300) for _ in processes}
    for process in processes:
        process.join()
    assert len(sizes) == 1 and len(built(tmp_path / "cache")) == 1


def test_equal_documents_are_held_out_together(
    tmp_path: Path, source: TextSettings, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A copy among the training documents would make the evaluation worthless."""
    shard = open_shard(source, Encoder(tokenizer), tmp_path / "cache", "a")
    for share in (0.01, 0.3, 0.5, 0.99):
        chosen = shard.held_out(share)
        assert chosen[0] == chosen[3] and 0 < chosen.sum() < 4
    assert not shard.held_out(0).any()


def test_the_split_does_not_depend_on_the_other_documents() -> None:
    """More text must not move documents from one part to the other, but for the few at the border."""
    hashes = np.random.default_rng(0).integers(0, 1 << 63, 2000).astype(np.uint64)
    few, many = (Shard(np.empty(0, np.uint16), np.arange(n + 1), hashes[:n], "") for n in (1000, 2000))
    assert few.held_out(0.1).sum() == 100
    assert (few.held_out(0.1) != many.held_out(0.1)[:1000]).sum() < 20


def test_a_real_book(test_data: Path, tmp_path: Path) -> None:
    """A long novel: the tokenizer takes a quarter of what bytes would, and rows are full of it."""
    path = test_data / "text" / "novel_0.txt.gz"
    data = DataSettings(TokenizerSettings(sample_megabytes=1), (TextSettings((path,)),), held_out=0)
    tokenizer = open_tokenizer(data, tmp_path)
    corpus = Corpus.build(data, tokenizer, tmp_path)
    (tokens,) = corpus.tokens.values()
    assert len(tokenizer) == 6144 and len(gzip.decompress(path.read_bytes())) / tokens > 3.5
    batch = next(Feed(corpus, context=8192, tokens_per_step=32768))
    assert [len(sequence) for sequence in batch.sequences] == [8192] * 4
