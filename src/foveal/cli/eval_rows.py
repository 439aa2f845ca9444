"""An evaluation as tables of text."""

from collections.abc import Callable, Sequence

from foveal.cli.plan_rows import Section, byte_size, whole
from foveal.evaluate.answers import Cell
from foveal.evaluate.estimate import Estimate
from foveal.evaluate.perplexity import Bucket, Perplexity
from foveal.evaluate.recall import MEASURES, over_layers
from foveal.evaluate.suite import Difference, Result

_NONE = "–"
_HEADS = {
    "recall": "kept",
    "recency": "recency keeps",
    "random": "random keeps",
    "oracle": "best keeps",
    "divergence": "KL, nats",
    "query_overlap": "like the query before",
    "layer_overlap": "like the indexer before",
}


def sections(results: Sequence[Result], differences: Sequence[Difference]) -> list[Section]:
    """All that was measured, and what it cost. The differences are those of all results but the first to it."""
    beside = [None, *differences]
    found = []
    if any(result.perplexity for result in results):
        found.append(_perplexity(results, beside))
    if any(result.answers for result in results):
        found.append(_scores(results, beside))
    found += [_recall(result) for result in results if result.recall]
    return [*found, _costs(results)]


def _perplexity(results: Sequence[Result], beside: Sequence[Difference | None]) -> Section:
    """A column for each result, and for each but the first by how much its perplexity is higher."""
    columns: list[tuple[str, Perplexity, Callable[[Bucket], str]]] = []
    for result, less in zip(results, beside, strict=True):
        assert result.perplexity
        columns.append((result.name, result.perplexity, _ppl_cell))
        if less and less.perplexity:
            columns.append((f"less {less.base}", less.perplexity, _gap_cell))
    rows = [
        (
            f"{bucket.start} to {bucket.stop - 1}",
            whole(bucket.nats.count),
            *(tell(one.buckets[place]) for _, one, tell in columns),
        )
        for place, bucket in enumerate(columns[0][1].buckets)
    ]
    rows.append(("all", whole(columns[0][1].whole.nats.count), *(tell(one.whole) for _, one, tell in columns)))
    bits = [_NONE if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}" for result in results]
    title = f"Perplexity after so many tokens (bits a byte: {', '.join(bits)})"
    return Section(title, ("tokens before", "predicted", *(name for name, _, _ in columns)), tuple(rows))


def _ppl_cell(bucket: Bucket) -> str:
    return _with_error(bucket.perplexity, bucket.perplexity_error, 2)


def _gap_cell(bucket: Bucket) -> str:
    """In percent: the bucket is of a difference, so its perplexity is a ratio."""
    error = bucket.perplexity_error
    return f"{_with_error(100 * (bucket.perplexity - 1), None if error is None else 100 * error, 2, '+')} %"


def _scores(results: Sequence[Result], beside: Sequence[Difference | None]) -> Section:
    columns: list[tuple[str, list[Cell], str]] = []
    for result, less in zip(results, beside, strict=True):
        columns.append((result.name, result.cells(), ""))
        if less:
            columns.append((f"less {less.base}", less.cells, "+"))
    rows = []
    for place, cell in enumerate(columns[0][1]):
        depth = _NONE if cell.depth is None else f"{cell.depth:.2f}"
        shown = [_estimate(cells[place].score, 2, sign) for _, cells, sign in columns]
        rows.append((cell.task, whole(cell.length), depth, str(cell.score.count), *shown))
    heads = ("task", "tokens", "depth", "samples", *(name for name, _, _ in columns))
    return Section("Share of answers that are right", heads, tuple(rows))


def _recall(result: Result) -> Section:
    rows = [
        (str(quality.layer), *(_estimate(getattr(quality, name), 3) for name in MEASURES))
        for quality in result.recall or ()
    ]
    means = over_layers(result.recall or ())
    rows.append(("mean", *(f"{means[name]:.3f}" if name in means else _NONE for name in MEASURES)))
    title = f"Attention on the selected tokens, by indexer ({result.name})"
    return Section(title, ("indexer", *(_HEADS[name] for name in MEASURES)), tuple(rows))


def _costs(results: Sequence[Result]) -> Section:
    rows = [
        (
            result.name,
            cost.task,
            f"{cost.seconds:.1f} s",
            whole(cost.tokens),
            f"{cost.tokens / cost.seconds:.0f}",
            byte_size(cost.peak_bytes),
        )
        for result in results
        for cost in result.costs
    ]
    return Section("What it cost", ("", "task", "time", "tokens", "tokens a second", "most memory"), tuple(rows))


def _estimate(estimate: Estimate | None, digits: int, sign: str = "") -> str:
    return _NONE if estimate is None else _with_error(estimate.mean, estimate.error, digits, sign)


def _with_error(value: float, error: float | None, digits: int, sign: str = "") -> str:
    """12.34 ± 0.05."""
    shown = f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no negative zero
    return shown if error is None else f"{shown} ± {error:.{digits}f}"
