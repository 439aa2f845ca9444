"""A plan in words: sections of rows, a column a plan, for the terminal and for the page alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foveal.costs.cache_bytes import CachePart
from foveal.costs.macs import MACS_PARTS
from foveal.costs.parameters import total_parameters
from foveal.costs.plan import PUBLISHED_CONTEXTS, Plan
from foveal.costs.weights import PARTS, Part

if TYPE_CHECKING:
    from foveal.costs.spectrum import LayerSpectrum

PART_NAMES = {
    "embedding": "embedding",
    "feed_forward": "feed-forward, experts",
    "attention": "attention",
    "indexer": "indexer",
    "recurrence": "recurrent layers",
    "norms": "norms",
    "lm_head": "LM head",
    "all_to_all": "exchange of experts",
}
_CACHE_NAMES: dict[CachePart, str] = {
    "keys_values": "keys and values",
    "latents": "latents",
    "index_keys": "index keys",
}
_NONE = "–"
_PREFIXES = {"Y": 1e24, "Z": 1e21, "E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}


@dataclass(frozen=True)
class Section:
    """A table: a title, column heads (the first for the labels), and rows of cells."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sections(plans: Sequence[Plan], spectra: Sequence["LayerSpectrum"] | None) -> list[Section]:
    """All that there is to say: what can stand side by side, and for a plan alone its details."""
    found = [_memory(plans), _arithmetic(plans), _speed(plans)]
    if len(plans) == 1:
        plan = plans[0]
        found += [_formula(plan)]
        found += [_forms(plan)] if len(plan.arithmetic.decode) > 1 else []
        found += [_ratios(plan)] if plan.arithmetic.formula.topk else []
        found += [_latents(plan)] if plan.latents else []
        found += [_times(plan)]
    if spectra:
        found.append(_ranks(spectra))
    return found


def byte_size(count: float) -> str:
    """1.95 GiB."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def amount(count: float) -> str:
    """54.9 G: three digits and a decimal prefix."""
    for prefix, size in _PREFIXES.items():
        if count >= size:
            return f"{count / size:.3g} {prefix}" if count < 999.5 * size else f"{count / size:.0f} {prefix}"
    return f"{count:.3g}"


def seconds(time: float) -> str:
    """12.3 ms."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)):
        if time >= size:
            return f"{time / size:.3g} {unit}" if time < 999.5 * size else f"{time / size:.0f} {unit}"
    return f"{time:.3g} s"


def share(part: float) -> str:
    """12.3 %."""
    return f"{100 * part:.1f} %"


def whole(count: float | None) -> str:
    """Digits in groups of three, which no line break parts; a dash for none."""
    return _NONE if count is None else f"{count:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _table(title: str, plans: Sequence[Plan], rows: Sequence[tuple[str, Callable[[Plan], str]]]) -> Section:
    """A column a plan; rows that say nothing for any of them are left out."""
    cells = [(label, *(tell(plan) for plan in plans)) for label, tell in rows]
    shown = tuple(row for row in cells if any(cell != _NONE for cell in row[1:]))
    return Section(title, ("", *(plan.name for plan in plans)), shown)


def _memory(plans: Sequence[Plan]) -> Section:
    context = whole(plans[0].request.context)
    rows: list[tuple[str, Callable[[Plan], str]]] = [
        ("parameters", lambda plan: amount(total_parameters(plan.config).total)),
        *((f"· {PART_NAMES[part]}", _parameters_of(part)) for part in PARTS),
        ("parameters that a token uses", lambda plan: amount(total_parameters(plan.config).active)),
        ("weights", lambda plan: f"{byte_size(plan.memory.weight_bytes)} ({plan.memory.weight_dtype})"),
        *((f"· in {dtype}", _weights_in(dtype)) for dtype in plans[0].memory.weight_bytes_by_dtype),
        ("cache a token", lambda plan: f"{whole(plan.memory.cache.bytes_per_token)} B"),
        *((f"· {name}", _cache_of(part)) for part, name in _CACHE_NAMES.items()),
        ("numbers a token and attention layer", lambda plan: whole(plan.memory.attention_elements or None)),
        ("recurrent state a sequence", lambda plan: _or_none(plan.memory.cache.state_bytes, byte_size)),
        ("· snapshots of it for prefixes", lambda plan: _or_none(plan.memory.cache.snapshot_bytes, byte_size)),
        (f"cache of {context} tokens", lambda plan: byte_size(plan.memory.cache.sequence_bytes(plan.request.context))),
        ("· of which still read", _still_read),
        ("expected waste in the last page", _waste),
    ]
    return _table("Memory", plans, rows)


