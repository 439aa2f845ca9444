"""Several processes on one machine, as torchrun would start them, over gloo."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from foveal.config import read_config
from foveal.config.indexers import with_indexers
from foveal.models.decoder import Decoder, Options
from foveal.nn.batch import Batch
from foveal.train.checkpoints import Checkpoints, fill_from
from foveal.train.initial import initialise
from foveal.train.learner import Learner
from foveal.train.losses import IndexLoss
from foveal.train.parallel import join
from foveal.train.parts import whole_tensor
from foveal.train.schema import ParallelSettings, Recipe
from foveal.train.trainer import Trainer


def together(ranks: int, work: Callable[..., None], *args: Any, seconds: float = 400) -> None:
    """work(*args) in several processes; whatever one raises is raised here. They are ended after some seconds."""
    # Each process comes from a server that has imported everything, and has no threads yet.
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["processes"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.start_processes(
        _one, (ranks, port, work, args), nprocs=ranks, join=False, start_method="forkserver"
    )
    assert context is not None
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"{ranks} processes were not done after {seconds} s"
    finally:
        for process in context.processes:
            process.kill()


def _one(rank: int, ranks: int, port: int, work: Callable[..., None], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(ranks))
    work(*args)


class Stopped(Exception):
    """A run that was stopped on purpose."""


def train(recipe: Recipe, stop_after: int | None = None) -> None:
    """Train; stop once the checkpoint after so many updates is written."""
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, update: int, *args: Any) -> None:
        save(self, update, *args)
        if update == stop_after:
            raise Stopped

    Checkpoints.save = save_and_stop  # type: ignore[method-assign]
    parallel = join(recipe.parallel)
    try:
        Trainer(recipe, parallel).train()
    except Stopped:
        pass
    finally:
        Checkpoints.save = save  # type: ignore[method-assign]
        parallel.leave()


def read_state(recipe: Recipe, stage: int, file: Path) -> None:
    """Load the last checkpoint, of a run that is somewhere in a stage, and write all its tensors, whole, to a file."""
    parallel = join(recipe.parallel)
    try:
        trainer = Trainer(recipe, parallel)
        learner = Learner(trainer.decoder, recipe.stages[stage], parallel)
        tensors = {f"model.{name}": p.detach() for name, p in trainer.decoder.named_parameters()} | learner.tensors()
        last = Checkpoints(recipe.run.output / "checkpoints", 1).last()
        assert last is not None
        fill_from(last, tensors)
        whole = {name: whole_tensor(tensor).clone() for name, tensor in tensors.items()}
        if parallel.leads:
            torch.save(whole, file)
    finally:
        parallel.leave()


def exact_decoder(config: dict[str, Any], indexer: dict[str, Any] | None, again: bool) -> Decoder:
    """Random weights in float64; indexers for a model that has none; whether layers are computed again in backward."""
    read = read_config(config)
    options = Options(torch.float64, index_dtype="auto", checkpoint_activations=again)
    decoder = Decoder(read if indexer is None else with_indexers(read, **indexer), options)
    initialise(decoder, 0)
    return decoder


def context_gradients(settings: ParallelSettings, make: tuple[Any, ...], lengths: list[int], dense: bool) -> None:
    """Compare a packed batch whose tokens are spread over all processes with the same in one: hidden states and
    gradients, of a loss on them and of the indexers' loss."""
    parallel = join(settings)
    try:
        generator = torch.Generator().manual_seed(1)
        decoder = exact_decoder(*make)
        vocabulary = decoder.config.vocab_size
        batch = Batch.packed([torch.randint(vocabulary, (n,), generator=generator) for n in lengths], dense=dense)
        own, rows_t = parallel.share(batch)
        assert parallel.contexts == 1 or len(own.ids_T) < len(batch.ids_T)
        upstream_TD = torch.randn(len(batch.ids_T), decoder.config.hidden_size, generator=generator).double()
        results = []
        for part, rows in ((batch, torch.arange(len(batch.ids_T))), (own, rows_t)):
            decoder.zero_grad()
            watch = IndexLoss(torch.arange(1.0, len(batch.ids_T) + 1)[rows].double())
            x_TD, _ = decoder.trunk(part, watch=watch)
            ((x_TD * upstream_TD[rows]).sum() + watch.total).backward()
            results.append((x_TD.detach(), {name: p.grad for name, p in decoder.named_parameters()}))
        (all_TD, wanted), (own_TD, gradients) = results
        torch.testing.assert_close(own_TD, all_TD[rows_t], rtol=1e-9, atol=1e-9)
        for name, gradient in wanted.items():
            if gradient is not None:
                mine = gradients[name]
                total = parallel.total(torch.zeros_like(gradient) if mine is None else mine)
                # Some of an indexer is always float32.
                tolerance = 1e-5 if ".indexer." in name else 1e-9
                error = float((total - gradient).abs().max() / gradient.abs().max())
                assert error < tolerance, f"{name}: {error}"
    finally:
        parallel.leave()
