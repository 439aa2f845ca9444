"""Time, throughput and price on a device, by the roofline: a part takes as long as its bytes or its arithmetic,
whichever takes longer (Williams, Waterman, Patterson, CACM 52(4), 2009). Peaks are taken as reached: times are lower
bounds."""

import math
from dataclasses import dataclass

from foveal.config.formats import ITEM_BYTES
from foveal.config.model import BlockConfig, ModelConfig, MoEConfig
from foveal.costs.cache_bytes import CacheCost, CacheDtypes, block_rows, state_bytes
from foveal.costs.devices import Device
from foveal.costs.macs import Form, core_macs, running_form, running_macs
from foveal.costs.parameters import bytes_of, weight_bytes
from foveal.costs.weights import Part, block_weights, model_weights

MEMORY_SHARE = 0.9
"""Of a device's memory; the rest is for activations and the runtime."""
_COMBINE_BYTES = 2  # experts' outputs come back in bfloat16 (DeepSeek-V3 report, section 3.3.2)


@dataclass(frozen=True)
class Setup:
    """A model as it is run: what is stored how, on how many devices that share everything evenly."""

    config: ModelConfig
    weight_dtype: str
    cache_dtypes: CacheDtypes
    cache: CacheCost
    device: Device
    devices: int

    def __post_init__(self) -> None:
        """ValueError for several devices that cannot speak to each other."""
        if self.devices > 1 and self.device.link_bytes_per_second is None:
            raise ValueError(f"{self.device.name} has no link to others: devices must be 1, not {self.devices}")

    @property
    def compute_dtype(self) -> str:
        """What matrix products run in: fp8 where weights are; narrower weights are widened to bfloat16 first."""
        if self.weight_dtype in ("fp8", "float32"):
            return self.weight_dtype
        return "bfloat16"


@dataclass(frozen=True)
class PartTime:
    """One part of a step."""

    bytes_moved: float
    macs: float
    bytes_seconds: float
    macs_seconds: float

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.bytes_seconds, self.macs_seconds)

    @property
    def bound(self) -> str:
        """What it waits for."""
        return "bandwidth" if self.bytes_seconds >= self.macs_seconds else "arithmetic"


@dataclass(frozen=True)
class StepTime:
    """One step of a batch."""

    batch: int
    parts: dict[str, PartTime]

    @property
    def seconds(self) -> float:
        """The parts one after another."""
        return sum(part.seconds for part in self.parts.values())


def decode_time(setup: Setup, batch: int, context: int) -> StepTime:
    """One new token for each of `batch` sequences of `context` tokens."""
    return _step_time(setup, batch, 1, context)


def prefill_time(setup: Setup, tokens: int) -> StepTime:
    """A whole prompt of one sequence, to its first new token. Cached rows are read once, which is the least."""
    return _step_time(setup, 1, tokens, tokens)


