"""Checkpoints of a run: complete or not there at all, and readable under another number of processes."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from foveal.models.save import write_json
from foveal.train.parallel import Parallel

_PROGRESS = "progress.json"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in one folder: step-00000100/ and so on, by the number of updates of the whole run."""

    folder: Path
    keep: int
    parallel: Parallel = field(default_factory=Parallel)

    def save(self, update: int, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Write one, and delete the oldest. OSError where that fails; the others are then untouched.

        Called by all processes; each writes its parts of the tensors.
        """
        target = self.folder / f"step-{update:08d}"
        try:
            with self.parallel.replacing(target) as new:
                save(dict(tensors), checkpoint_id=new / "tensors", no_dist=self.parallel.ranks == 1)
                if self.parallel.leads:
                    write_json(new / _PROGRESS, progress)
        except CheckpointException as error:
            causes = [str(failure[0]) for failure in error.failures.values()]
            raise OSError(f"{target} could not be written: {'; '.join(causes)}") from None
        if self.parallel.leads:
            for old in self._complete()[: -self.keep]:
                shutil.rmtree(old)

    def last(self) -> Path | None:
        """The newest one."""
        complete = self._complete()
        return complete[-1] if complete else None

    def _complete(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if (path / _PROGRESS).is_file())


def progress_of(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as progress."""
    progress: dict[str, Any] = json.loads((checkpoint / _PROGRESS).read_text(encoding="utf-8"))
    return progress


def fill_from(checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite tensors with those of the checkpoint, whoever wrote it: each process reads the parts that it has.
    ValueError where it does not hold them."""
    try:
        load(dict(tensors), checkpoint_id=checkpoint / "tensors", no_dist=True)
    except (CheckpointException, RuntimeError, ValueError) as error:
        raise ValueError(f"{checkpoint} does not fit this recipe: {str(error).splitlines()[0]}") from None
