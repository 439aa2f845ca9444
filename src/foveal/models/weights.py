"""Stored tensors: reading a Hugging Face directory of safetensors, and filling parameters from any source."""

import json
import logging
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from foveal.config import ModelConfig, read_config, weight_names
from foveal.config.model import Fp8Blocks

logger = logging.getLogger("foveal")

_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_FP8 = "F8_E4M3"
_SCALE = "_scale_inv"
# Every release of these families carries multi-token-prediction layers, whether its config says so or not.
_MTP_FAMILIES = frozenset({"deepseek_v3", "deepseek_v32", "glm_moe_dsa"})
# What a multi-token-prediction layer has beyond an ordinary one (DeepSeek-V3 report, section 2.2).
_MTP_PARTS = ("eh_proj.", "enorm.", "hnorm.", "shared_head.")
_BAR_FROM_BYTES = 256 << 20  # below this a load takes under a second


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, not read yet."""

    name: str
    shape: tuple[int, ...]
    nbytes: int
    """Bytes on disk."""
    read: Callable[[], Tensor]
    """The tensor in a floating dtype that loses nothing, on the CPU."""


@dataclass(frozen=True)
class Checkpoint:
    """What any source of weights gives: a config, and the model's tensors under the family's checkpoint names."""

    config: ModelConfig
    tensors: tuple[StoredTensor, ...]


def open_safetensors(directory: Path) -> Checkpoint:
    """The checkpoint in a Hugging Face directory; tensors are memory-mapped and read on demand.

    Rotary buffers, multi-token-prediction layers and a head that repeats tied embeddings are left out, with one log
    line a kind. Raises ValueError for unreadable files and for fp8 weights and scales that do not fit each other.
    """
    config = read_config(directory)
    stored: dict[str, _Entry] = {}
    for file in _shards(directory):
        for name, entry in _entries(file).items():
            for theirs, ours in weight_names(config.family).spellings:
                name = re.sub(theirs, ours, name)
            if name in stored:
                raise ValueError(f"{directory}: {name} is stored in both {stored[name].file.name} and {file.name}")
            stored[name] = entry
    return Checkpoint(config, _with_scales(_skip(stored, config), config.fp8_blocks))


def safetensors_in(file: Path) -> tuple[StoredTensor, ...]:
    """All tensors of one safetensors file, unread. ValueError where it is damaged."""
    return _with_scales(_entries(file), None)


def fill(views: Mapping[str, Tensor], tensors: Iterable[StoredTensor]) -> None:
    """Copy each stored tensor into the view of its name, converting to the view's dtype and device.

    Call `check` first. Shows a progress bar on a terminal when there is much to read.
    """
    tensors = tuple(tensors)
    total = sum(tensor.nbytes for tensor in tensors)
    bar, advance = _progress(total)
    with bar, torch.no_grad():
        for tensor in tensors:
            views[tensor.name].copy_(tensor.read())
            advance(tensor.nbytes)


def check(views: Mapping[str, Tensor], tensors: Iterable[StoredTensor]) -> None:
    """ValueError naming tensors that are missing, unexpected or mis-shaped: up to five of each, and the count."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    wrong = [
        f"{name} is {list(shapes[name])}, not {list(view.shape)}"
        for name, view in views.items()
        if name in shapes and shapes[name] != tuple(view.shape)
    ]
    problems = [
        _some("missing", [name for name in views if name not in shapes]),
        _some("unexpected", [name for name in shapes if name not in views]),
        _some("mis-shaped", wrong),
    ]
    if any(problems):
        raise ValueError(f"the checkpoint does not fit its config: {'; '.join(filter(None, problems))}")


def dequantise_blocks(weight: Tensor, scale: Tensor, blocks: Fp8Blocks) -> Tensor:
    """weight[r, c] * scale[r // blocks.rows, c // blocks.columns] in float32 (DeepSeek-V3 `kernel.py`, weight_dequant).

    `weight` is [rows, columns] e4m3; the last block of a row or column may be cut short.
    """
    rows, columns = weight.shape
    scale_rows = scale.float().repeat_interleave(blocks.rows, dim=0)[:rows]
    return weight.float().mul_(scale_rows.repeat_interleave(blocks.columns, dim=1)[:, :columns])


