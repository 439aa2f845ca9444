"""Streaming attention against the paper's own words in float64: what was evicted is gone, and keys are turned by their
positions in the cache."""

import pytest
import torch
from packing import CASES, close, make_queries, source
from torch import Tensor

from foveal.kernels import Queries, streaming_attention

REACHES = [(4, 17), (1, 1), (0, 9), (12, 30), (66, 3), (3, 64), (2, 500)]  # (sinks, window)


def turned(x_NHP: Tensor, positions_N: Tensor) -> Tensor:
    """Rope in float64."""
    angles_N1R = positions_N[:, None, None] * 100.0 ** -torch.linspace(0, 1, x_NHP.shape[-1] // 2, dtype=torch.float64)
    pairs_NHR = torch.complex(*x_NHP.chunk(2, -1)) * torch.polar(torch.ones_like(angles_N1R), angles_N1R)
    return torch.cat((pairs_NHR.real, pairs_NHR.imag), -1)


def as_written(q_NHP: Tensor, k_NGP: Tensor, v_NGV: Tensor, count: int, sinks: int, window: int) -> Tensor:
    """The last `count` queries of one sequence, none of it turned yet."""
    rows, group = [], q_NHP.shape[1] // k_NGP.shape[1]
    for t in range(len(k_NGP) - count, len(k_NGP)):
        kept = torch.tensor([j for j in range(t + 1) if j < sinks or j > t - window])
        k_nGP = turned(k_NGP[kept], torch.arange(len(kept)))
        q_1HP = turned(q_NHP[t - len(k_NGP)][None], torch.tensor([len(kept) - 1]))
        scores_Hn = torch.einsum("hp,nhp->hn", q_1HP[0], k_nGP.repeat_interleave(group, 1)) * 0.3
        rows.append(torch.einsum("hn,nhv->hv", scores_Hn.softmax(1), v_NGV[kept].repeat_interleave(group, 1)))
    return torch.stack(rows)


def turned_queries(q_THP: Tensor, queries: Queries, most: int | None = None) -> Tensor:
    positions = [torch.arange(first, first + count) for _, count, first in queries]
    return turned(q_THP, torch.cat(positions).clamp_max(2**31 if most is None else most))


def inputs(case: str) -> tuple[Tensor, list[Tensor], list[Tensor], Queries]:
    counts, lengths = CASES[case]
    keys = [torch.randn(n, 2, 8, dtype=torch.float64) for n in lengths]
    values = [torch.randn(n, 2, 5, dtype=torch.float64) for n in lengths]
    return torch.randn(sum(counts), 6, 8, dtype=torch.float64), keys, values, make_queries(counts, lengths)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("sinks", "window"), REACHES)
def test_streaming_attention(case: str, sinks: int, window: int) -> None:
    """A wrong distance to sinks, an edge off by one, a sink counted twice while the window covers it, or missed."""
    q, keys, values, queries = inputs(case)
    parts = q.split(list(queries.lengths))
    expected = torch.cat(
        [as_written(*one, len(one[0]), sinks, window) for one in zip(parts, keys, values, strict=True)]
    )
    stored = [turned(k, torch.arange(len(k))) for k in keys]
    both = turned_queries(q, queries), turned_queries(q, queries, sinks + window - 1)
    options = {"scale": 0.3, "window": window, "sinks": sinks}
    for version, paged in (("reference", False), ("torch", False), ("torch", True), ("flash", False), ("flash", True)):
        sources = source(stored, paged), source(values, paged)
        close(streaming_attention(*both, *sources, queries, **options, version=version), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_narrow_numbers(case: str, paged: bool, dtype: torch.dtype) -> None:
    """Sums in half precision, or two softmaxes that are merged by a rounded log-sum-exp."""
    q, keys, values, queries = inputs(case)
    q, sink_q = q.to(dtype), torch.randn(q.shape).to(dtype)
    k, v = ([x.to(dtype) for x in several] for several in (keys, values))
    options = {"scale": 0.3, "window": 33, "sinks": 5}
    wide = (source([x.double() for x in several], False) for several in (k, v))
    expected = streaming_attention(q.double(), sink_q.double(), *wide, queries, **options, version="reference")
    for version in ("torch", "flash"):
        stored = source(k, paged), source(v, paged)
        close(streaming_attention(q, sink_q, *stored, queries, **options, version=version), expected)


@pytest.mark.parametrize(("sinks", "window"), [(2, 5), (0, 3), (4, 1)])
def test_gradients(sinks: int, window: int) -> None:
    """A gradient that does not reach sinks, or one of the two queries."""
    counts, lengths = [2, 7], [9, 7]
    queries = make_queries(counts, lengths)
    shapes = ((9, 2, 2), (9, 2, 2), (16, 1, 2), (16, 1, 3))
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(q: Tensor, sink_q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        stored = (source(list(x.split(lengths)), False) for x in (k, v))
        return streaming_attention(q, sink_q, *stored, queries, scale=0.3, window=window, sinks=sinks, version="torch")

    assert torch.autograd.gradcheck(run, tensors)


def test_gradients_choose_a_version_that_has_them() -> None:
    """Dispatch to the merged version, which has none."""
    q, keys, values, queries = inputs("prefill")
    stored = source(keys, False), source(values, False)
    options = {"scale": 0.3, "window": 8, "sinks": 2}
    assert streaming_attention(q.requires_grad_(), q, *stored, queries, **options).requires_grad
    assert streaming_attention.chosen() == "flash"
    assert streaming_attention.chosen(gradients=True) == "torch"
