"""Everything that `foveal eval` measures, for one model under one selection after another, on the same data."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from foveal.engine import LLM
from foveal.evaluate.answers import DEPTHS, Answer, Cell, cells, force_answers, generate_answers, make_samples
from foveal.evaluate.cost import Cost, measured
from foveal.evaluate.perplexity import Advance, Perplexity, by_position, checked_edges, difference, window_losses
from foveal.evaluate.recall import LayerQuality, over_layers, selection_quality
from foveal.evaluate.selecting import Selection, selecting
from foveal.evaluate.tasks import NOISE, RULER, TASKS, Haystack, Sample, Setting
from foveal.evaluate.text import Window, cut_windows
from foveal.models.decoder import Decoder

MEASURED = ("ppl", "recall", *TASKS)
"""All tasks; "ruler" stands for six of them."""

# Windows or samples (of each task, length and depth), where the caller does not say how many.
_WINDOWS, _RECALL_WINDOWS, _SAMPLES, _SAMPLES_AT_DEPTH = 8, 2, 10, 2

# Characters of a text that hide needles: more would only take longer to cut into sentences.
_HAYSTACK = 1 << 22

Begin = Callable[[str, int], Advance]
"""Told that a task of so many tokens begins; what it returns is told how far it is."""


@dataclass(frozen=True)
class Job:
    """What to measure. Raises ValueError for tasks, lengths and numbers that make no sense."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    """Tokens: of prompts; the longest one is that of the windows of `ppl` and `recall`."""
    documents: Sequence[str] | None = None
    """The text of `ppl` and `recall`, and the haystack; None: RULER's noise is the haystack."""
    limit: int | None = None
    """Most windows, and samples of each task, length and depth."""
    edges: tuple[int, ...] | None = None
    """Of the buckets of position."""
    forced: bool = False
    """Answers are not written, but checked token by token."""
    seed: int = 0
    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in MEASURED]
        if unknown or not self.tasks:
            raise ValueError(
                f"a task is one of ruler, {', '.join(MEASURED)}, not {unknown[0] if unknown else 'none'!r}"
            )
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"lengths must be at least 2 tokens, not {list(self.lengths)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, not {self.limit}")
        if self.documents is None and {"ppl", "recall"} & set(self.tasks):
            raise ValueError("ppl and recall are measured on a text, and none is given")
        if self.edges is not None:
            checked_edges(self.edges)


def task_names(text: str) -> tuple[str, ...]:
    """The tasks that a list like "ppl,ruler" names, each once."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return tuple(dict.fromkeys(task for name in names for task in (RULER if name == "ruler" else (name,))))


@dataclass(frozen=True)
class Data:
    """What is measured on, the same for every model."""

    windows: Sequence[Window] = ()
    recall_windows: Sequence[Window] = ()
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    """By task."""


def prepare(job: Job, tokenizer: Any) -> Data:
    """Windows and samples, as long in tokens of this tokenizer as the job says. Raises ValueError where a task does not
    fit in a length."""
    longest, documents = max(job.lengths), job.documents or ()
    windows: dict[str, list[Window]] = {}
    for task, most in (("ppl", _WINDOWS), ("recall", _RECALL_WINDOWS)):
        if task in job.tasks:
            windows[task] = cut_windows(documents, tokenizer, longest, job.limit or most)
    haystack = Haystack.of_text("\n".join(documents)[:_HAYSTACK]) if documents else NOISE
    samples = {name: _samples(job, name, haystack, tokenizer) for name in job.tasks if name in TASKS}
    return Data(windows.get("ppl", ()), windows.get("recall", ()), samples)


def _samples(job: Job, name: str, haystack: Haystack, tokenizer: Any) -> list[Sample]:
    grid = name == "passkey"
    depths = DEPTHS if grid else (None,)
    settings = [Setting(length, depth, haystack) for length in job.lengths for depth in depths]
    each = job.limit or (_SAMPLES_AT_DEPTH if grid else _SAMPLES)
    return make_samples(TASKS[name], settings, tokenizer, each=each, seed=job.seed)


@dataclass(frozen=True)
class Result:
    """One model under one selection."""

    name: str
    selection: Selection | None
    """None: as the model is."""
    losses: list[Tensor] | None
    """See `window_losses`."""
    perplexity: Perplexity | None
    predicted_bytes: int
    answers: dict[str, list[Answer]]
    """By task, in the order of the samples."""
    recall: list[LayerQuality] | None
    costs: list[Cost]

    @property
    def bits_per_byte(self) -> float | None:
        """Of the text that was predicted: comparable between tokenizers."""
        if self.perplexity is None or not self.predicted_bytes:
            return None
        nats = self.perplexity.whole.nats
        return float(self.perplexity.whole.as_dict()["bits"] or 0.0) * nats.count / self.predicted_bytes

    def cells(self) -> list[Cell]:
        """Mean scores by task, length and depth."""
        return [cell for answers in self.answers.values() for cell in cells(answers)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what was measured, and each answer."""
        record: dict[str, Any] = {"name": self.name}
        if self.selection:
            record |= {"selection": self.selection.kind, "topk": self.selection.topk}
        if self.perplexity:
            record["ppl"] = {**_ppl(self.perplexity), "bits_per_byte": self.bits_per_byte}
        if self.answers:
            record["scores"] = [cell.as_dict() for cell in self.cells()]
            record["answers"] = [_answer(answer) for answers in self.answers.values() for answer in answers]
        if self.recall is not None:
            record["recall"] = [quality.as_dict() for quality in self.recall]
            record["mean_recall"] = over_layers(self.recall)
        return record | {"costs": [cost.as_dict() for cost in self.costs]}


