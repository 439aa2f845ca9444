"""Random weights of recurrent layers."""

import pytest
import torch
import transformers
from oracle import FAMILIES
from torch.nn.functional import softplus

from foveal.config import read_config
from foveal.models.decoder import Decoder
from foveal.nn.mamba import Mamba
from foveal.nn.recurrent import Recurrent
from foveal.train.initial import initialise

NAMES = ["jamba", "mamba-biased", "mamba2", "qwen3_next", "kimi_linear"]


@pytest.mark.parametrize("name", NAMES)
def test_recurrences_start_within_their_ranges(name: str) -> None:
    """A weight that keeps whatever was in memory, time steps or decays that explode or stand still."""
    config = read_config(transformers.AutoConfig.for_model(name.split("-")[0], **FAMILIES[name]).to_dict())
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(torch.nan)
        for key, parameter in decoder.named_parameters():
            if "norm" in key or key.endswith("e_score_correction_bias"):
                parameter.fill_(0 if config.centred_norms else 1)
    initialise(decoder, seed=1)
    assert all(parameter.isfinite().all() for parameter in decoder.parameters())
    mixers = [module for module in decoder.modules() if isinstance(module, Recurrent)]
    assert mixers
    for mixer in mixers:
        steps = softplus(mixer.dt_proj.bias if isinstance(mixer, Mamba) else mixer.dt_bias)
        assert steps.min() > 0.00099 and steps.max() < 0.101
        assert mixer.A_log.min() >= 0 and mixer.A_log.max() <= torch.tensor(16.0).log()


@pytest.mark.parametrize("name", ["mamba", "mamba2", "qwen3_next", "kimi_linear"])
def test_they_learn(name: str) -> None:
    """A parameter that no gradient reaches: a model that is asked to say one thing after the other learns it."""
    config = read_config(transformers.AutoConfig.for_model(name, **FAMILIES[name]).to_dict())
    decoder = Decoder(config)
    initialise(decoder, seed=1)
    ids = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(decoder(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        unreached = [key for key, value in decoder.named_parameters() if value.requires_grad and value.grad is None]
        assert not unreached
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
