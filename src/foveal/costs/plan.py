"""The plan: everything about one model at one context length, as a record that can be printed, drawn or written."""

from dataclasses import asdict, dataclass
from typing import Any

from foveal.config.formats import PAGE_SIZE
from foveal.config.model import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from foveal.costs.absorption import absorbed_pays, expansion_macs, mla_absorptions, most_absorbed_queries
from foveal.costs.attention import mla_macs
from foveal.costs.cache_bytes import CacheCost, CacheDtypes, CacheRow, block_rows, cache_cost, cache_dtypes
from foveal.costs.devices import Device
from foveal.costs.macs import (
    DecodeFormula,
    decode_formula,
    decode_macs,
    forms,
    prefill_crossover,
    prefill_macs,
    running_form,
    running_macs,
)
from foveal.costs.parameters import (
    WEIGHT_DTYPES,
    ParameterCount,
    count_parameters,
    released_dtype,
    total_parameters,
    weight_bytes,
)
from foveal.costs.roofline import (
    Setup,
    StepTime,
    all_to_all_bytes,
    decode_time,
    fewest_devices,
    largest_batch,
    prefill_time,
    price_per_million,
)
from foveal.costs.weights import Part

PUBLISHED_CONTEXTS = (2000, 2300, 4000, 16000, 64000, 128000, 512000)
"""Context lengths at which the ratio of sparse to dense is usually stated."""
_MOST = 1_000_000_000  # of tokens, sequences and devices: beyond, it is a slip of the keyboard


@dataclass(frozen=True)
class Request:
    """What is asked about every model alike."""

    context: int
    device: Device
    batch: int | None = None
    """Sequences decoded together; None: as many as fit."""
    weight_dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    index_dtype: str = "auto"
    page_tokens: int = PAGE_SIZE
    devices: int | None = None
    """None: as few as hold the weights and one sequence."""
    price_per_hour: float | None = None
    """Of one device."""


@dataclass(frozen=True)
class Memory:
    """Bytes of weights and caches."""

    weight_dtype: str
    weight_bytes: int
    weight_bytes_by_dtype: dict[str, int]
    dtypes: CacheDtypes
    cache: CacheCost
    attention_elements: int
    """Numbers that one attention layer keeps of a token (the first one's), index keys left out."""


@dataclass(frozen=True)
class Arithmetic:
    """Multiply-accumulates at the context length that was asked for."""

    formula: DecodeFormula
    decode: dict[str, dict[Part, int]]
    """By form, and by part."""
    decode_form: str
    """What Foveal runs, ..."""
    decode_running: dict[Part, int]
    """... and what that costs; up to top-k tokens, index keys are all that the indexer computes."""
    prefill: dict[str, dict[Part, int]]
    prefill_form: str
    prefill_running: dict[Part, int]
    prefill_crossover: int | None


@dataclass(frozen=True)
class LatentForms:
    """Absorption in the model's latent attention; MACs of one layer."""

    expansion_macs: int
    """To expand the latents of the whole context once."""
    absorbed_macs: int
    """One decoded token, absorbed."""
    expanded_macs: int
    """One decoded token, expansion of the whole context included."""
    decode_absorbed: bool
    """Whether the absorbed form is cheaper for one token, ..."""
    most_absorbed_queries: int
    """... and up to how many new tokens at this context."""
    merging: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Speed:
    """Times on a device, by the roofline."""

    device: Device
    devices: int
    compute_dtype: str
    """What the device multiplies weights in."""
    fits: bool
    largest_batch: int
    decode: StepTime
    prefill: StepTime
    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    decode_price_per_million: float | None
    prefill_price_per_million: float | None
    all_to_all_bytes: float | None
    """A token and layer of expert parallelism; None: no experts, or one device."""


