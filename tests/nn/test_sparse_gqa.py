"""Indexers beside grouped-query attention: one selection a token for all heads, packed and through the cache."""

from pathlib import Path

import pytest
import torch
from oracle import make_oracle
from tiny import sparse_decoder

from foveal.cache.store import CacheStore, plan_cache
from foveal.config import read_config
from foveal.config.indexers import with_indexers
from foveal.kernels import index_divergence
from foveal.models.decoder import Decoder, Options
from foveal.models.names import checkpoint_tensors
from foveal.nn.batch import Batch
from foveal.nn.watch import Sight
from foveal.train.initial import initialise, initialise_indexers


def sparse_llama(folder: Path, topk: int, dtype: torch.dtype = torch.float64) -> Decoder:
    """A random llama (4 heads, 2 groups) with random indexers."""
    oracle = make_oracle("llama", folder)
    config = with_indexers(read_config(folder), heads=16, head_dim=16, topk=topk)
    decoder = Decoder(config, Options(dtype, index_dtype="auto"))
    initialise_indexers(decoder, 0)
    views = checkpoint_tensors(decoder)
    for name, tensor in oracle.state_dict().items():
        if name in views:
            views[name].copy_(tensor)
    return decoder.eval().requires_grad_(False)


def test_equals_a_mask(tmp_path: Path) -> None:
    """Sparse attention that reads other rows than the selection names: against dense attention that hides the rest."""
    decoder = sparse_llama(tmp_path, topk=6)
    ids = [torch.randint(128, (n,)) for n in (40, 5, 23)]
    batch = Batch.packed(ids, collect=frozenset({"selection"}))
    sparse, collected = decoder.trunk(batch)
    chosen = [[selection[row].tolist() for row in range(68)] for selection in collected["selection"]]
    hidden = torch.ones(68, 68, dtype=torch.bool)
    x = decoder.embed_tokens(batch.ids_T)
    starts = [0] * 40 + [40] * 5 + [45] * 23
    for layer, selection in zip(decoder.layers, chosen, strict=True):
        hidden = torch.ones(68, 68, dtype=torch.bool)
        for row, places in enumerate(selection):
            hidden[row, [starts[row] + place for place in places if place >= 0]] = False
        x = masked_layer(layer, x, batch, hidden)
    torch.testing.assert_close(sparse, x, rtol=1e-9, atol=1e-9)


def masked_layer(layer: torch.nn.Module, x: torch.Tensor, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
    from foveal.kernels import apply_rope
    from foveal.nn.rope import rope_turns

    mixer, mlp = layer.blocks
    gqa = mixer.operation
    h = mixer.norm(x)
    q, k, v = gqa.qkv_proj(h).unflatten(-1, (-1, gqa.config.head_dim)).split([4, 2, 2], 1)
    turns = rope_turns(gqa.config.rope, batch.positions_T, None)
    q, k = apply_rope(q, turns, interleaved=False), apply_rope(k, turns, interleaved=False)
    scores = torch.einsum("thp,nhp->htn", q, k.repeat_interleave(2, 1)) * gqa.config.scale
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    out = torch.einsum("htn,nhp->thp", weights, v.repeat_interleave(2, 1)).flatten(1)
    x = x + gqa.o_proj(out)
    return x + mlp.operation(mlp.norm(x))


def test_paged_equals_packed(tmp_path: Path) -> None:
    """Chunks and single tokens through the cache, beside a sequence that is still shorter than top-k."""
    decoder = sparse_llama(tmp_path, topk=16)
    long, short = torch.randint(128, (70,)), torch.randint(128, (9,))
    expected = decoder.step(Batch.packed([long, short])).logits_LV
    store = CacheStore(plan_cache(decoder.config, torch.float64), 8, 0)
    first = Batch.paged([long[:30].tolist(), short.tolist()], [0, 0], [[3, 5], [2]])
    both = decoder.step(first, store).logits_LV
    parts = [both[:30]]
    for start, stop in ((30, 66), (66, 67), (67, 70)):
        batch = Batch.paged([long[start:stop].tolist()], [start], [[3, 5]])
        parts.append(decoder.step(batch, store).logits_LV)
    torch.testing.assert_close(torch.cat((*parts, both[30:])), expected, rtol=1e-6, atol=1e-6)


def test_dense_batches(tmp_path: Path) -> None:
    """`dense` that still selects, or a model whose indexers change what it computes when nothing is left out."""
    sparse, wide = sparse_llama(tmp_path, topk=6), sparse_llama(tmp_path, topk=64)
    ids = [torch.randint(128, (40,))]
    dense = sparse.step(Batch.packed(ids, dense=True)).logits_LV
    torch.testing.assert_close(dense, wide.step(Batch.packed(ids)).logits_LV, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(dense, sparse.step(Batch.packed(ids)).logits_LV, atol=1e-3)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("kind", ["latent", "grouped"])
def test_watch(kind: str, dense: bool, tmp_path: Path) -> None:
    """What a watch is shown must be what was computed: scores that select the selection, the same with a cache."""
    decoder = sparse_decoder(torch.float64).requires_grad_(False) if kind == "latent" else sparse_llama(tmp_path, 6)
    ids = torch.randint(120, (50,))
    packed: list[Sight] = []
    decoder.trunk(Batch.packed([ids], dense=dense), watch=packed.append)
    store = CacheStore(plan_cache(decoder.config, torch.float64), 3, 0)
    paged: list[Sight] = []
    tokens = Batch(**{**vars(Batch.paged([ids.tolist()], [0], [[1]])), "dense": dense})
    decoder.trunk(tokens, store, watch=paged.append)
    assert len(packed) == len(paged) == len(decoder.layers)
    for one, other in zip(packed, paged, strict=True):
        for a, b in ((one.gaze, other.gaze), (one.glance, other.glance)):
            torch.testing.assert_close(a.keys.context(0, 0, 50), b.keys.context(0, 0, 50), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one.gaze.q_THP, other.gaze.q_THP, rtol=1e-6, atol=1e-6)
        assert (one.selection_TK is None) == dense
        weights = torch.ones(50, dtype=torch.float64)
        _, divergence = index_divergence(
            *(one.glance.q_TIJ, one.glance.weights_TI, one.glance.keys, one.gaze.q_THP, one.gaze.keys, one.queries),
            weights,
            scale=one.gaze.scale,
            selection_TK=one.selection_TK,
        )
        assert (divergence >= -1e-9).all() and divergence.max() > 0
        if one.selection_TK is None:
            continue
        scores = torch.einsum(
            "tij,nj->tin", one.glance.q_TIJ.double(), one.glance.keys.context(0, 0, 50).double()
        ).relu()
        scores = torch.einsum("tin,ti->tn", scores, one.glance.weights_TI.double())
        best = scores[-1].topk(one.selection_TK.shape[1]).indices.sort().values
        assert one.selection_TK[-1].tolist() == best.tolist()


def test_turned_dimensions_are_pairs(tmp_path: Path) -> None:
    """An index key whose half is odd: one dimension without its partner."""
    make_oracle("llama", tmp_path)
    config = with_indexers(read_config(tmp_path), heads=4, head_dim=10, topk=6)
    assert config.blocks[0].indexer.rope.dim == 4
    decoder = Decoder(config, Options(torch.float32, index_dtype="float32"))
    initialise(decoder, 0)
    assert decoder(torch.arange(12)[None]).isfinite().all()
