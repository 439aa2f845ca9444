"""The sizes of well-known models, so that a plan needs no download: what of each release's config.json says what it
computes. The tests hold them against the parameter counts that the makers state."""

import json
from importlib.resources import files
from typing import Any

_FOLDER = files("foveal.config") / "facts"


def released_names() -> list[str]:
    """The names that `released` knows, in alphabetical order."""
    return sorted(file.name.removesuffix(".json") for file in _FOLDER.iterdir() if file.name.endswith(".json"))


def released(name: str) -> dict[str, Any]:
    """The config.json fields of a released model that say what it computes (`_source`: where they are from).

    Raises ValueError for a name that is not known.
    """
    if name not in released_names():
        raise ValueError(f"no built-in model {name!r} (only {', '.join(released_names())})")
    facts: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return facts