@dataclass(frozen=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


def _shards(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        if any(directory.glob("*.bin")):
            raise ValueError(f"{directory} holds only PyTorch .bin weights: convert them to safetensors")
        raise ValueError(f"{directory} holds neither {single.name} nor {index.name}")
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is not a readable index of shards: {error!r}") from None
    missing = [file for file in files if not (directory / file).is_file()]
    if missing:
        raise ValueError(f"{directory}: {_some('missing shards', missing)}")
    return [directory / file for file in files]


def _entries(file: Path) -> dict[str, _Entry]:
    try:
        handle: Any = safe_open(file, framework="pt")
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from None
    return {
        name: _Entry(file, tuple(part.get_shape()), part.get_dtype(), partial(handle.get_tensor, name))
        for name, part in slices.items()
    }


def _skip(stored: Mapping[str, _Entry], config: ModelConfig) -> dict[str, _Entry]:
    """What is left of `stored` without the tensors that a decoder has no use for."""
    names = weight_names(config.family)
    head, embedding = f"{names.head}.weight", f"{names.embedding}.weight"
    # transformers stores empty matrices for shared experts that there are none of.
    stored = {name: entry for name, entry in stored.items() if 0 not in entry.shape}
    kept = {name: entry for name, entry in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    if len(kept) < len(stored):
        logger.warning("skipped %d rotary buffers: they are computed", len(stored) - len(kept))
    if config.mtp_layers or config.family in _MTP_FAMILIES or names.prediction:
        extra = _prediction_layers(kept, names.layer, len(config.layers))
        extra |= {name for name in kept if names.prediction and name.startswith(f"{names.prediction}.")}
        kept = {name: entry for name, entry in kept.items() if name not in extra}
        if extra:
            logger.warning("skipped %d tensors of multi-token-prediction layers: they are not used", len(extra))
    if config.tied_embeddings and {head, embedding} <= kept.keys():
        if not torch.equal(kept[head].read(), kept[embedding].read()):
            raise ValueError(f"config.json ties the embeddings, but {head} differs from {embedding}")
        logger.info("skipped %s: it is tied to %s", head, embedding)
        del kept[head]
    return kept


def _prediction_layers(stored: Iterable[str], layer: str, count: int) -> set[str]:
    """The tensors of multi-token-prediction layers: beyond the last of `count` layers, and with parts that only they
    have. An ordinary layer there means a config with too few layers, and stays."""
    pattern = re.compile(re.escape(layer).replace(re.escape("{}"), r"(\d+)") + r"\.(.+)")
    beyond = {name: match for name in stored if (match := pattern.match(name)) and int(match[1]) >= count}
    predicting = {match[1] for match in beyond.values() if match[2].startswith(_MTP_PARTS)}
    return {name for name, match in beyond.items() if match[1] in predicting}


def _with_scales(stored: Mapping[str, _Entry], blocks: Fp8Blocks | None) -> tuple[StoredTensor, ...]:
    """The tensors as the model wants them: fp8 weights joined with their scales."""
    scales = {name for name in stored if name.endswith(_SCALE)}
    lonely = [
        name for name in scales if (weight := stored.get(name.removesuffix(_SCALE))) is None or weight.dtype != _FP8
    ]
    if lonely:
        raise ValueError(f"the checkpoint is inconsistent: {_some('scales without an fp8 weight', sorted(lonely))}")
    return tuple(_stored(name, entry, stored, blocks) for name, entry in stored.items() if name not in scales)


def _stored(name: str, entry: _Entry, stored: Mapping[str, _Entry], blocks: Fp8Blocks | None) -> StoredTensor:
    count = torch.Size(entry.shape).numel()
    if entry.dtype in _FLOATS:
        return StoredTensor(name, entry.shape, count * _FLOATS[entry.dtype], entry.read)
    if entry.dtype != _FP8:
        raise ValueError(
            f"{name} is stored as {entry.dtype}, which is not supported (only {', '.join(_FLOATS)}, {_FP8})"
        )
    scale = stored.get(name + _SCALE)
    if scale is None or blocks is None:
        lacking = f"no {name}{_SCALE}" if scale is None else "no 'quantization_config' in config.json"
        raise ValueError(f"{name} is stored as {_FP8}, but there is {lacking}")
    expected = tuple(-(-size // block) for size, block in zip(entry.shape, (blocks.rows, blocks.columns), strict=False))
    if len(entry.shape) != 2 or scale.shape != expected:
        raise ValueError(f"{name}{_SCALE} is {list(scale.shape)}, not {list(expected)} for {list(entry.shape)} weights")
    read_weight, read_scale = entry.read, scale.read
    return StoredTensor(name, entry.shape, count, lambda: dequantise_blocks(read_weight(), read_scale(), blocks))


def _some(what: str, names: Collection[str]) -> str:
    """'3 missing: a, b, c'; '' where there are none."""
    shown = ", ".join(list(names)[:5])
    more = ", ..." if len(names) > 5 else ""
    return f"{len(names)} {what}: {shown}{more}" if names else ""


def _progress(total: int) -> tuple[AbstractContextManager[object], Callable[[int], None]]:
    if total < _BAR_FROM_BYTES or not sys.stderr.isatty():
        return nullcontext(), lambda _: None
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    bar = Progress(TextColumn("loading"), BarColumn(), DownloadColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task("loading", total=total)
    return bar, lambda nbytes: bar.advance(task, nbytes)