@dataclass(frozen=True)
class Plan:
    """What one model costs at one context length."""

    name: str
    config: ModelConfig
    request: Request
    parameters: dict[Part, ParameterCount]
    memory: Memory
    arithmetic: Arithmetic
    latents: LatentForms | None
    speed: Speed
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The record in plain types, for JSON."""
        return {
            "model": self.name,
            "family": self.config.family,
            "layers": len(self.config.layers),
            "context_tokens": self.request.context,
            "parameters": self._parameters(),
            "weights": _weights(self.memory),
            "cache": _cache(self.memory, self.request.context),
            "macs": _macs(self.arithmetic),
            "sparse": _sparse(self.arithmetic.formula, self.arithmetic.prefill_crossover, self.request.context),
            "latent_forms": None if self.latents is None else asdict(self.latents),
            "speed": _speed(self.speed),
            "notes": list(self.notes),
        }

    def _parameters(self) -> dict[str, Any]:
        return asdict(total_parameters(self.config)) | {
            "by_part": {part: asdict(count) for part, count in self.parameters.items()}
        }


def make_plan(name: str, config: ModelConfig, request: Request) -> Plan:
    """What `config` costs. ValueError for a request that makes no sense, naming what is wrong."""
    _check(request)
    memory = _memory(config, request)
    return Plan(
        name=name,
        config=config,
        request=request,
        parameters=count_parameters(config),
        memory=memory,
        arithmetic=_arithmetic(config, request.context),
        latents=_latent_forms(config, request.context),
        speed=_speed_of(config, memory, request),
        notes=_notes(config, request, memory),
    )


def _check(request: Request) -> None:
    for name, value in (
        ("context", request.context),
        ("batch", request.batch),
        ("devices", request.devices),
        ("page size", request.page_tokens),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
        if value is not None and value > _MOST:
            raise ValueError(f"{name} must be at most {_MOST}; what was given has {len(str(value))} digits")
    if request.price_per_hour is not None and not 0 <= request.price_per_hour < float("inf"):
        raise ValueError(f"price per hour must not be below 0, nor infinite: {request.price_per_hour}")
    if request.weight_dtype not in ("auto", *WEIGHT_DTYPES):
        raise ValueError(f"weights must be one of auto, {', '.join(WEIGHT_DTYPES)}, not {request.weight_dtype!r}")


def _memory(config: ModelConfig, request: Request) -> Memory:
    dtype = released_dtype(config) if request.weight_dtype == "auto" else request.weight_dtype
    running = "float32" if dtype == "float32" else "bfloat16"  # what activations, keys and values are kept in
    dtypes = cache_dtypes(running, request.kv_cache_dtype, request.index_dtype)
    rows = (row for block in config.blocks for row in block_rows(block, dtypes))
    first: CacheRow | None = next((row for row in rows if row.part != "index_keys"), None)
    return Memory(
        weight_dtype=dtype,
        weight_bytes=weight_bytes(config, dtype),
        weight_bytes_by_dtype={name: weight_bytes(config, name) for name in WEIGHT_DTYPES},
        dtypes=dtypes,
        cache=cache_cost(config, dtypes, request.page_tokens),
        attention_elements=first.elements_per_token if first else 0,
    )


def _arithmetic(config: ModelConfig, context: int) -> Arithmetic:
    return Arithmetic(
        formula=decode_formula(config),
        decode={form: decode_macs(config, context, form) for form in forms(config)},
        decode_form=running_form(config, 1, context),
        decode_running=running_macs(config, 1, context),
        prefill={form: prefill_macs(config, context, form) for form in forms(config)},
        prefill_form=running_form(config, context, context),
        prefill_running=running_macs(config, context, context),
        prefill_crossover=prefill_crossover(config),
    )


def _latent_forms(config: ModelConfig, context: int) -> LatentForms | None:
    latent = next((block.operation for block in config.blocks if isinstance(block.operation, MLAConfig)), None)
    if latent is None:
        return None
    macs = mla_macs(latent, 1, context)
    merging = {
        name: {
            "separate_numbers": pair.separate_numbers,
            "merged_numbers": pair.merged_numbers,
            "merging_pays": pair.merging_pays,
        }
        for name, pair in mla_absorptions(latent, config.hidden_size).items()
    }
    return LatentForms(
        expansion_macs=expansion_macs(latent, context),
        absorbed_macs=macs["absorbed"],
        expanded_macs=macs["expanded"],
        decode_absorbed=absorbed_pays(latent, 1, context),
        most_absorbed_queries=most_absorbed_queries(latent, context),
        merging=merging,
    )


def _speed_of(config: ModelConfig, memory: Memory, request: Request) -> Speed:
    context, device = request.context, request.device
    devices = request.devices or fewest_devices(config, memory.weight_dtype, memory.cache, device, context)
    setup = Setup(config, memory.weight_dtype, memory.dtypes, memory.cache, device, devices)
    fitting = largest_batch(setup, context)
    batch = request.batch or max(1, fitting)
    decode, prefill = decode_time(setup, batch, context), prefill_time(setup, context)
    decoded, prefilled = batch / decode.seconds, context / prefill.seconds
    price = None if request.price_per_hour is None else request.price_per_hour * devices
    experts = [block.operation for block in config.blocks if isinstance(block.operation, MoEConfig)]
    dispatch = 1 if memory.weight_dtype == "fp8" else 2
    return Speed(
        device=device,
        devices=devices,
        compute_dtype=device.computes_in(setup.compute_dtype),
        fits=batch <= fitting,
        largest_batch=fitting,
        decode=decode,
        prefill=prefill,
        decode_tokens_per_second=decoded,
        prefill_tokens_per_second=prefilled,
        decode_price_per_million=None if price is None else price_per_million(decoded, price),
        prefill_price_per_million=None if price is None else price_per_million(prefilled, price),
        all_to_all_bytes=all_to_all_bytes(experts[0], config.hidden_size, devices, dispatch)
        if experts and devices > 1
        else None,
    )


def _notes(config: ModelConfig, request: Request, memory: Memory) -> tuple[str, ...]:
    notes = []
    if request.context > config.max_positions:
        notes.append(f"{request.context} tokens are more than the {config.max_positions} that the model is meant for")
    if config.index_topk is not None and request.context <= config.index_topk:
        notes.append(f"up to top-k = {config.index_topk} tokens nothing is left out, and selection saves nothing")
    windows = {block.operation.window for block in config.blocks if isinstance(block.operation, GQAConfig)}
    if windows - {None} and memory.cache.window is None:
        notes.append("pages behind a window stay: some layers see the whole context")
    if config.mtp_layers:
        notes.append(f"{config.mtp_layers} multi-token-prediction layer(s) of the checkpoint are not counted")
    return tuple(notes)


def _weights(memory: Memory) -> dict[str, Any]:
    return {"dtype": memory.weight_dtype, "bytes": memory.weight_bytes, "bytes_by_dtype": memory.weight_bytes_by_dtype}


def _cache(memory: Memory, context: int) -> dict[str, Any]:
    cache = memory.cache
    return {
        "dtypes": asdict(memory.dtypes),
        "attention_elements_per_token_and_layer": memory.attention_elements,
        "bytes_per_token": cache.bytes_per_token,
        "bytes_per_token_by_part": cache.part_bytes_per_token(),
        "state_bytes_per_sequence": cache.state_bytes,
        "snapshot_bytes_per_sequence": cache.snapshot_bytes,
        "window_tokens": cache.window,
        "sink_tokens": cache.sinks,
        "page_tokens": cache.page_tokens,
        "page_bytes": cache.page_bytes,
        "sequence_bytes": cache.sequence_bytes(context),
        "sequence_bytes_needed": cache.needed_bytes(context),
        "expected_waste_tokens_per_sequence": cache.expected_waste_tokens if cache.rows else 0.0,
        "expected_waste_share": cache.expected_waste(context) if cache.rows else 0.0,
    }


def _macs(arithmetic: Arithmetic) -> dict[str, Any]:
    formula = arithmetic.formula
    lines: dict[str, Any] = asdict(formula) | {"dense_fixed": formula.dense_fixed}
    if formula.topk is not None:
        lines |= {
            "sparse_fixed": formula.sparse_fixed,
            "sparse_per_context_token": formula.sparse_per_context_token,
        }
    return {
        "per_token": lines,
        "decode": _totals(arithmetic.decode),
        "decode_runs": {"form": arithmetic.decode_form} | _total(arithmetic.decode_running),
        "prefill": _totals(arithmetic.prefill),
        "prefill_runs": {"form": arithmetic.prefill_form} | _total(arithmetic.prefill_running),
    }


def _totals(by_form: dict[str, dict[Part, int]]) -> dict[str, Any]:
    return {form: _total(parts) for form, parts in by_form.items()}


def _total(parts: dict[Part, int]) -> dict[str, Any]:
    return {"total": sum(parts.values()), "by_part": dict(parts)}


def _sparse(formula: DecodeFormula, prefill_crossover: int | None, context: int) -> dict[str, Any] | None:
    if formula.topk is None:
        return None
    contexts = sorted({*PUBLISHED_CONTEXTS, context})
    return {
        "topk": formula.topk,
        "decode_crossover_context": formula.crossover_context,
        "decode_pays_from": formula.pays_from,
        "prefill_pays_from": prefill_crossover,
        "ratio_limit": formula.limit_ratio,
        "ratio_published": {str(n): formula.ratio_published(n) for n in contexts},
        "ratio_actual": {str(n): formula.ratio_actual(n) for n in contexts},
    }


def _speed(speed: Speed) -> dict[str, Any]:
    return {
        "device": asdict(speed.device),
        "devices": speed.devices,
        "compute_dtype": speed.compute_dtype,
        "batch": speed.decode.batch,
        "fits": speed.fits,
        "largest_batch": speed.largest_batch,
        "decode": _step(speed.decode) | {"tokens_per_second": speed.decode_tokens_per_second},
        "prefill": _step(speed.prefill) | {"tokens_per_second": speed.prefill_tokens_per_second},
        "decode_price_per_million_tokens": speed.decode_price_per_million,
        "prefill_price_per_million_tokens": speed.prefill_price_per_million,
        "all_to_all_bytes_per_token_and_layer": speed.all_to_all_bytes,
    }


def _step(step: StepTime) -> dict[str, Any]:
    parts = {
        name: {"seconds": part.seconds, "bound": part.bound, "bytes": part.bytes_moved, "macs": part.macs}
        for name, part in step.parts.items()
    }
    return {"seconds": step.seconds, "by_part": parts}
