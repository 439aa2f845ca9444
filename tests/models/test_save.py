"""Writing models."""

from pathlib import Path

import pytest
import torch

from foveal.models.save import save_tensors


def test_what_cannot_be_written(tmp_path: Path) -> None:
    """safetensors' own kind of error (of a full disk, say), which commands show as a traceback."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="could not be written"):
        save_tensors({"a": torch.ones(4)}, tmp_path / "file" / "model.safetensors")
