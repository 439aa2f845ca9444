"""Answers to tasks: written by the model, or only checked token by token."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foveal.engine import LLM, SamplingParams
from foveal.evaluate.estimate import Estimate, of_values
from foveal.evaluate.perplexity import TILE_LOGITS, Advance
from foveal.evaluate.prefill import Prefill
from foveal.evaluate.tasks import Sample, Setting, Task
from foveal.kernels.transfer import upload
from foveal.models.decoder import Decoder

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Answer:
    """What came of a sample."""

    sample: Sample
    text: str
    """What the model wrote; "" where it was not asked to."""
    tokens: int
    """Of prompt and answer."""
    score: float
    """0 to 1: the share of references in the text; teacher-forced: whether every token of the answer was foreseen."""


@dataclass(frozen=True)
class Cell:
    """The answers to one task at one length, and one depth where the task has them."""

    task: str
    length: int
    depth: float | None
    score: Estimate

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"task": self.task, "length": self.length, "depth": self.depth, **self.score.as_dict()}


def make_samples(
    task: Task, settings: Iterable[Setting], tokenizer: Any, *, each: int = 1, seed: int = 0
) -> list[Sample]:
    """`each` samples of a task for every setting, lengths in tokens of this tokenizer. Raises as `Task.sample`."""

    def count(text: str) -> int:
        return len(tokenizer.encode(text))

    return [task.sample(setting, count, seed=seed, index=index) for setting in settings for index in range(each)]


def generate_answers(
    llm: LLM, samples: Sequence[Sample], advance: Advance | None = None, *, at_once: int = 4
) -> list[Answer]:
    """Let the model write, greedily, at most as many tokens as each sample has for its answer; `at_once` together.

    Raises ValueError for a sample that is longer than the engine has room for.
    """
    answers = []
    for start in range(0, len(samples), at_once):
        group = samples[start : start + at_once]
        params = [SamplingParams(temperature=0.0, max_tokens=sample.max_tokens) for sample in group]
        for sample, output in zip(group, llm.generate([sample.prompt for sample in group], params), strict=True):
            if output.error is not None:
                raise ValueError(f"{sample.task} at {sample.length} tokens: {output.error}")
            written = output.outputs[0]
            tokens = len(output.prompt_token_ids) + len(written.token_ids)
            answers.append(Answer(sample, written.text, tokens, sample.score(written.text)))
            if advance:
                advance(sample.length)
    return answers


@torch.no_grad()
def force_answers(
    decoder: Decoder,
    tokenizer: Any,
    samples: Sequence[Sample],
    advance: Advance | None = None,
    *,
    kv_cache_dtype: str = "auto",
    dense: bool = False,
) -> list[Answer]:
    """Give the model each answer and see whether every token of it was the likeliest one: one prefill a sample. The
    keyword options are `Prefill`'s."""
    split = [split_answer(tokenizer, sample) for sample in samples]
    length = max(len(ids) for ids, _ in split)
    prefill = Prefill(decoder, length, kv_cache_dtype=kv_cache_dtype, dense=dense)
    answers = []
    for sample, (ids, start) in zip(samples, split, strict=True):
        answers.append(Answer(sample, "", len(ids), float(_foreseen(prefill, ids, start))))
        if advance:
            advance(sample.length)
    return answers


def split_answer(tokenizer: Any, sample: Sample) -> tuple[list[int], int]:
    """The token ids of prompt and answer (as far as it is needed), and where the answer begins: the first token that
    the prompt alone would not have had."""
    prompt, whole = list(tokenizer.encode(sample.prompt)), list(tokenizer.encode(sample.prompt + sample.needed))
    pairs = zip(prompt, whole, strict=False)
    start = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(prompt), len(whole)))
    assert 0 < start < len(whole), (sample.task, start)
    return whole, start


def cells(answers: Iterable[Answer]) -> list[Cell]:
    """Mean scores by task, length and depth, in the order in which these first come."""
    grouped: dict[tuple[str, int, float | None], list[float]] = {}
    for answer in answers:
        sample = answer.sample
        grouped.setdefault((sample.task, sample.length, sample.depth), []).append(answer.score)
    return [Cell(*key, of_values(scores)) for key, scores in grouped.items()]


def _foreseen(prefill: Prefill, ids: Sequence[int], start: int) -> bool:
    """Whether every token from `start` on is the likeliest after those before it, of equal ones that with the lowest
    id."""
    rows = max(1, TILE_LOGITS // prefill.decoder.config.vocab_size)
    for positions, x_LD in prefill.run(ids[:-1], start - 1):
        wanted_L = upload(ids[positions.start + 1 : positions.stop + 1], x_LD.device)
        for x_tD, wanted_t in zip(x_LD.split(rows), wanted_L.split(rows), strict=True):
            if (prefill.decoder.head(x_tD).argmax(-1) != wanted_t).any():
                return False
    return True