def largest_batch(setup: Setup, context: int) -> int:
    """Sequences of `context` tokens that fit beside the weights in MEMORY_SHARE of the memory; 0: not even one."""
    room = MEMORY_SHARE * setup.device.memory_bytes * setup.devices - weight_bytes(setup.config, setup.weight_dtype)
    return max(0, int(room // _reserved_bytes(setup.cache, context)))


def fewest_devices(config: ModelConfig, weight_dtype: str, cache: CacheCost, device: Device, context: int) -> int:
    """Devices that hold the weights and one sequence of `context` tokens, experts spread evenly; 1 where a device has
    no link to others, whether it holds them or not."""
    if device.link_bytes_per_second is None:
        return 1
    needed = weight_bytes(config, weight_dtype) + _reserved_bytes(cache, context)
    devices = math.ceil(needed / (MEMORY_SHARE * device.memory_bytes))
    experts = {block.operation.experts for block in config.blocks if isinstance(block.operation, MoEConfig)}
    while not all(spreads_evenly(count, devices) for count in experts):
        devices += 1
    return devices


def _reserved_bytes(cache: CacheCost, context: int) -> int:
    """What the engine keeps for a sequence: beside its own state, snapshots for others that begin alike."""
    return cache.sequence_bytes(context) + cache.snapshot_bytes


def price_per_million(tokens_per_second: float, price_per_hour: float) -> float:
    """What a million tokens cost at so much an hour (for all devices): price / 3600 / rate x 10^6."""
    return price_per_hour / 3600 / tokens_per_second * 1e6


def expected_experts(experts: int, per_token: int, tokens: int) -> float:
    """Different experts that `tokens` tokens use, each choosing `per_token` at random: E (1 - (1 - A / E)^t)."""
    return experts * (1 - (1 - per_token / experts) ** tokens)


def expected_remote_devices(experts: int, per_token: int, devices: int) -> float:
    """Other devices that one token is sent to when experts are spread evenly over `devices` and chosen at random:
    (N - 1) (1 - C(E - E/N, A) / C(E, A)), once a device however many of its experts are chosen (the quotient as a
    product, which stays small). More devices than experts: each expert is sliced, and a token goes to all slices.
    Routers that limit a token to some groups reach fewer. ValueError where one number does not divide the other."""
    if not spreads_evenly(experts, devices):
        raise ValueError(f"{experts} experts cannot be spread evenly over {devices} devices")
    held = max(1, experts // devices)
    missed = math.prod((experts - held - chosen) / (experts - chosen) for chosen in range(per_token))
    return (devices - 1) * (1 - max(0.0, missed))


def spreads_evenly(experts: int, devices: int) -> bool:
    """Whether every device can hold as much of the experts."""
    return experts % devices == 0 or devices % experts == 0


def all_to_all_bytes(moe: MoEConfig, hidden: int, devices: int, dispatch_bytes: int) -> float:
    """Bytes of expert parallelism that one token sends and gets back in one layer: D numbers to each other device that
    holds one of its experts, and as many back (DeepSeek-V3 report, section 3.2.2: fp8 there, bfloat16 back)."""
    remote = expected_remote_devices(moe.experts, moe.per_token, devices)
    return remote * hidden * (dispatch_bytes + _COMBINE_BYTES)


def _step_time(setup: Setup, batch: int, queries: int, context: int) -> StepTime:
    config, device = setup.config, setup.device
    form = running_form(config, queries, context)
    macs, core = running_macs(config, queries, context), core_macs(config, queries, context, form)
    moved = _weight_bytes_read(setup, batch * queries, selects=form in ("masked", "sparse"))
    for block in config.blocks:
        for part, count in _cache_bytes_read(block, setup.cache_dtypes, queries, context, form, config.index_topk):
            moved[part] = moved.get(part, 0) + batch * count
    bandwidth, parts = device.bandwidth_bytes_per_second * setup.devices, dict[str, PartTime]()
    for part, count in macs.items():
        products, rest = count - core.get(part, 0), core.get(part, 0)
        operations = products / device.rate(_product_dtype(setup, part)) + rest / device.rate(_core_dtype(setup, part))
        seconds = 2 * batch * operations / setup.devices
        parts[part] = PartTime(moved[part], batch * count, moved[part] / bandwidth, seconds)
    if exchange := _exchange(setup, batch * queries):
        parts["all_to_all"] = exchange
    return StepTime(batch, parts)


def _product_dtype(setup: Setup, part: str) -> str:
    """What weights are multiplied in: the head stays in bfloat16 where matrices are fp8 (`bytes_of`)."""
    return "bfloat16" if part == "lm_head" and setup.compute_dtype == "fp8" else setup.compute_dtype


def _core_dtype(setup: Setup, part: str) -> str:
    """What keys are multiplied in: index keys as they are stored, states in float32, the others in bfloat16 at least
    (fp8 latents are widened: FlashMLA README)."""
    if part == "recurrence":
        return "float32"
    if part == "indexer":
        return setup.cache_dtypes.index_keys
    return "float32" if ITEM_BYTES.get(setup.cache_dtypes.keys_values) == 4 else "bfloat16"


def _weight_bytes_read(setup: Setup, tokens: int, *, selects: bool) -> dict[str, float]:
    """Bytes of the weights that a step of so many tokens reads, by part: of experts those that are expected to be
    chosen; of an indexer that does not select yet only what makes its keys; of the embedding nothing, which is a row a
    token."""
    config, dtype, moved = setup.config, setup.weight_dtype, dict[str, float]()
    hidden, blocks = config.hidden_size, config.fp8_blocks
    for block in config.blocks:
        for weight in block_weights(block, hidden):
            if weight.part == "indexer" and not selects and not weight.name.startswith(("wk", "k_norm")):
                continue
            copies: float = weight.copies
            if weight.copies > 1:
                copies = expected_experts(weight.copies, weight.active, tokens)
            moved[weight.part] = moved.get(weight.part, 0) + copies * bytes_of(weight, dtype, blocks)
    head = next(weight for weight in model_weights(config) if weight.part == "lm_head")
    return moved | {"lm_head": float(bytes_of(head, dtype, blocks))}


def _cache_bytes_read(
    block: BlockConfig, dtypes: CacheDtypes, queries: int, context: int, form: Form, topk: int | None
) -> list[tuple[Part, int]]:
    """Bytes of the cache that one sequence reads in one block: the rows that its queries see, states in and out."""
    selects = form in ("masked", "sparse")
    parts: list[tuple[Part, int]] = [("recurrence", 2 * state_bytes(block, dtypes.keys_values))]
    for row in block_rows(block, dtypes):
        if row.part == "index_keys":
            parts.append(("indexer", context * row.bytes_per_token if selects else 0))
            continue
        seen = min(context, row.sinks + (row.window or context) + queries - 1)
        if form == "sparse" and topk is not None and (block.indexer or block.shared_selection):
            seen = min(seen, queries * topk)
        parts.append(("attention", seen * row.bytes_per_token))
    return parts


def _exchange(setup: Setup, tokens: int) -> PartTime | None:
    """Expert parallelism between several devices; None where there is nothing to exchange."""
    layers = [block.operation for block in setup.config.blocks if isinstance(block.operation, MoEConfig)]
    if setup.devices == 1 or not layers:
        return None
    assert setup.device.link_bytes_per_second is not None  # see `Setup`
    dispatch = 1 if setup.weight_dtype == "fp8" else 2
    moved = tokens * sum(all_to_all_bytes(moe, setup.config.hidden_size, setup.devices, dispatch) for moe in layers)
    return PartTime(moved, 0, moved / (setup.device.link_bytes_per_second * setup.devices), 0)
