"""`foveal eval`: is the model still good, and does it look where it matters."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveal.cli import options

if TYPE_CHECKING:
    from foveal.config import ModelConfig
    from foveal.evaluate.selecting import Selection
    from foveal.evaluate.suite import Begin, Data, Difference, Job, Result

_SELECTION, _DATA, _OUTPUT = "Selection", "Data", "Output"
_LONGEST = 4096  # tokens, where no lengths are given


@dataclass(frozen=True)
class _Subject:
    """One model as it is loaded."""

    name: str
    path: Path
    config: "ModelConfig"
    loading: dict[str, Any]
    """Options of `load_model`."""


def evaluate(
    model: options.Model,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Any of ppl, recall, passkey, ruler (or its tasks), with commas between. "
            "Default: passkey; with --text ppl too, and recall where there are indexers.",
            show_default=False,
        ),
    ] = None,
    adapter: options.Adapter = None,
    streaming: options.Streaming = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another model, as it is, that differences are taken to.")
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            help="Which tokens MODEL attends to: indexer, dense, recency, random, oracle; several are compared "
            "with the first.",
            rich_help_panel=_SELECTION,
            show_default=False,
        ),
    ] = None,
    topk: Annotated[
        str | None,
        typer.Option(
            help="How many; several with commas. Default: the model's.", rich_help_panel=_SELECTION, show_default=False
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a prompt, with commas; the longest one for ppl and recall. Default: 4096, or what fits.",
            rich_help_panel=_DATA,
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A text or .jsonl file, maybe gzipped: for ppl and recall, and as haystack.", rich_help_panel=_DATA
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Most windows of text, and samples of each task, length and depth.",
            rich_help_panel=_DATA,
            show_default=False,
        ),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            help="Edges of the buckets of ppl, with commas. Default: powers of two.",
            rich_help_panel=_DATA,
            show_default=False,
        ),
    ] = None,
    forced: Annotated[
        bool,
        typer.Option(
            "--forced/--written",
            help="Check answers token by token instead of having them written.",
            rich_help_panel=_DATA,
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the samples.", rich_help_panel=_DATA)] = 0,
    as_json: options.Json = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the results: an .svg or .png file.", rich_help_panel=_OUTPUT)
    ] = None,
    dtype: options.Dtype = "auto",
    index_dtype: options.IndexDtype = "auto",
    kv_cache_dtype: options.KVCacheDtype = "auto",
    mla_form: options.MLAForm = "auto",
    quantization: options.Quantization = None,
) -> None:
    """Measure MODEL: perplexity by position, retrieval, and how much of attention its selections keep."""
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise ValueError(f"a plot is an .svg or .png file, not {plot}")
    from foveal.evaluate.suite import Job, compare, prepare
    from foveal.evaluate.text import read_documents
    from foveal.models.tokenizer import load_tokenizer

    loading = {
        "dtype": dtype,
        "index_dtype": index_dtype,
        "mla_form": mla_form,
        "quantization": quantization,
        "adapter": adapter,
        "streaming": streaming,
    }
    subject = _subject(model, loading)
    base = None if against is None else _subject(against, {})
    if base is not None and base.name == subject.name:
        base = replace(base, name=f"{base.name} as it is")
    job = Job(
        tasks=_tasks(tasks, subject.config, text is not None),
        lengths=_lengths(lengths, [one.config for one in (subject, base) if one]),
        documents=None if text is None else read_documents(text),
        limit=limit,
        edges=None if positions is None else _numbers("positions", positions),
        forced=forced,
        seed=seed,
    )
    selections = _selections(select, topk, subject.config)
    data = prepare(job, load_tokenizer(subject.path))
    if base is not None:
        _check_tokens(base, subject, job, data)
    with _progress() as begin:
        results = [] if base is None else _measure(base, [None], data, job, begin)
        results += _measure(subject, selections, data, replace(job, kv_cache_dtype=kv_cache_dtype), begin)
    differences = [compare(result, results[0], job.edges) for result in results[1:]]
    if plot is not None:
        _draw(results, plot)
    if as_json:
        print(json.dumps(_as_json(model, job, results, differences), ensure_ascii=False))
    else:
        from foveal.cli.eval_rows import sections
        from foveal.cli.plan_table import print_sections

        print_sections(sections(results, differences))


def _subject(name: str, loading: dict[str, Any]) -> _Subject:
    from foveal.models.load import open_checkpoint
    from foveal.models.resolve import resolve_model

    path = resolve_model(name)
    config = open_checkpoint(path, loading.get("adapter"), loading.get("streaming")).config
    return _Subject(Path(name).name, path, config, loading)


def _tasks(asked: str | None, config: "ModelConfig", has_text: bool) -> tuple[str, ...]:
    """Those asked for, or those that there is everything for."""
    from foveal.evaluate.suite import task_names

    if asked is None:
        of_text = ["ppl", "recall"] if config.index_topk is not None else ["ppl"]
        return (*(of_text if has_text else ()), "passkey")
    tasks = task_names(asked)
    if "recall" in tasks and config.index_topk is None:
        raise ValueError(f"recall is of indexers, and {config.family} without an adapter has none")
    return tasks


def _lengths(asked: str | None, configs: Sequence["ModelConfig"]) -> tuple[int, ...]:
    most = min(config.max_positions for config in configs)
    if asked is None:
        return (min(_LONGEST, most),)
    lengths = _numbers("lengths", asked)
    if max(lengths) > most:
        raise ValueError(f"{max(lengths)} tokens are more than the model's {most} positions")
    return lengths


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} must be whole numbers with commas between, not {text!r}") from None


def _selections(select: str | None, topk: str | None, config: "ModelConfig") -> list["Selection | None"]:
    """What MODEL is measured under, one after another; None: as it is."""
    from foveal.evaluate.selecting import Selection

    if select is None and topk is None:
        return [None]
    kinds = ["indexer"] if select is None else [kind.strip() for kind in select.split(",")]
    counts: Sequence[int | None] = [None] if topk is None else _numbers("topk", topk)
    found = [Selection(kind, None if kind == "dense" else count) for count in counts for kind in kinds]
    if topk is not None and all(kind == "dense" for kind in kinds):
        raise ValueError(f"dense attention has no top-k, so {topk} means nothing")
    for one in found:
        if config.index_topk is None and one.kind != "dense":
            if one.kind == "indexer":
                raise ValueError(f"there is no indexer to select with: {config.family} without an adapter has none")
            if one.topk is None:
                raise ValueError(f"selection {one.kind!r} needs --topk, as the model has no indexer that has one")
    return list(dict.fromkeys(found))


def _check_tokens(base: _Subject, subject: _Subject, job: "Job", data: "Data") -> None:
    """Refuse perplexities of different tokens."""
    from foveal.evaluate.suite import prepare
    from foveal.models.tokenizer import load_tokenizer

    if "ppl" in job.tasks and prepare(replace(job, tasks=("ppl",)), load_tokenizer(base.path)).windows != data.windows:
        raise ValueError(
            f"{base.name} cuts the text into other tokens than {subject.name}: their perplexities cannot be compared"
        )


def _measure(
    subject: _Subject, selections: Sequence["Selection | None"], data: "Data", job: "Job", begin: "Begin"
) -> list["Result"]:
    from foveal.evaluate.suite import run
    from foveal.models.load import load_model
    from foveal.models.tokenizer import load_tokenizer

    decoder = load_model(subject.path, **subject.loading)
    decoder.pack()
    tokenizer = load_tokenizer(subject.path)
    results = []
    for selection in selections:
        name = subject.name if selection is None else selection.name
        results.append(run(name, decoder, tokenizer, data, job, selection, begin))
    return results


@contextmanager
def _progress() -> Iterator["Begin"]:
    """A bar for each task, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
    terminal = sys.stderr.isatty()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not terminal) as progress:

        def begin(what: str, tokens: int) -> Callable[[int], None]:
            task = progress.add_task(what, total=tokens)
            return lambda done: progress.advance(task, done)

        yield begin


def _draw(results: Sequence["Result"], file: Path) -> None:
    from foveal.cli.eval_panels import panels

    if file.suffix == ".png":
        from foveal.cli.eval_png import write_png

        write_png(panels(results), file)
    else:
        from foveal.cli.eval_svg import svg

        file.write_text(svg(panels(results)), encoding="utf-8")


def _as_json(
    model: str, job: "Job", results: Sequence["Result"], differences: Sequence["Difference"]
) -> dict[str, Any]:
    return {
        "model": model,
        "tasks": list(job.tasks),
        "lengths": list(job.lengths),
        "seed": job.seed,
        "forced": job.forced,
        "results": [result.as_dict() for result in results],
        "differences": [difference.as_dict() for difference in differences],
    }
