"""Random indexers beside a dense model."""

from pathlib import Path

import torch

from foveal.config import read_config
from foveal.config.indexers import with_indexers
from foveal.models.adapter import AdapterConfig, fingerprint, indexer_tensors, save_adapter
from foveal.models.decoder import Decoder
from foveal.models.load import load_model


def make_adapter(model: Path, folder: Path, topk: int) -> str:
    """Write an adapter of a model to `folder`, and return its path."""
    sizes = {"heads": 16, "head_dim": 8, "topk": topk, "rope_dim": 4}
    decoder = Decoder(with_indexers(read_config(model), **sizes))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if ".indexer." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    config = AdapterConfig("tiny", fingerprint(load_model(model)), **sizes)
    save_adapter(indexer_tensors(decoder), config, folder)
    return str(folder)
