"""Tiny recipes: a two-layer sparse model, a made-up text."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import CONFIG

from foveal.train.recipe import read_recipe
from foveal.train.schema import Recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """Writes and reads a recipe: recipe(stages, model=..., **run)."""
    words = [f"{a}{b}" for a in ("ta", "ki", "so", "mu", "re") for b in ("n", "lo", "pi", "")]
    chosen = random.Random(0)
    documents = [" ".join(chosen.choices(words, k=120)) for _ in range(40)]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def make(stages: str, model: str = 'config = "config.json"', overrides: tuple[str, ...] = (), **run: Any) -> Recipe:
        settings = {"output": "run", "evaluate_tokens": 128} | run
        lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
        tokenizer = "[data.tokenizer]\nvocab_size = 320\n" if model.startswith("config") else ""
        (tmp_path / "recipe.toml").write_text(
            f'[model]\n{model}\n[data]\ncache = "cache"\nheld_out = 0.1\n{tokenizer}'
            f'[[data.text]]\nfiles = ["text.txt"]\n{stages}\n[run]\n{lines}\n'
        )
        return read_recipe(tmp_path / "recipe.toml", Recipe, overrides)

    return make
