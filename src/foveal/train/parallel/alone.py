"""What a run asks about the processes that share it, and what the only one answers."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from foveal.models.decoder import Decoder
from foveal.models.save import replacing
from foveal.nn.batch import Batch
from foveal.train.optim import Directions, whole_directions

Result = TypeVar("Result")


class Parallel:
    """One process that does everything: nothing is sharded, sent or waited for.

    Other processes' answers are in `foveal.train.parallel.together`. Where nothing else is said, all processes ask the
    same in the same order.
    """

    leads = True
    """Whether this process writes and reports."""
    ranks = 1
    """Processes."""
    data_rank, data_ranks = 0, 1
    """Which part of a step's rows this process computes, of how many."""
    contexts = 1
    """Processes over which the tokens of each row are spread."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """`device`: where this process has its part of the model, and computes."""
        self.device = torch.device(device)

    def shard(self, decoder: Decoder) -> None:
        """Leave each process its part of the weights, on its device."""
        decoder.to(self.device)

    def forward(self, run: Callable[[], Result]) -> Result:
        """run(), during which the weights of the module that computes are whole; backward may follow."""
        return run()

    def total(self, values: Tensor) -> Tensor:
        """Sum over all processes."""
        return values

    def total_of_data(self, values: Tensor) -> Tensor:
        """Sum over the data ranks of what the processes of each know alike."""
        return values

    def first(self, values: Tensor) -> Tensor:
        """What the leading process has."""
        return values

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each, whether some process says so."""
        return flags

    def share(self, batch: Batch) -> tuple[Batch, Tensor | slice]:
        """This process's part of the tokens of whole sequences, and its rows."""
        return batch, slice(None)

    def whole(self, batch: Batch, values_TX: Tensor) -> Tensor:
        """Something of each token of a batch that `share` made, of all tokens of the sequences; differentiable."""
        return values_TX

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """The norm of all gradients together, which become no longer than `limit`."""
        return nn.utils.clip_grad_norm_(parameters, limit)

    def directions(self, shapes: Mapping[Tensor, torch.Size]) -> Directions:
        """How Muon finds directions of matrices; `shapes`: of the whole matrices, by this process's parts."""
        return whole_directions

    def gathered(self, decoder: Decoder) -> Decoder:
        """The model in one piece, for the leading process alone."""
        return decoder

    def replacing(self, directory: Path) -> AbstractContextManager[Path]:
        """See `foveal.models.save.replacing`: one new directory, in which all processes may write."""
        return replacing(directory)

    def leader_first(self) -> AbstractContextManager[None]:
        """What the leading process (of each machine) does before all others."""
        return _at_once()

    def leave(self) -> None:
        """End the work with the others."""


class _at_once(AbstractContextManager[None]):
    def __exit__(self, *exception: object) -> None: ...
