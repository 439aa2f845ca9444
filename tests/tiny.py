"""A tiny sparse model with random weights (latent attention, indexers, experts), and stages to train it."""

import json
from typing import Any

import torch

from foveal.config import read_config
from foveal.models.decoder import Decoder, Options
from foveal.train.initial import initialise

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v32",
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 8,
    "index_head_dim": 16,
    "index_topk": 8,
    "intermediate_size": 48,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


def sparse_decoder(
    dtype: torch.dtype, seed: int = 0, *, checkpoint_activations: bool = False, **changes: Any
) -> Decoder:
    """The model; index keys are kept in its own dtype. `changes`: of the config."""
    options = Options(dtype, index_dtype="auto", checkpoint_activations=checkpoint_activations)
    decoder = Decoder(read_config(CONFIG | changes), options)
    initialise(decoder, seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1.5)  # so that heads and experts differ clearly
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(not name.endswith("e_score_correction_bias"))
    return decoder


STAGE = """
[[stages]]
kind = "{kind}"
steps = {steps}
context = 64
tokens_per_step = 128
learning_rate = 3e-3
warmup_steps = 1
{more}
"""


def stage(kind: str, steps: int, **more: Any) -> str:
    """One stage in TOML."""
    return STAGE.format(kind=kind, steps=steps, more="\n".join(f"{k} = {json.dumps(v)}" for k, v in more.items()))
