"""This process's part of a tensor that several may share."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def own_part(tensor: Tensor) -> Tensor:
    """The part in this process's memory, not a copy; a tensor that nobody shares itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_part_of(part: Tensor, whole: Tensor) -> Tensor:
    """A tensor cut like `whole`, of which this process has `part`; a part of another shape (a scalar) as it is."""
    if not isinstance(whole, DTensor) or part.shape != whole.to_local().shape:
        return part
    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def whole_tensor(tensor: Tensor) -> Tensor:
    """All parts together. Asked by all processes that have one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
