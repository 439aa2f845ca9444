"""One training update of a model of every kind."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from oracle import FAMILIES
from tiny import CONFIG
from torch import Tensor

from foveal.config import ModelConfig, read_config
from foveal.config.indexers import with_indexers
from foveal.models.decoder import Decoder, Options
from foveal.train.data import TrainingBatch
from foveal.train.data.rows import Row
from foveal.train.initial import initialise
from foveal.train.learner import Learner
from foveal.train.objective import Objective
from foveal.train.parallel import Parallel
from foveal.train.schema import StageSettings

_INDEXER = {"heads": 4, "head_dim": 16, "topk": 8, "rope_dim": 8}


def of_family(family: str) -> ModelConfig:
    config = read_config(transformers.AutoConfig.for_model(family.split("-")[0], **FAMILIES[family]).to_dict())
    return with_indexers(config, **_INDEXER)


MODELS: dict[str, Callable[[], ModelConfig]] = {
    "grouped heads": lambda: of_family("llama-dynamic"),
    "latents": lambda: read_config(CONFIG | {"first_k_dense_replace": 2, "v_head_dim": 12}),
    "experts": lambda: read_config(CONFIG),
    "mamba": lambda: of_family("jamba"),
    "gated delta rule": lambda: of_family("qwen3_next"),
}
# float32 experts wait for their counts.
WITHOUT_EXPERTS = ("grouped heads", "latents")
STAGE_KINDS = ("pretrain", "warmup", "sparse")


def batch() -> TrainingBatch:
    """Two rows of 64 tokens, documents shorter and longer than a selection; one says how much each token counts."""
    lengths = (40, 19, 5)
    ids = tuple(np.arange(length, dtype=np.int64) for length in lengths)
    weights = tuple(np.ones(length, dtype=np.float32) for length in lengths)
    return TrainingBatch((Row(ids), Row(ids, weights)))


def settings(kind: Any, **more: Any) -> StageSettings:
    return StageSettings(kind=kind, steps=4, context=64, tokens_per_step=128, **more)


def update(
    model: str, kind: str, device: str, options: Options | None = None
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What an update of a random model logs, and the gradients that it was made from."""
    parallel, stage = Parallel(device), settings(kind, z_weight=0.1)
    decoder = Decoder(MODELS[model](), options or Options())
    initialise(decoder, 0)
    parallel.shard(decoder)
    learner, objective = Learner(decoder, stage, parallel), Objective(decoder, stage, parallel)
    losses = objective.accumulate(batch(), 1)
    gradients = {name: p.grad.detach().cpu() for name, p in decoder.named_parameters() if p.grad is not None}
    values = learner.update(0, losses)
    objective.balance()
    assert all(p.isfinite().all() for p in decoder.parameters())
    return values, gradients


def differ(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest error of a parameter's gradient, relative to it."""
    assert gradients.keys() == exact.keys()
    errors = [(gradients[name] - wanted).norm() / wanted.norm().clamp_min(1e-6) for name, wanted in exact.items()]
    return float(torch.stack(errors).max())
