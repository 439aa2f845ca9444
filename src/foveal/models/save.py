"""Writing models: a standard Hugging Face directory under the family's own names."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)


def save_model(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype, directory: Path, tokenizer: Path
) -> None:
    """Write config.json, model.safetensors and the tokenizer's files, all or nothing.

    `tensors`: by checkpoint name. `config`: what config.json shall hold, besides the dtype. `tokenizer`: the directory
    to copy the tokenizer from. OSError where it cannot be written; what stood in `directory` before is then untouched.
    """
    with replacing(directory) as new:
        write_json(new / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})
        save_tensors(tensors, new / "model.safetensors")
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copy(tokenizer / name, new / name)


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors, views of larger ones as well, to a safetensors file."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object for people and programs."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A new directory to write in, which takes the place of `directory` once everything in it is on disk."""
    new, old = new_beside(directory), directory.with_name(f".{directory.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for file in new.rglob("*"):
            _flush(file)
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)
            directory.rename(old)
        new.rename(directory)
        _flush(directory.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def new_beside(directory: Path) -> Path:
    """Where `replacing` has people write."""
    return directory.with_name(f".{directory.name}.new")


def _flush(path: Path) -> None:
    """Have the system write a file or a directory's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
