"""What a run of blocks refuses. What it computes: tests/nn/test_fused.py."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from compiled import each_isa
from torch import Tensor

from foveal.config.model import GQAConfig, Mamba2Config, MoEConfig, RopeConfig, RouterConfig
from foveal.kernels import Contexts, Queries
from foveal.kernels.cpu.block_parts import Layer, Norm
from foveal.kernels.cpu.block_run import BlockRun, block_run
from foveal.kernels.cpu.blocks import MLPBlock, MoEBlock
from foveal.kernels.cpu.mixer_blocks import ConvPart, GQABlock, Mamba2Block
from foveal.kernels.keys import Rows

CONFIG = GQAConfig(heads=2, kv_heads=1, head_dim=4, scale=0.5, rope=RopeConfig(dim=4, theta=1e4))
NORM = Norm(torch.ones(8), 1e-5)
KEYS, VALUES = torch.randn(2, 128, 1, 4)
BLOCK = GQABlock(CONFIG, NORM, Layer(torch.randn(16, 8)), Layer(torch.randn(8, 8)))


def run_of(isa: str) -> BlockRun:
    run = block_run([BLOCK], isa)
    assert run
    return run


def arguments(run: BlockRun, rows: int = 128) -> list[Any]:
    """One token at position 69 of a sequence on pages 1 and 0 of two."""
    places = run.places([(Rows(KEYS[:rows]), Rows(VALUES[:rows]))])
    contexts = Contexts((70,), (-1,), torch.tensor([[1, 0]]))
    turns = [(torch.ones(1, 2, dtype=torch.complex64), None)]
    return [torch.randn(1, 8), turns, places, torch.tensor([5]), Queries((0, 1), (69,)), contexts]


@each_isa
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.randn(1, 7), "the blocks take"),
        (0, torch.randn(1, 8, dtype=torch.float64), "the blocks take"),
        (0, torch.randn(1, 16)[:, ::2], "the blocks take"),
        (1, [(torch.ones(2, 2, dtype=torch.complex64), None)], "turns have shape"),
        (1, [(None, None)], "turns have shape"),
        (3, torch.tensor([128]), "goes to row 128 of a cache of 128"),
        (3, torch.tensor([-1]), "goes to row -1"),
        (3, torch.tensor([1, 2]), "2 rows to keep"),
        (4, Queries((0, 2), (68,)), "1 queries, but their sequences own"),
        (4, Queries((0, 1), (70,)), "only 70 keys"),
        (5, Contexts((70,), (-1,), torch.tensor([[1, 2]])), "names page 2"),
        (5, Contexts((70,), (100,)), "keys past row 128"),
    ],
)
def test_what_does_not_fit_is_refused(isa: str, place: int, value: Any, message: str) -> None:
    """Reading or writing memory that is not the cache's: a crash, or another sequence's keys overwritten."""
    run = run_of(isa)
    call = arguments(run)
    run(*call)
    call[place] = value
    with pytest.raises(ValueError, match=message):
        run(*call)


@each_isa
@pytest.mark.parametrize(
    "part", [torch.randn(64, 2, 4), torch.randn(64, 1, 4).bfloat16(), torch.randn(64, 1, 8)[..., :4]]
)
def test_another_cache_is_refused(isa: str, part: Tensor) -> None:
    """A cache of another model."""
    with pytest.raises(ValueError, match="is not the cache of a block"):
        run_of(isa).places([(Rows(part), Rows(torch.randn(64, 1, 4)))])


@each_isa
@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (torch.tensor([[0], [4], [0]]), "names slot 4 of 4"),
        (torch.tensor([[-1], [0], [0]]), "names slot -1"),
        (torch.tensor([[0, 1], [0, 1], [0, 0]]), "slots"),
        (None, "no slots"),
    ],
)
def test_slots_that_are_not_there_are_refused(isa: str, slots: Tensor | None, message: str) -> None:
    """States read or written beyond their memory."""
    config = Mamba2Config(heads=2, head_dim=4, state=3, groups=1, conv=2)
    projections = Layer(torch.randn(24, 8)), Layer(torch.randn(8, 8))
    conv = ConvPart(torch.randn(14, 1, 2), None, "silu")
    heads = [torch.full((2,), value) for value in (-1.0, 1.0, 0.0)]
    block = Mamba2Block(config, NORM, projections, conv, *heads, out_norm=NORM)
    assert block.fusable and not replace(block, conv=replace(conv, activation="gelu")).fusable
    run = block_run([block], isa)
    assert run
    x, _, _, rows, queries, contexts = arguments(run_of(isa))
    states = torch.zeros(4, 1, 14), torch.zeros(4, 2, 4, 3)
    places = run.places([states])
    assert places
    run(x, [(None, None)], places, rows, queries, contexts, slots_3S=torch.tensor([[3], [0], [0]]))
    with pytest.raises(ValueError, match=message):
        run(x, [(None, None)], places, rows, queries, contexts, slots_3S=slots)
    with pytest.raises(ValueError, match="is not the state of a block"):
        run.places([(torch.zeros(4, 1, 14), torch.zeros(4, 2, 3, 4))])


@each_isa
def test_feed_forwards_alone_need_no_cache(isa: str) -> None:
    """Sequences checked against a cache that the run does not have: other mixers have only those fused."""
    gate_up, down = torch.randn(12, 8), torch.randn(8, 6)
    run = block_run([MLPBlock(NORM, Layer(gate_up), Layer(down), "silu")], isa)
    assert run
    x, _, _, rows, queries, contexts = arguments(run_of(isa))
    gate, up = (torch.nn.functional.rms_norm(x, (8,), NORM.weight_X, NORM.eps) @ gate_up.T).chunk(2, -1)
    expected = x + (torch.nn.functional.silu(gate) * up) @ down.T
    places = run.places([])
    assert places
    assert torch.allclose(run(x, [], places, rows, queries, contexts)[0], expected, atol=1e-4)


def test_what_the_kernels_cannot_read_is_not_fusable() -> None:
    """Weights read as another dtype, or as if they were contiguous."""
    assert BLOCK.fusable
    double = Norm(torch.ones(8, dtype=torch.float64), 1e-5)
    assert not replace(BLOCK, norm=double).fusable
    assert not replace(BLOCK, heads=(NORM, double)).fusable
    assert not replace(BLOCK, out=Layer(torch.randn(8, 8).bfloat16())).fusable
    assert not replace(BLOCK, out=Layer(torch.randn(8, 8).T)).fusable
    assert not replace(BLOCK, sparse=True, config=replace(CONFIG, window=5)).fusable
    assert not replace(BLOCK, out=Layer(torch.randn(8, 8), torch.randn(8).bfloat16())).fusable
    router = RouterConfig("softmax", normalise=True, groups=2)
    mixture = MoEBlock(
        MoEConfig(4, 2, 6, router),
        NORM,
        Layer(torch.randn(4, 8)),
        None,
        torch.randn(4, 12, 8),
        torch.randn(4, 8, 6),
        None,
        None,
    )
    assert mixture.fusable
    for wrong in (replace(router, groups_kept=3), replace(router, groups=3)):
        assert not replace(mixture, config=replace(mixture.config, router=wrong)).fusable
    feed_forward = MLPBlock(NORM, Layer(torch.randn(12, 8)), Layer(torch.randn(8, 6)), "silu")
    assert feed_forward.fusable and not replace(feed_forward, activation="gelu").fusable
