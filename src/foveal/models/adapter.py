"""Indexer adapters: what makes a dense model sparse, in a small file beside it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from foveal.config.indexers import with_indexers
from foveal.models.decoder import Decoder
from foveal.models.names import checkpoint_tensors
from foveal.models.save import replacing, save_tensors, write_json
from foveal.models.weights import Checkpoint, safetensors_in
from foveal.nn.norm import RMSNorm

CONFIG = "adapter_config.json"
WEIGHTS = "adapter.safetensors"
_FORMAT = "foveal-indexer"
_VERSION = 1


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is for."""

    base_model: str
    """The name under which the base was trained on; for people."""
    base_fingerprint: str
    """Of the base's weights (see `fingerprint`)."""
    heads: int
    head_dim: int
    topk: int
    rope_dim: int | None


def save_adapter(tensors: Mapping[str, torch.Tensor], config: AdapterConfig, directory: Path) -> None:
    """Write a decoder's `indexer_tensors`, all or nothing."""
    with replacing(directory) as new:
        write_json(new / CONFIG, {"format": _FORMAT, "version": _VERSION, **asdict(config)})
        save_tensors(tensors, new / WEIGHTS)


def indexer_tensors(decoder: Decoder) -> dict[str, torch.Tensor]:
    """The part of `checkpoint_tensors` that an adapter holds."""
    return {name: view for name, view in checkpoint_tensors(decoder).items() if is_indexer(name)}


def is_indexer(name: str) -> bool:
    """Whether an adapter holds the tensor of this checkpoint name."""
    return ".indexer." in name


def read_adapter(directory: Path) -> AdapterConfig:
    """An adapter's config. FileNotFoundError or ValueError where there is none."""
    file = directory / CONFIG
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(raw, Mapping) or raw.get("format") != _FORMAT:
        raise ValueError(f"{file} does not describe a {_FORMAT} adapter")
    if raw.get("version") != _VERSION:
        raise ValueError(f"{file}: version {raw.get('version')!r} is not known (only {_VERSION})")
    values: dict[str, Any] = {key: value for key, value in raw.items() if key not in ("format", "version")}
    names = set(AdapterConfig.__dataclass_fields__)
    if values.keys() != names:
        raise ValueError(f"{file}: expected {', '.join(sorted(names))}; found {', '.join(sorted(values))}")
    for name in ("heads", "head_dim", "topk"):
        if type(values[name]) is not int or values[name] < 1:
            raise ValueError(f"{file}: {name} = {values[name]!r} is not a positive whole number")
    return AdapterConfig(**values)


def with_adapter(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    """The base with the adapter's indexers. ValueError where they do not fit each other."""
    adapter = read_adapter(directory)
    config = with_indexers(
        checkpoint.config,
        heads=adapter.heads,
        head_dim=adapter.head_dim,
        topk=adapter.topk,
        rope_dim=adapter.rope_dim,
    )
    return Checkpoint(config, (*checkpoint.tensors, *safetensors_in(directory / WEIGHTS)))


def check_base(decoder: Decoder, directory: Path) -> None:
    """ValueError unless the adapter was trained on these weights."""
    adapter, found = read_adapter(directory), fingerprint(decoder)
    if adapter.base_fingerprint != found:
        wanted = f"{adapter.base_model} ({adapter.base_fingerprint[:12]})"
        raise ValueError(f"{directory} was trained on {wanted}, not on this model ({found[:12]})")


def fingerprint(decoder: Decoder) -> str:
    """SHA-256 of the model's sizes and of the weights of its norms, rounded to bfloat16.

    Quantised and converted copies of a model share it, for they keep the norms; models of another training do not.
    """
    config = decoder.config
    digest = hashlib.sha256(f"{config.vocab_size} {config.hidden_size} {len(config.layers)}".encode())
    for name, module in decoder.named_modules():
        if isinstance(module, RMSNorm):
            values = module.weight.detach().to("cpu", torch.bfloat16).view(torch.int16)
            digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()
