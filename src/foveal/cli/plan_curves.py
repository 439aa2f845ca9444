"""What the plots of a plan show, as numbers: cost and cache against context, and each part's share."""

from collections.abc import Sequence
from dataclasses import dataclass

from foveal.cli.plan_rows import PART_NAMES, whole
from foveal.costs.macs import MACS_PARTS, Form, decode_macs, forms, running_macs
from foveal.costs.plan import Plan

_SHORTEST, _LONGEST = 1 << 10, 1 << 20  # tokens


@dataclass(frozen=True)
class Curve:
    """One line: a value at each context length."""

    name: str
    contexts: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Bar:
    """How a whole is shared, in the order of `MACS_PARTS`; parts that take nothing are left out."""

    name: str
    shares: dict[str, float]


def decode_curves(plans: Sequence[Plan]) -> list[Curve]:
    """Multiply-accumulates of a decoded token against context: what runs. For a single sparse model, beside it what it
    would cost without selection."""
    lengths = _contexts(plans)
    curves = []
    for plan in plans:
        values = tuple(float(sum(running_macs(plan.config, 1, n).values())) for n in lengths)
        curves.append(Curve(plan.name, lengths, values))
    if len(plans) == 1 and plans[0].arithmetic.formula.topk:
        config = plans[0].config
        form: Form = "absorbed" if "absorbed" in forms(config) else "dense"
        dense = tuple(float(sum(decode_macs(config, n, form).values())) for n in lengths)
        curves.append(Curve("the same without selection", lengths, dense))
    return curves


def cache_curves(plans: Sequence[Plan]) -> list[Curve]:
    """Bytes that one sequence's cache holds against context."""
    lengths = _contexts(plans)
    return [
        Curve(plan.name, lengths, tuple(float(plan.memory.cache.sequence_bytes(n)) for n in lengths)) for plan in plans
    ]


def share_bars(plans: Sequence[Plan]) -> list[Bar]:
    """Each part's share of a decoded token's multiply-accumulates: of several models at the context that was asked for,
    of a model alone at a few contexts."""
    if len(plans) > 1:
        return [_bar(plan.name, plan, plan.request.context) for plan in plans]
    return [_bar(f"{short(n)} tokens", plans[0], n) for n in _contexts(plans)[::2]]


def bar_parts(bars: Sequence[Bar]) -> list[str]:
    """The parts that some bar has, in one order for all."""
    return [PART_NAMES[part] for part in MACS_PARTS if any(PART_NAMES[part] in bar.shares for bar in bars)]


def short(tokens: float) -> str:
    """32K: tokens in powers of two where they are, otherwise in full."""
    for letter, size in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens / size:.0f}{letter}"
    return whole(tokens)


def brief(name: str, most: int) -> str:
    """A name of at most so many characters: what is left out is in the middle, since names differ at their ends."""
    if len(name) <= most:
        return name
    tail = (most - 1) * 2 // 3
    return f"{name[: most - 1 - tail]}…{name[-tail:]}"


def bytes_tick(count: float) -> str:
    """A power of ten in decimal units: the axis counts in tens."""
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def _contexts(plans: Sequence[Plan]) -> tuple[int, ...]:
    """Powers of two, from a page of text to a million tokens, or to the context that was asked for."""
    last, length = max(_LONGEST, plans[0].request.context), _SHORTEST
    lengths = []
    while length < 2 * last:
        lengths.append(length)
        length *= 2
    return tuple(lengths)


def _bar(name: str, plan: Plan, context: int) -> Bar:
    macs = running_macs(plan.config, 1, context)
    total = sum(macs.values())
    return Bar(name, {PART_NAMES[part]: macs[part] / total for part in MACS_PARTS if part in macs})
