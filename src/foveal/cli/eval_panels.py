"""What the plots of an evaluation show, as numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

from foveal.evaluate.suite import Result


@dataclass(frozen=True)
class Line:
    """One line."""

    name: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """One plot."""

    title: str
    across: str
    """What the horizontal axis counts."""
    lines: list[Line]
    logarithmic: bool
    """The horizontal axis."""
    share: bool
    """The vertical axis goes from 0 to 1."""

    def ticks(self) -> list[float]:
        """Where the horizontal axis is labelled: where there are values, at ten of them at most."""
        xs = sorted({x for line in self.lines for x in line.xs})
        return xs[:: -(-len(xs) // 10)]


def panels(results: Sequence[Result]) -> list[Panel]:
    """A plot for each kind of measurement that there is."""
    found = [_perplexity(results), _scores(results), *(_recall(result) for result in results)]
    return [panel for panel in found if panel is not None and panel.lines]


def _perplexity(results: Sequence[Result]) -> Panel:
    lines = []
    for result in results:
        if result.perplexity:
            buckets = result.perplexity.buckets
            middles = tuple((bucket.start * bucket.stop) ** 0.5 for bucket in buckets)
            lines.append(Line(result.name, middles, tuple(bucket.perplexity for bucket in buckets)))
    return Panel("Perplexity by position", "tokens of context", lines, logarithmic=True, share=False)


def _scores(results: Sequence[Result]) -> Panel:
    """Each task's mean over its depths, by length."""
    lines = []
    for result in results:
        for task, answers in result.answers.items():
            lengths = sorted({answer.sample.length for answer in answers})
            scores = [[one.score for one in answers if one.sample.length == length] for length in lengths]
            means = tuple(sum(one) / len(one) for one in scores)
            name = task if len(results) == 1 else f"{result.name}: {task}"
            lines.append(Line(name, tuple(map(float, lengths)), means))
    return Panel("Score of answers", "tokens of prompt and answer", lines, logarithmic=True, share=True)


def _recall(result: Result) -> Panel | None:
    if result.recall is None:
        return None
    layers = tuple(float(quality.layer) for quality in result.recall)
    names = {"recall": "the indexer's", "recency": "recency", "random": "random", "oracle": "the best"}
    lines = [
        Line(shown, layers, tuple(getattr(quality, name).mean for quality in result.recall))
        for name, shown in names.items()
    ]
    title = f"Attention kept by a selection ({result.name})"
    return Panel(title, "indexer, first layer first", lines, logarithmic=False, share=True)
