"""The feed: the same stream for any number of ranks, and after any interruption."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from foveal.nn.batch import Batch
from foveal.train.data import (
    Corpus,
    DataSettings,
    Feed,
    RetrievalSettings,
    TextSettings,
    TokenizerSettings,
    TrainingBatch,
)
from foveal.train.data.tokenizer import train_tokenizer

CONTEXT = 192
Write = Callable[[str, list[str]], Path]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Two text sources and a made-up one; a pass over the first ends within a few steps."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = [f"Document {i}: " + "the quick fox " * (3 * i) for i in range(12)]
    (folder / "a.txt").write_text("<|endoftext|>".join(documents))
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": f"line {i} " * 9}) for i in range(40)))
    data = DataSettings(
        text=(TextSettings((folder / "a.txt",), name="a", weight=2.0), TextSettings((folder / "b.jsonl",), name="b")),
        retrieval=(RetrievalSettings(weight=0.5, haystack="a", min_length=128, answer_weight=3.0),),
        held_out=0.1,
    )
    return Corpus.build(data, tokenizer, folder / "cache")


def feed(corpus: Corpus, rows: int = 4, **options: Any) -> Feed:
    return Feed(corpus, context=CONTEXT, tokens_per_step=rows * CONTEXT, **options)


def same(left: Iterable[TrainingBatch], right: Iterable[TrainingBatch]) -> bool:
    """Whether the rows of two lists of batches are equal, one after another."""
    left_rows, right_rows = ([row for batch in batches for row in batch.rows] for batches in (left, right))
    return len(left_rows) == len(right_rows) and all(
        equal(TrainingBatch((a,)).sequences, TrainingBatch((b,)).sequences)
        and equal(TrainingBatch((a,)).loss_weights or [], TrainingBatch((b,)).loss_weights or [])
        for a, b in zip(left_rows, right_rows, strict=True)
    )


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stop=st.integers(0, 12), seed=st.integers(0, 3), before=st.sampled_from([1, 2, 4]), after=st.sampled_from([1, 2])
)
def test_a_resumed_stream_is_the_uninterrupted_one(
    corpus: Corpus, stop: int, seed: int, before: int, after: int
) -> None:
    """Stopped after any step, in any pass, saved as JSON, taken up by other processes and another number of them."""
    whole = feed(corpus, seed=seed)
    for _ in range(stop):
        next(whole)
    interrupted = feed(corpus, seed=seed, rank=before - 1, ranks=before)
    for _ in range(stop):
        next(interrupted)
    state = json.loads(json.dumps(interrupted.state_dict()))
    resumed = [feed(corpus, seed=seed, rank=rank, ranks=after) for rank in range(after)]
    for one in resumed:
        one.load_state_dict(state)
    for _ in range(3):
        assert same([next(whole)], [next(one) for one in resumed])


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_are_one_process(corpus: Corpus, ranks: int) -> None:
    """Guards against data that depends on how many processes train."""
    alone = feed(corpus)
    parts = [feed(corpus, rank=rank, ranks=ranks) for rank in range(ranks)]
    for _ in range(6):
        assert same([next(alone)], [next(part) for part in parts])


def test_shares_are_those_of_the_weights(corpus: Corpus) -> None:
    """Every row has the same length, so that shares of rows are shares of tokens."""
    stream = feed(corpus, rows=7)
    for _ in range(10):
        batch = next(stream)
        assert all(sum(map(len, row.sequences)) == CONTEXT for row in batch.rows)
    assert stream.rows_given == {"a": 40, "b": 20, "retrieval0": 10}


def test_single_sources_can_be_fed(corpus: Corpus) -> None:
    """Evaluation looks at one source at a time; its rows are the ones that it has in a mixture."""
    alone = feed(corpus, rows=1, sources=["b"])
    mixed = [row for row in next(feed(corpus, rows=7)).rows if row.loss_weights is None]
    firsts = [next(alone), next(alone)]
    assert alone.rows_given == {"b": 2}
    assert all(any(same([first], [TrainingBatch((row,))]) for row in mixed) for first in firsts)
    with pytest.raises(ValueError, match="source c has no held-out documents"):
        feed(corpus, sources=["c"], part="held_out")


def test_sequences_are_what_the_model_takes(corpus: Corpus) -> None:
    """int64 ids that `Batch.packed` takes as they are, with weights of the same lengths."""
    batch = next(feed(corpus, rows=7))
    packed = Batch.packed(batch.sequences)
    assert packed.ids_T.dtype == torch.int64 and len(packed.ids_T) == 7 * CONTEXT
    weights = batch.loss_weights
    assert weights is not None and [len(w) for w in weights] == [len(s) for s in batch.sequences]
    assert set(torch.cat(weights).unique().tolist()) == {1.0, 3.0}
    assert [len(part.rows) for part in batch.split(3)] == [3, 3, 1]


def test_held_out_documents_are_never_trained_on(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> None:
    """Each document belongs to one part, and a feed gives that part alone."""
    for name in ("a", "b"):
        train, held_out = (set(corpus.documents(name, part).tolist()) for part in ("train", "held_out"))
        assert held_out and not train & held_out and len(train | held_out) == len(corpus.shards[name].lengths)
    shard = corpus.shards["a"]
    (document,) = corpus.documents("a", "held_out").tolist()
    title = tokenizer.decode(shard.read(document, 0, int(shard.lengths[document]))).partition(":")[0] + ":"
    for part, expected in (("train", False), ("held_out", True)):
        stream = feed(corpus, rows=7, part=part)
        texts = [tokenizer.decode(ids) for _ in range(8) for ids in next(stream).sequences]
        assert any(title in text for text in texts) == expected


def test_another_corpus_is_refused(corpus: Corpus) -> None:
    """Resuming on other data would silently train on some of it twice."""
    state = feed(corpus).state_dict()
    with pytest.raises(ValueError, match="seed"):
        feed(corpus, seed=1).load_state_dict(state)
    heavier = replace(corpus.settings, text=(replace(corpus.settings.text[0], weight=9.0), corpus.settings.text[1]))
    with pytest.raises(ValueError, match=r"sources.*9\.0"):
        feed(replace(corpus, settings=heavier)).load_state_dict(state)


def test_steps_must_divide(corpus: Corpus) -> None:
    """Rows are whole and ranks get equal numbers of them."""
    for options in ({"tokens_per_step": CONTEXT + 1}, {"tokens_per_step": 3 * CONTEXT, "ranks": 2}):
        with pytest.raises(ValueError, match="tokens_per_step"):
            Feed(corpus, context=CONTEXT, **options)  # type: ignore[arg-type]


def test_the_stream_is_pinned(tmp_path: Path) -> None:
    """A run that is resumed under another version of foveal, numpy or Python must see the same rows, or be refused.

    Where this fails on purpose, VERSION in `retrieval.py` and _VERSION in `shards.py` have to go up.
    """
    bytes_alone = train_tokenizer([""], TokenizerSettings(vocab_size=259))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="<|endoftext|>")
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(f"document {i} " * i for i in range(1, 40)))
    data = DataSettings(
        text=(TextSettings((tmp_path / "a.txt",), name="a"),),
        retrieval=(RetrievalSettings(haystack="a", answer_weight=2.0), RetrievalSettings(weight=0.5)),
    )
    stream = Feed(Corpus.build(data, tokenizer, tmp_path / "cache"), context=2048, tokens_per_step=5 * 2048, seed=7)
    digest = hashlib.sha256()
    for _ in range(4):
        batch = next(stream)
        for ids, weights in zip(batch.sequences, batch.loss_weights or [], strict=True):
            digest.update(ids.numpy().astype("<i8").tobytes() + weights.numpy().astype("<f4").tobytes())
    assert digest.hexdigest()[:16] == "dc29c0b922d2281d"
