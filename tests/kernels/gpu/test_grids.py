"""Grids of large calls, planned and not run: a card takes 2^31 - 1 programs along x, 65535 along y and z."""

import pytest
import torch

from foveal.kernels import Columns, Contexts, KeySource, OneHead, Queries, Rows
from foveal.kernels.gpu.device import Card
from foveal.kernels.gpu.latent import latent_attention
from foveal.kernels.gpu.launch import Choice
from foveal.kernels.gpu.select import select_top
from foveal.kernels.gpu.sparse_backward import sparse_backward

TOKENS, HEADS = 1 << 20, 128
CHOICE = Choice(card=Card(90, 132))


def empty(*shape: int) -> torch.Tensor:
    """A shape alone."""
    return torch.empty(*shape, device="meta")


@pytest.mark.parametrize("sequences", [1, 4096])
def test_a_million_tokens(sequences: int) -> None:
    """Tokens along an axis that has no room for them."""
    each = TOKENS // sequences
    queries = Queries(tuple(range(0, TOKENS + 1, each)), (0,) * sequences)
    contexts = Contexts((each,) * sequences, (-1,) * sequences, empty(sequences, each).long())
    q_THX, selection_TK = empty(TOKENS, HEADS, 576), empty(TOKENS, 2048).int()
    records = OneHead(Rows(empty(64, 576)))
    keys, values = KeySource(records, contexts), KeySource(Columns(records, 512), contexts)
    q_TIJ, index_keys = empty(TOKENS, 64, 128), KeySource(Rows(empty(64, 128)), contexts)
    out_THC = q_THX[..., :512]
    backward, *_ = sparse_backward(q_THX, q_THX, out_THC, out_THC, out_THC, selection_TK, scale=1.0, choice=CHOICE)
    launches = [
        *latent_attention(q_THX, keys, values, selection_TK, queries, scale=1.0, choice=CHOICE).launches,
        *latent_attention(q_THX, keys, values, None, queries, scale=1.0, choice=CHOICE).launches,
        *select_top(q_TIJ, q_TIJ[..., 0], index_keys, queries, topk=2048, choice=CHOICE)[0],
        backward,
    ]
    for launch in launches:
        x, y, z = (*launch.grid, 1, 1)[:3]
        assert 0 < x < 2**31 and 0 < y <= 65535 and 0 < z <= 65535, launch.kernel
