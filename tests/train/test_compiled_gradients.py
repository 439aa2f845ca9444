"""Models that learn through compiled backward passes."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from compiled import ISAS
from oracle import FAMILIES
from torch import Tensor

from foveal.config import read_config
from foveal.kernels import selective_scan
from foveal.kernels.dispatch import Operation
from foveal.models.decoder import Decoder
from foveal.train.initial import initialise


@pytest.mark.skipif(not ISAS, reason="no compiled kernels")
@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_a_model_learns_the_same(name: str) -> None:
    """A model whose parameters get other gradients than from the torch version."""
    decoder = Decoder(read_config(transformers.AutoConfig.for_model(name, **FAMILIES[name]).to_dict()))
    initialise(decoder, seed=1)
    ids = torch.randint(3, 100, (3, 50), generator=torch.Generator().manual_seed(0))
    call = Operation.__call__

    def by_torch(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self, *args, **kwargs | ({"version": "torch"} if self is selective_scan else {}))

    def gradients() -> dict[str, Tensor]:
        loss = torch.nn.functional.cross_entropy(decoder(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        learnt = {key: value for key, value in decoder.named_parameters() if value.requires_grad}
        return dict(zip(learnt, torch.autograd.grad(loss, list(learnt.values()), allow_unused=True), strict=True))

    found = gradients()
    with patch.object(Operation, "__call__", by_torch):
        expected = gradients()
    assert any("A_log" in key for key in expected)
    for key, wanted in expected.items():
        if wanted is not None:
            assert (found[key] - wanted).norm() <= 1e-4 * wanted.norm() + 1e-8, key
