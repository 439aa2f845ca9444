"""Which operations have Triton versions, what these take, and that nobody pays for them who has no GPU."""

import subprocess
import sys

import pytest
import torch

from foveal import kernels
from foveal.kernels import Columns, Contexts, KeySource, OneHead, Queries, Rows
from foveal.kernels.gpu.attention import _accepts_dense, _accepts_sparse
from foveal.kernels.gpu.selection import _accepts
from foveal.kernels.gpu.training import _accepts_divergence
from foveal.kernels.records import IndexKeyRecords, LatentRecords

_OPERATIONS = {
    *("attention", "flash_forward", "sparse_attention", "select", "quantise_index", "write_index_keys"),
    *("write_latents", "experts", "sparse_gradients", "index_divergence"),
}


def test_the_preferred_versions_on_cuda() -> None:
    """A version that is registered before another, so that it never runs; one that would run on the CPU."""
    chosen = {operation.name: operation.chosen("cuda") for operation in kernels.operations()}
    assert {name for name, version in chosen.items() if version == "triton"} == _OPERATIONS
    assert all(operation.chosen("cpu") != "triton" for operation in kernels.operations())
    learning = {"attention": "recomputed", "sparse_attention": "recomputed", "experts": "grouped"}
    learning |= {"index_divergence": "triton"}
    known = {operation.name: operation for operation in kernels.operations()}
    assert {name: known[name].chosen("cuda", gradients=True) for name in learning} == learning


def test_a_forced_version_says_where_it_runs() -> None:
    """Running the interpreter by accident, a thousand times slower than torch."""
    with pytest.raises(ValueError, match="'triton' does not run on cpu"):
        kernels.quantise_index(torch.zeros(1, 4), "fp8", version="triton")


def test_importing_foveal_does_not_import_triton() -> None:
    """A second at the start of every command, on machines that never use it."""
    code = "import sys, foveal.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_is_left_to_torch() -> None:
    """Arguments that the kernels would read wrongly."""
    contexts, queries = Contexts.packed([4]), Queries((0, 1), (3,))
    q, selection = torch.zeros(1, 2, 6), torch.zeros(1, 1, dtype=torch.int32)

    def accepts_loss(heads: int, selection: torch.Tensor | None) -> bool:
        sources = KeySource(Rows(torch.zeros(4, 128)), contexts), q, KeySource(Rows(torch.zeros(4, 1, 6)), contexts)
        learned = torch.zeros(1, heads, 128), torch.zeros(1, heads)
        return _accepts_divergence(*learned, *sources, queries, torch.ones(1), scale=1.0, selection_TK=selection)

    def latents(records: object, rank: int = 4) -> tuple[KeySource, KeySource]:
        keys = KeySource(OneHead(records), contexts)
        return keys, KeySource(Columns(keys.records, rank), contexts)

    rows = latents(Rows(torch.zeros(4, 6)))
    assert _accepts_dense(q, *rows, queries, scale=1.0) and _accepts_sparse(q, *rows, selection, queries, scale=1.0)
    assert not _accepts_dense(q, *rows, queries, scale=1.0, window=3)
    assert not _accepts_dense(q, *rows, queries, scale=1.0, selection_TK=selection)
    assert not _accepts_dense(q.double(), *rows, queries, scale=1.0)
    assert not _accepts_dense(q, *latents(Rows(torch.zeros(4, 6, requires_grad=True))), queries, scale=1.0)
    assert not _accepts_sparse(q, *rows, selection.long(), queries, scale=1.0)
    k, v = torch.zeros(4, 1, 6), torch.zeros(4, 1, 3)

    def takes(k: torch.Tensor, v: torch.Tensor) -> bool:
        return _accepts_sparse(q, *(KeySource(Rows(x), contexts) for x in (k, v)), selection, queries, scale=1.0)

    assert takes(k, v) and takes(k, v.transpose(0, 2).contiguous().transpose(0, 2))
    assert not takes(k, v.bfloat16())
    assert not takes(k, torch.zeros(4, 1, 513))
    assert not takes(k.clone().requires_grad_(), v)
    apart = KeySource(Rows(k), contexts), KeySource(Rows(v), Contexts.packed([4]))
    assert not _accepts_sparse(q, *apart, selection, queries, scale=1.0)
    # Records whose scales are not where a float32 can be read.
    records = LatentRecords(torch.zeros(4, 13, dtype=torch.uint8), 5, torch.float32)
    assert not _accepts_dense(torch.zeros(1, 2, 7), *latents(records, 5), queries, scale=1.0)
    assert accepts_loss(16, None) and accepts_loss(64, selection)
    assert not accepts_loss(128, selection)
    keys = KeySource(IndexKeyRecords(torch.zeros(1, 64 * 8, dtype=torch.uint8), 4, "int8"), contexts)
    weights = torch.zeros(1, 2)
    assert _accepts(torch.zeros(1, 2, 4, dtype=torch.int8), weights, keys, queries, topk=2)
    assert not _accepts(torch.zeros(1, 2, 4), weights, keys, queries, topk=2)
    assert not _accepts(torch.zeros(1, 2, 4, dtype=torch.int8), weights.double(), keys, queries, topk=2)