def _arithmetic(plans: Sequence[Plan]) -> Section:
    context = whole(plans[0].request.context)
    rows: list[tuple[str, Callable[[Plan], str]]] = [
        (f"decoding a token that sees {context}", lambda plan: amount(sum(plan.arithmetic.decode_running.values()))),
        ("· form that runs", lambda plan: _form(plan, plan.arithmetic.decode_form)),
        *((f"· {PART_NAMES[part]}", _decode_of(part)) for part in MACS_PARTS),
        (f"prefill of {context} tokens", lambda plan: amount(sum(plan.arithmetic.prefill_running.values()))),
        ("· form that runs", lambda plan: _form(plan, plan.arithmetic.prefill_form)),
        ("· share of attention and indexer", _attention_share),
        ("sparse over dense, decoding", lambda plan: _ratio(plan, plan.request.context)),
        ("· at the limit of long contexts", _limit),
        ("sparse decoding pays from", _decode_crossover),
        ("sparse prefill pays from", _prefill_crossover),
    ]
    return _table("Arithmetic (multiply-accumulates; two operations each)", plans, rows)


def _speed(plans: Sequence[Plan]) -> Section:
    device = plans[0].request.device
    rows: list[tuple[str, Callable[[Plan], str]]] = [
        ("devices", lambda plan: str(plan.speed.devices)),
        ("· memory of each", lambda plan: f"{amount(device.memory_bytes)}B"),
        ("· bandwidth", lambda plan: f"{amount(device.bandwidth_bytes_per_second)}B/s"),
        ("· operations a second", _rate),
        ("largest batch that fits", lambda plan: str(plan.speed.largest_batch) if plan.speed.largest_batch else "none"),
        ("batch", lambda plan: str(plan.speed.decode.batch) + ("" if plan.speed.fits else " (does not fit)")),
        ("a decoding step", lambda plan: seconds(plan.speed.decode.seconds)),
        ("tokens a second, decoding", lambda plan: whole(plan.speed.decode_tokens_per_second)),
        ("prefill", lambda plan: seconds(plan.speed.prefill.seconds)),
        ("tokens a second, prefill", lambda plan: whole(plan.speed.prefill_tokens_per_second)),
        ("price of a million tokens, decoding", lambda plan: _price(plan.speed.decode_price_per_million)),
        ("price of a million tokens, prefill", lambda plan: _price(plan.speed.prefill_price_per_million)),
        ("exchange of experts, a token and layer", lambda plan: _or_none(plan.speed.all_to_all_bytes, byte_size)),
    ]
    return _table(f"Time and money at best on {device.name}", plans, rows)


def _formula(plan: Plan) -> Section:
    formula = plan.arithmetic.formula
    rows = [
        ("feed-forward, experts", formula.feed_forward),
        ("LM head", formula.lm_head),
        ("recurrent layers", formula.recurrence),
        ("attention, fixed", formula.attention_fixed),
        ("attention, a context token", formula.attention_per_context_token),
        *((f"attention, a token of a window of {w}", macs) for w, macs in formula.attention_per_window_token.items()),
        ("dense, fixed" if formula.topk else "fixed in all", formula.dense_fixed),
    ]
    if formula.topk:
        rows += [
            (f"attention to top-{formula.topk}", formula.attention_selected),
            ("indexer, fixed", formula.indexer_fixed),
            ("indexer, a context token", formula.indexer_per_context_token),
            ("sparse, fixed", formula.sparse_fixed),
            ("sparse, a context token", formula.sparse_per_context_token),
        ]
    return Section(
        "Multiply-accumulates of a decoded token", ("", "MACs"), tuple((name, whole(n)) for name, n in rows if n)
    )


def _forms(plan: Plan) -> Section:
    arithmetic = plan.arithmetic
    rows = tuple(
        (form, whole(sum(arithmetic.decode[form].values())), whole(sum(arithmetic.prefill[form].values())))
        for form in arithmetic.decode
    )
    context = whole(plan.request.context)
    heads = ("form", f"decoding a token that sees {context}", f"prefill of {context}")
    return Section("Multiply-accumulates by form of attention (dense forms without the indexer)", heads, rows)


def _ratios(plan: Plan) -> Section:
    formula = plan.arithmetic.formula
    contexts = sorted({*PUBLISHED_CONTEXTS, plan.request.context})
    rows = tuple(
        (whole(context), f"{formula.ratio_published(context):.4f}", f"{formula.ratio_actual(context):.4f}")
        for context in contexts
    )
    heads = ("context", "as published (k tokens)", "actual (min(n, k) tokens)")
    return Section("Sparse over dense, decoding", heads, (*rows, ("limit", *([f"{formula.limit_ratio:.4f}"] * 2))))


