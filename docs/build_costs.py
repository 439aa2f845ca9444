"""Writes docs/costs.md and its plots from `foveal plan`'s own functions: no figure on that page is typed in, but for
times that were measured, which are kept in docs/plan_vs_measured.json.

python docs/build_costs.py
"""

import json
from collections.abc import Sequence
from pathlib import Path
from string import Template

from foveal.cli.plan_png import write_png
from foveal.cli.plan_rows import amount, byte_size, whole
from foveal.config import ModelConfig, read_config
from foveal.config.model import MLAConfig
from foveal.config.released import released, released_names
from foveal.costs import Plan, Request, apply_variant, find_device, make_plan
from foveal.costs.absorption import expansion_macs, mla_absorptions, most_absorbed_queries
from foveal.costs.cache_bytes import CacheRow, cache_cost, cache_dtypes
from foveal.costs.macs import decode_formula, prefill_crossover
from foveal.costs.parameters import total_parameters
from foveal.costs.plan import PUBLISHED_CONTEXTS

_HERE = Path(__file__).parent
_LONG = 131_072  # tokens
_PRICE = 2.0  # an hour and device


def page() -> str:
    """The whole page."""
    text = Template((_HERE / "costs.template.md").read_text(encoding="utf-8"))
    return text.substitute(
        parts=_parts(),
        ratios=_ratios(),
        crossovers=_crossovers(),
        loose=_loose(),
        caches=_caches(),
        absorption=_absorption(),
        conversion=_conversion(),
        speed=_speed(),
        **_measured(),
        long=whole(_LONG),
        price=f"{_PRICE:g}",
        names=", ".join(f"`{name}`" for name in released_names()),
    )


def plots() -> None:
    """The pictures of the page."""
    images = _HERE / "images"
    images.mkdir(exist_ok=True)
    write_png([_plan("deepseek-v3.2")], images / "costs-deepseek-v3.2.png")
    write_png(_plans("deepseek-v3.2", "llama-3-70b", "jamba-1.5-large", "kimi-linear-48b"), images / "costs-models.png")


def _model(name: str, variant: str | None = None) -> ModelConfig:
    config = read_config(released(name))
    return apply_variant(config, variant) if variant else config


def _plan(name: str, variant: str | None = None) -> Plan:
    request = Request(_LONG, find_device("h100"), price_per_hour=_PRICE)
    return make_plan(f"{name} {variant}" if variant else name, _model(name, variant), request)


def _plans(*names: str) -> list[Plan]:
    return [_plan(name) for name in names]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    ruler = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ruler, *rows))


def _parts() -> str:
    formula = decode_formula(_model("deepseek-v3.2"))
    rows = [
        ("feed-forward, experts and routers", formula.feed_forward),
        ("LM head", formula.lm_head),
        ("attention, fixed (projections, absorption)", formula.attention_fixed),
        ("attention, a context token", formula.attention_per_context_token),
        ("attention to the selected 2048", formula.attention_selected),
        ("indexer, fixed", formula.indexer_fixed),
        ("indexer, a context token", formula.indexer_per_context_token),
        ("**dense: fixed**, plus attention a context token", formula.dense_fixed),
        ("**sparse: fixed**, plus indexer a context token", formula.sparse_fixed),
    ]
    return _table(("part", "multiply-accumulates"), [(name, whole(macs)) for name, macs in rows])


def _ratios() -> str:
    formula = decode_formula(_model("deepseek-v3.2"))
    rows = [
        (whole(context), f"{formula.ratio_published(context):.4f}", f"{formula.ratio_actual(context):.4f}")
        for context in PUBLISHED_CONTEXTS
    ]
    limit = f"{formula.limit_ratio:.4f}"
    return _table(("context", "as published", "actual"), [*rows, ("limit", limit, limit)])


def _crossovers() -> str:
    rows = []
    for name in ("deepseek-v3.2", "glm-5"):
        config = _model(name)
        formula = decode_formula(config)
        rows.append((name, whole(formula.pays_from), whole(prefill_crossover(config))))
    return _table(("model", "decoding pays from", "a prefill pays from"), rows)


def _loose() -> str:
    v3, v32 = _model("deepseek-v3"), _model("deepseek-v3.2")
    latent = v3.layers[0][0].operation
    assert isinstance(latent, MLAConfig)
    heads = _elements(_model("deepseek-v3", "mha"))
    row = _elements(v3)
    index = cache_cost(v32, cache_dtypes("bfloat16")).rows[1].bytes_per_token
    one_layer = 32000 * heads * 2
    old, new = (sum(part.elements_per_token for part in _rows(name)) for name in ("deepseek-67b", "deepseek-v2"))
    formula = decode_formula(v32)
    expansion = amount(expansion_macs(latent, 32000))
    lines = [
        (
            f"the latent saves {_saved(latent.kv_lora_rank, heads)} against MHA ({heads} numbers a token and layer)",
            f"{_saved(row, heads)}: the row that is cached is {row} wide, {latent.kv_lora_rank} and a rope key of "
            f"{latent.rope_dim}",
        ),
        ("an index key takes 129 B", f"{index} B as stored: the scale is a float32"),
        (
            "MHA takes 2 GB at 32K",
            f"that is one layer: 32 000 x {heads * 2} B = {byte_size(one_layer)}; the model has {len(v3.layers)}, so "
            f"{byte_size(one_layer * len(v3.layers))}",
        ),
        (
            "MLA must rebuild keys and values from latents at each step",
            f"that would cost {expansion} multiply-accumulates a layer at 32 000 tokens; absorption removes them",
        ),
        (
            "sqrt(heads x head_dim) is 512 for V3",
            f"{(latent.heads * latent.nope_dim) ** 0.5:.0f}: {latent.heads} heads of {latent.nope_dim}",
        ),
        (
            f"DeepSeek-V2's cache is {_saved(new * 6 / 8, old * 2, 1)} smaller",
            f"only with 6 bits a number; the architecture alone saves {_saved(new, old, 1)} against DeepSeek 67B "
            "(GQA with 8 heads)",
        ),
        (
            f"sparse costs {formula.ratio_published(2000):.4f} of dense at 2000 tokens",
            f"{formula.ratio_actual(2000):.4f}: selection is min(n, k), and there are no 2048 tokens to attend to. "
            "Below top-k nothing is saved either way",
        ),
    ]
    ruler = ("---", "---")
    return "\n".join(f"| {left} | {right} |" for left, right in (("often said", "counted"), ruler, *lines))


