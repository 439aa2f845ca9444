"""Made-up documents: exact lengths, and answers that the document does tell."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from foveal.evaluate.tasks import RULER
from foveal.train.data.haystacks import Sentences
from foveal.train.data.retrieval import RetrievalRows
from foveal.train.data.rows import Row
from foveal.train.data.settings import RetrievalSettings, Task
from foveal.train.data.tokenizer import Encoder

CONTEXT = 1500


def rows(
    tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], seed: int = 0, context: int = CONTEXT, **options: float
) -> RetrievalRows:
    settings = RetrievalSettings(tasks=tuple(tasks), **options)  # type: ignore[arg-type]
    encoder = Encoder(tokenizer)
    return RetrievalRows(settings, encoder, Sentences(encoder), context, (seed,))


@pytest.mark.parametrize("task", ["passkey", "multikey", "recall", "copy"])
def test_answers_can_be_known(tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    """What is marked as an answer stands earlier in its own document; every document ends, and has an answer."""
    source = rows(tokenizer, [task], answer_weight=2.0, min_length=400)
    for number in range(12):
        row = source.row(number)
        assert row.loss_weights is not None and sum(map(len, row.sequences)) == CONTEXT
        for ids, weights in zip(row.sequences, row.loss_weights, strict=True):
            assert len(ids) >= 400 and ids[-1] == tokenizer.eos_token_id and (ids[:-1] != ids[-1]).all()
            spans = answer_spans(weights > 1)
            assert spans
            for start, stop in spans:
                answer, before = tokenizer.decode(ids[start:stop]), tokenizer.decode(ids[:start])
                assert answer.strip() and answer.strip() in before


@pytest.mark.parametrize("task", RULER)
def test_rulers_questions_become_documents(tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    """The whole of the answer is marked, nothing else, and it stands at the end; what is left of a row is filled."""
    source = rows(tokenizer, [task], answer_weight=2.0, min_length=3500, context=4000)
    for number in range(3):
        row = source.row(number)
        assert row.loss_weights is not None and sum(map(len, row.sequences)) == 4000
        ids, weights = row.sequences[0], row.loss_weights[0]
        ((start, stop),) = answer_spans(weights > 1)
        answer, before = tokenizer.decode(ids[start:stop]), tokenizer.decode(ids[:start])
        assert stop == len(ids) - 1 and ids[-1] == tokenizer.eos_token_id
        assert BEFORE[task] in before[-60:]
        # Each word or number of the answer stands in the document.
        assert all(word in before for word in answer.replace(",", " ").rstrip(".").split() if not word.endswith("."))
        assert all((rest == 1).all() for rest in row.loss_weights[1:])


BEFORE = {
    "niah_single_1": "mentioned in the provided text is",
    "niah_multikey_2": "mentioned in the provided text is",
    "niah_multikey_3": "mentioned in the provided text is",
    "vt": "they are:",
    "cwe": "most often in the list are:",
    "fwe": "three most frequently appeared words are:",
}


def test_associations_fill_a_row_with_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    """No special tokens, no text; few pairs and many; only the values of keys that were told are learnt."""
    source = rows(tokenizer, ["mqar"], min_length=256, context=256, other_weight=0.0)
    numbers = set()
    for number in range(40):
        row = source.row(number)
        ids, (weights, *rest) = row.sequences[0].tolist(), row.loss_weights or ()
        assert sum(map(len, row.sequences)) == 256 and not any(part.any() for part in rest)
        ((first, _), *_) = spans = answer_spans(weights > 0)
        told = dict(zip(ids[: first - 1 : 2], ids[1 : first - 1 : 2], strict=True))
        numbers.add(len(told))
        assert all(stop - start == 1 and told[ids[start - 1]] == ids[start] for start, stop in spans)
        assert len(spans) == 127 - len(told) and not set(ids[:-2]) & set(tokenizer.all_special_ids)
    assert min(numbers) < 4 and max(numbers) > 40


def test_few_keys_come_more_often(tokenizer: PreTrainedTokenizerBase) -> None:
    """`mqar_keys` keys, as many other tokens as values; the first of both are in most rows, the last in some."""
    source = rows(tokenizer, ["mqar"], min_length=64, context=64, other_weight=0.0, mqar_keys=12)
    plain = Encoder(tokenizer).plain
    told = Counter[int]()
    for number in range(200):
        row = source.row(number)
        ids, weights = row.sequences[0].tolist(), (row.loss_weights or ())[0]
        ((first, _), *_) = answer_spans(weights > 0)
        assert 1 <= first // 2 <= 12
        told.update(ids[: first - 1])
    assert set(told) == set(plain[:24])
    for some in (plain[:12], plain[12:24]):
        assert told[some[0]] > 2 * told[some[-1]] > 20


def test_a_begin_token_comes_first(tokenizer: PreTrainedTokenizerBase) -> None:
    """Where the tokenizer puts one before prompts, made-up documents begin like all others."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>"))
    row = RetrievalRows(RetrievalSettings(), encoder, Sentences(encoder), CONTEXT, (0,)).row(0)
    assert encoder.documents(["text"])[0][0] == 1
    assert all(ids[0] == 1 and 1 not in ids[1:] for ids in row.sequences)


def answer_spans(marked: np.ndarray) -> list[tuple[int, int]]:
    """Runs of marked tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], marked.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def test_the_passkey_is_asked_for_at_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """The answer is the number of the needle, and the needle lies anywhere."""
    depths = []
    source = rows(tokenizer, ["passkey"], min_length=700)
    for number in range(30):
        for ids in source.row(number).sequences:
            text = tokenizer.decode(ids)
            needle = re.search(r"The pass key is (\d{5,7})\.|for \w+[ -]\w+ is: (\d{5,7})\.", text)
            assert needle and text.endswith(f" is {needle[1] or needle[2]}.<|endoftext|>")
            depths.append(needle.start() / len(text))
    assert min(depths) < 0.35 and max(depths) > 0.65


def test_rows_depend_on_seed_and_number_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    """Any row can be had again by another process; others differ."""
    every: tuple[Task, ...] = ("passkey", "multikey", "recall", "copy")
    one, other = rows(tokenizer, every), rows(tokenizer, every)
    for number in range(3):
        one.row(number)
    assert tokens(one.row(7)) == tokens(other.row(7))
    assert tokens(one.row(7)) != tokens(one.row(8)) != tokens(rows(tokenizer, every, seed=1).row(8))


def test_without_weights_there_are_none(tokenizer: PreTrainedTokenizerBase) -> None:
    """Equal weights need no tensors."""
    assert rows(tokenizer, ["copy"]).row(0).loss_weights is None


def test_a_context_that_is_too_short_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    """Instead of documents without their question."""
    with pytest.raises(ValueError, match="min_length = 2000"):
        rows(tokenizer, ["copy"], min_length=2000)


def tokens(row: Row) -> list[list[int]]:
    return [ids.tolist() for ids in row.sequences]
