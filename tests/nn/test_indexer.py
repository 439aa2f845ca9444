"""The indexer, from hidden states to scores, against the formulas of DeepSeek's release in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from transcription import INDEX_VECTORS

from foveal.config.model import IndexerConfig, RopeConfig
from foveal.kernels.selection import index_scores
from foveal.nn.batch import Batch
from foveal.nn.indexer import Indexer
from foveal.nn.step import Step

HIDDEN, LATENT, TOKENS = 48, 40, 60


def indexer(heads: int, head_dim: int, stored: str, *, interleaved: bool) -> Indexer:
    rope = RopeConfig(dim=16, theta=10000.0, interleaved=interleaved)
    config = IndexerConfig(heads, head_dim, topk=8, query_dim=LATENT, rope=rope)
    module = Indexer(config, HIDDEN, torch.float32, stored).requires_grad_(False)
    for weight in module.parameters():
        weight.copy_(torch.randn(weight.shape) * weight.shape[-1] ** -0.5)
    return module


def turned(x: Tensor, *, interleaved: bool) -> Tensor:
    """Rope on the first 16 dimensions of [T, ..., J], written out pair by pair."""
    out, half = x.double().clone(), 8
    for t in range(len(x)):
        for i in range(half):
            angle = torch.tensor(t * 10000.0 ** (-2 * i / 16), dtype=torch.float64)
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            first, second = x[t, ..., a].double(), x[t, ..., b].double()
            out[t, ..., a] = first * angle.cos() - second * angle.sin()
            out[t, ..., b] = second * angle.cos() + first * angle.sin()
    return out


@pytest.mark.parametrize("stored", ["fp8", "int8"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "head_dim"), [(16, 32), (4, 128)])
def test_scores(heads: int, head_dim: int, interleaved: bool, stored: str) -> None:
    """Any slip on the way: rope first or last, its pairs, the key norm's kind or epsilon, a scale left out, the order
    of ReLU, head weights and scales."""
    module = indexer(heads, head_dim, stored, interleaved=interleaved)
    x, latent = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, LATENT)
    step = Step(Batch.packed([torch.zeros(TOKENS, dtype=torch.int64)]))
    keys = module._keys(x, step, None).context(0, 0, TOKENS)
    result = index_scores(*module.query(x, latent, step.turns(module.config.rope)), keys)

    q = (latent.double() @ module.wq_b.weight.double().T).view(TOKENS, heads, head_dim)
    k = x.double() @ module.wk.weight.double().T
    k = layer_norm(k, (head_dim,), module.k_norm.weight.double(), module.k_norm.bias.double(), 1e-6)
    q, k = (INDEX_VECTORS[stored](turned(part, interleaved=interleaved).float()) for part in (q, k))
    weights = x.double() @ module.weights_proj.weight.double().T * heads**-0.5 * head_dim**-0.5
    expected = torch.einsum("ti,tin->tn", weights, torch.relu(torch.einsum("tij,nj->tin", q, k)))
    # A number on the edge between two rounded values may fall to either side in float32; hardly any does.
    far = ((result - expected).abs() > 1e-5 * expected.abs().max()).double().mean()
    assert far < 0.1
    assert (result - expected).norm() < 2e-3 * expected.norm()