def _rows(name: str) -> tuple[CacheRow, ...]:
    return cache_cost(_model(name), cache_dtypes("bfloat16")).rows


def _elements(config: ModelConfig) -> int:
    """Numbers that the first layer keeps of a token."""
    return cache_cost(config, cache_dtypes("bfloat16")).rows[0].elements_per_token


def _saved(new: float, old: float, digits: int = 2) -> str:
    return f"{100 * (1 - new / old):.{digits}f} %"


def _caches() -> str:
    rows = []
    for name in released_names():
        plan = _plan(name)
        cache = plan.memory.cache
        parameters = total_parameters(plan.config)
        rows.append(
            (
                name,
                amount(parameters.total),
                amount(parameters.active),
                f"{byte_size(plan.memory.weight_bytes)} ({plan.memory.weight_dtype})",
                f"{whole(cache.bytes_per_token)} B",
                byte_size(cache.state_bytes) if cache.state_bytes else "–",
                byte_size(cache.sequence_bytes(_LONG)),
            )
        )
    heads = ("model", "parameters", "active", "weights", "cache a token", "state", f"cache of {whole(_LONG)} tokens")
    return _table(heads, rows)


def _absorption() -> str:
    config = _model("deepseek-v3")
    latent = config.layers[0][0].operation
    assert isinstance(latent, MLAConfig)
    rows = [
        (
            f"merging the weights of the {name}",
            f"{amount(pair.separate_numbers)} separate, {amount(pair.merged_numbers)} merged: "
            f"{'pays' if pair.merging_pays else 'does not pay'}",
        )
        for name, pair in mla_absorptions(latent, config.hidden_size).items()
    ]
    rows += [
        (f"absorbing is cheaper after {whole(n)} tokens", f"for up to {most_absorbed_queries(latent, n)} new tokens")
        for n in (100, 1000, 32_000, _LONG)
    ]
    return _table(("DeepSeek-V3, one layer", "multiply-accumulates"), rows)


def _conversion() -> str:
    rows = []
    for variant in (None, "mqa", "mla", "dsa:2048", "mla+dsa:2048", "window:4096"):
        plan = _plan("llama-3-70b", variant)
        rows.append(
            (
                variant or "as released (GQA, 8 heads)",
                f"{whole(plan.memory.cache.bytes_per_token)} B",
                byte_size(plan.memory.cache.sequence_bytes(_LONG)),
                amount(sum(plan.arithmetic.decode_running.values())),
                amount(sum(plan.arithmetic.prefill_running.values())),
            )
        )
    heads = ("llama-3-70b", "cache a token", "cache of a sequence", "decoding a token, MACs", "prefill, MACs")
    return _table(heads, rows)


def _speed() -> str:
    rows = []
    for plan in _plans("deepseek-v3", "deepseek-v3.2", "glm-5", "llama-3-70b", "jamba-1.5-large", "kimi-linear-48b"):
        speed = plan.speed
        rows.append(
            (
                plan.name,
                str(speed.devices),
                str(speed.largest_batch),
                f"{speed.decode.seconds * 1e3:.1f} ms",
                whole(speed.decode_tokens_per_second),
                f"{speed.decode_price_per_million:.3f}",
                f"{speed.prefill_price_per_million:.3f}",
            )
        )
    heads = ("model", "H100s", "batch", "a step", "tokens a second", "a million decoded", "a million prefilled")
    return _table(heads, rows)


def _measured() -> dict[str, str]:
    """What benchmarks/plan_vs_measured.py printed on a quiet machine, and where."""
    record = json.loads((_HERE / "plan_vs_measured.json").read_text(encoding="utf-8"))
    rows = [
        (
            f"{row['model']}, {row['step']}",
            f"{row['predicted_ms']:.1f} ms",
            f"{row['measured_ms']:.1f} ms",
            f"{row['error_percent']:+d} %".replace("-", "\N{MINUS SIGN}"),
        )
        for row in record["rows"]
    ]
    return {
        "measured": _table(("step", "predicted", "measured", "error"), rows),
        "measured_command": record["command"],
        "measured_machine": f"{record['machine']}, {record['date']}",
        "measured_peaks": (
            f"{record['bandwidth_gigabytes_per_second']} GB/s and {record['float32_gigaflops_per_second']} Gflop/s"
        ),
    }


if __name__ == "__main__":
    (_HERE / "costs.md").write_text(page(), encoding="utf-8")
    plots()
