"""From config.json to `ModelConfig`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foveal.config.families import FAMILIES
from foveal.config.families.common import WeightNames
from foveal.config.fields import Fields
from foveal.config.model import ModelConfig

_LONGEST = 64 << 20
"""Bytes; weights that are given for a config would be read whole, and then refused."""


def read_config(source: str | Path | Mapping[str, Any]) -> ModelConfig:
    """Read a config.json (file, directory that holds one, or its parsed content).

    Raises ValueError for an unknown `model_type` or a field that changes results and is not supported, and
    FileNotFoundError where there is no such file.
    """
    raw = source if isinstance(source, Mapping) else _parse(Path(source))
    fields = Fields(raw)
    if "model_type" not in raw:
        raise ValueError("config.json lacks 'model_type', which says how to read the rest")
    family = FAMILIES.get(fields.family)
    if family is None:
        raise ValueError(f"model_type {fields.family!r} is not supported (only {', '.join(FAMILIES)})")
    config: ModelConfig = family.read(fields)
    return config


def weight_names(family: str) -> WeightNames:
    """The checkpoint names of a family."""
    names: WeightNames = FAMILIES[family].NAMES
    return names


def _parse(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    with file.open("rb") as stream:  # also a pipe, whose size nobody knows
        content = stream.read(_LONGEST + 1)
    if len(content) > _LONGEST:
        raise ValueError(f"{file} is larger than {_LONGEST >> 20} MiB: no config.json is")
    try:
        raw = json.loads(content.decode("utf-8"))
    except ValueError as error:  # also where it is not UTF-8
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply to be a config") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    return raw