def _latents(plan: Plan) -> Section:
    assert plan.latents is not None
    forms = plan.latents
    rows = [
        ("expanding the whole context", amount(forms.expansion_macs)),
        ("one token, expanded", amount(forms.expanded_macs)),
        ("one token, absorbed", amount(forms.absorbed_macs)),
        ("absorbing is cheaper up to", f"{whole(forms.most_absorbed_queries)} new tokens"),
    ]
    for name, pair in forms.merging.items():
        verdict = "pays" if pair["merging_pays"] else "does not pay"
        rows.append((f"merging the weights of the {name}", verdict))
        rows += [(f"· {how}", amount(pair[f"{how}_numbers"])) for how in ("separate", "merged")]
    title = f"Absorption, one layer after {whole(plan.request.context)} tokens (multiply-accumulates)"
    return Section(title, ("", plan.name), tuple(rows))


def _times(plan: Plan) -> Section:
    rows = []
    for step, what in ((plan.speed.decode, "decoding"), (plan.speed.prefill, "prefill")):
        for name, part in step.parts.items():
            amounts = (byte_size(part.bytes_moved), amount(part.macs), seconds(part.seconds), part.bound)
            rows.append((f"{what}: {PART_NAMES[name]}", *amounts))
    return Section("Time by part", ("", "bytes", "MACs", "time", "waits for"), tuple(rows))


def _ranks(spectra: Sequence["LayerSpectrum"]) -> Section:
    from foveal.costs.spectrum import SHARES

    heads = ("layer", "numbers a token", *(f"rank for {100 * part:g} %" for part in SHARES))
    rows = tuple(
        (
            str(spectrum.layer),
            whole(spectrum.numbers),
            *(f"{spectrum.rank(part)} (saves {share(spectrum.saved(part))})" for part in SHARES),
        )
        for spectrum in spectra
    )
    return Section("Latent rank that keeps so much of [K; V], and cache saved with a rope key beside it", heads, rows)


def _parameters_of(part: Part) -> Callable[[Plan], str]:
    def tell(plan: Plan) -> str:
        if part == "lm_head" and plan.config.tied_embeddings:
            return "the embedding"
        return amount(plan.parameters[part].total) if part in plan.parameters else _NONE

    return tell


def _weights_in(dtype: str) -> Callable[[Plan], str]:
    return lambda plan: byte_size(plan.memory.weight_bytes_by_dtype[dtype])


def _cache_of(part: CachePart) -> Callable[[Plan], str]:
    def tell(plan: Plan) -> str:
        sizes = plan.memory.cache.part_bytes_per_token()
        return f"{whole(sizes[part])} B" if part in sizes else _NONE

    return tell


def _decode_of(part: Part) -> Callable[[Plan], str]:
    return lambda plan: _or_none(plan.arithmetic.decode_running.get(part), amount)


def _form(plan: Plan, form: str) -> str:
    return form if "attention" in plan.arithmetic.decode_running else _NONE


def _attention_share(plan: Plan) -> str:
    macs = plan.arithmetic.prefill_running
    if "attention" not in macs:
        return _NONE
    return share((macs.get("attention", 0) + macs.get("indexer", 0)) / sum(macs.values()))


def _still_read(plan: Plan) -> str:
    """Said where a window leaves something behind."""
    cache, context = plan.memory.cache, plan.request.context
    windowed = any(row.window is not None for row in cache.rows)
    return byte_size(cache.needed_bytes(context)) if windowed else _NONE


def _waste(plan: Plan) -> str:
    cache = plan.memory.cache
    if not cache.rows:
        return _NONE
    return f"{cache.expected_waste_tokens:g} tokens ({100 * cache.expected_waste(plan.request.context):.2g} %)"


def _ratio(plan: Plan, context: int) -> str:
    formula = plan.arithmetic.formula
    return f"{formula.ratio_actual(context):.4f}" if formula.topk else _NONE


def _limit(plan: Plan) -> str:
    formula = plan.arithmetic.formula
    return f"{formula.limit_ratio:.4f}" if formula.topk else _NONE


def _decode_crossover(plan: Plan) -> str:
    formula = plan.arithmetic.formula
    return _tokens(formula.pays_from) if formula.topk else _NONE


def _prefill_crossover(plan: Plan) -> str:
    return _tokens(plan.arithmetic.prefill_crossover) if plan.arithmetic.formula.topk else _NONE


def _tokens(count: float | None) -> str:
    return "never" if count is None else f"{whole(count)} tokens"


def _rate(plan: Plan) -> str:
    """Of products with weights."""
    dtype = plan.speed.compute_dtype
    return f"{amount(plan.speed.device.rate(dtype))} ({dtype})"


def _price(price: float | None) -> str:
    return _NONE if price is None else f"{price:.4g}"


def _or_none(count: float | None, tell: Callable[[float], str]) -> str:
    return tell(count) if count else _NONE
