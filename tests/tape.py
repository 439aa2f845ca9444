"""A CUDA graph on the CPU: what a function did is done again on the same tensors, without its Python."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foveal.engine.graphs import Work
from foveal.kernels import operations
from foveal.kernels.gpu.launch import Launch


class Tape(TorchDispatchMode):
    """Keeps every operation and launch with its tensors. Numbers that the function took from the host stay as they
    were, as on a card."""

    def __init__(self) -> None:
        super().__init__()
        self._entries: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        known = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        new = [x for x in outputs if _storage(x) not in known]
        self._made += new
        if func._schema.is_mutable or (new and "empty" not in func.overloadpacket.__name__):
            self._entries.append((func, args, kwargs, new))
        return result

    def launched(self, run: Callable[[Launch], None], launch: Launch) -> None:
        """Keep a launch, and how to run it."""
        self._entries.append((run, (launch,), {}, []))

    def replay(self) -> None:
        """Everything again; what the function made holds NaN before it is made again."""
        for x in self._made:
            if x.is_floating_point() and x.element_size() > 1:
                x.fill_(torch.nan)
        for func, args, kwargs, made in self._entries:
            results = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for old, new in zip(made, results, strict=bool(made)):
                old.copy_(new)


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class TapeCapture:
    """`Capture` by tapes, of what a card would run."""

    def __init__(self) -> None:
        self.captured, self.replayed = 0, 0

    def __call__(self, work: Work) -> Work:
        """See `Capture`."""
        tape = Tape()
        with _versions_of_a_card():
            work()
            with tape, _recorded(tape):
                result = work()
        self.captured += 1

        def replay() -> Tensor:
            self.replayed += 1
            tape.replay()
            return result

        return replay


@contextmanager
def _versions_of_a_card() -> Iterator[None]:
    """Of every operation the version that a card would get, Triton's by its interpreter; none for the CPU alone."""
    known = {operation: operation._preferred for operation in operations()}
    for operation, versions in known.items():
        found = (replace(version, devices=("cpu", "cuda")) for version in versions if "cuda" in version.devices)
        operation._preferred = tuple(found)
    try:
        yield
    finally:
        for operation, versions in known.items():
            operation._preferred = versions


@contextmanager
def _recorded(tape: Tape) -> Iterator[None]:
    """Launches are kept, and run."""

    before = Launch.run

    def run(launch: Launch) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            before(launch)
        tape.launched(before, launch)

    Launch.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        Launch.run = before  # type: ignore[method-assign]