def _ppl(perplexity: Perplexity) -> dict[str, Any]:
    return {"all": perplexity.whole.as_dict(), "positions": [bucket.as_dict() for bucket in perplexity.buckets]}


def _answer(answer: Answer) -> dict[str, Any]:
    sample = answer.sample
    return {
        "task": sample.task,
        "length": sample.length,
        "depth": sample.depth,
        "expected": sample.answer,
        "written": answer.text,
        "score": answer.score,
    }


def run(
    name: str,
    decoder: Decoder,
    tokenizer: Any,
    data: Data,
    job: Job,
    selection: Selection | None = None,
    begin: Begin | None = None,
) -> Result:
    """Measure everything once. Raises ValueError where the model has too few positions, or cannot select so."""
    costs: list[Cost] = []

    def timed(task: str, size: int, work: Callable[[Advance], Any], tokens: Callable[[Any], int]) -> Any:
        advance = begin(f"{name}: {task}", size) if begin else _ignore
        result, seconds, peak = measured(decoder.embed_tokens.weight.device, lambda: work(advance))
        costs.append(Cost(task, seconds, tokens(result), peak))
        return result

    cache: dict[str, Any] = {"kv_cache_dtype": job.kv_cache_dtype}
    losses, quality, answers = None, None, {}
    with selecting(decoder, selection) if selection else nullcontext():
        if data.windows:
            size = sum(len(window.ids) for window in data.windows)
            losses = timed("ppl", size, lambda go: window_losses(decoder, data.windows, go, **cache), lambda _: size)
        for task, samples in data.samples.items():
            size = sum(sample.length for sample in samples)
            answers[task] = timed(task, size, partial(_answers, decoder, tokenizer, samples, job), _tokens)
    if data.recall_windows and _has_recall(decoder, selection):
        size = sum(len(window.ids) for window in data.recall_windows)
        quality = timed("recall", size, lambda go: _recall(decoder, data, selection, go, cache), lambda _: size)
    return Result(
        name=name,
        selection=selection,
        losses=losses,
        perplexity=None if losses is None else by_position(losses, job.edges),
        predicted_bytes=sum(window.predicted_bytes for window in data.windows),
        answers=answers,
        recall=quality,
        costs=costs,
    )


def _answers(decoder: Decoder, tokenizer: Any, samples: list[Sample], job: Job, advance: Advance) -> list[Answer]:
    if job.forced:
        return force_answers(decoder, tokenizer, samples, advance, kv_cache_dtype=job.kv_cache_dtype)
    longest = max(sample.length for sample in samples)
    options: dict[str, Any] = {"kv_cache_dtype": job.kv_cache_dtype, "enable_prefix_caching": False}
    llm = LLM(decoder, tokenizer=tokenizer, max_num_seqs=4, max_model_len=longest, **options)
    return generate_answers(llm, samples, advance)


def _tokens(answers: list[Answer]) -> int:
    return sum(answer.tokens for answer in answers)


def _has_recall(decoder: Decoder, selection: Selection | None) -> bool:
    """Selections that are not the indexer's own are the columns beside it."""
    return decoder.config.index_topk is not None and (selection is None or selection.kind in ("indexer", "dense"))


def _recall(
    decoder: Decoder, data: Data, selection: Selection | None, advance: Advance, cache: dict[str, Any]
) -> list[LayerQuality]:
    dense = selection is not None and selection.kind == "dense"  # keeps the indexers, which are what is measured
    with selecting(decoder, selection) if selection and not dense else nullcontext():
        return selection_quality(decoder, data.recall_windows, advance, dense=dense, **cache)


def _ignore(tokens: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Difference:
    """One result less another, measurement by measurement: errors are those of the pairs."""

    name: str
    base: str
    perplexity: Perplexity | None
    """See `perplexity.difference`: "perplexity" is a ratio."""
    cells: list[Cell]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        record: dict[str, Any] = {"name": self.name, "less": self.base}
        if self.perplexity:
            record["ppl"] = _ppl(self.perplexity)
        return record | {"scores": [cell.as_dict() for cell in self.cells]}


def compare(result: Result, base: Result, edges: Sequence[int] | None = None) -> Difference:
    """Both on the same data; `edges` as in `Job`."""
    perplexity = None
    if result.losses is not None and base.losses is not None:
        perplexity = difference(result.losses, base.losses, edges)
    pairs = [
        Answer(mine.sample, "", 0, mine.score - other.score)
        for task, answers in result.answers.items()
        for mine, other in zip(answers, base.answers[task], strict=True)
    ]
    return Difference(result.name, base.name, perplexity, cells(pairs))
