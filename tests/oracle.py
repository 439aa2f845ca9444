"""Random tiny checkpoints made by transformers, the oracle that every family is compared with."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

VOCAB = 128
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
    "rope_theta": 10000.0,
}
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MLA = _BASE | {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
_DSA = _MLA | {"index_n_heads": 16, "index_head_dim": 32, "index_topk": 12}

_RECURRENT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_NEXT = _BASE | {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 40,
}
_KIMI = {key: value for key, value in _MLA.items() if key not in ("q_lora_rank", "n_routed_experts")} | {
    "num_hidden_layers": 5,
    "num_experts": 8,
    "linear_num_heads": 3,
    "linear_head_dim": 20,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _BASE,
    "llama-linear": _BASE | {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
    "llama-dynamic": _BASE
    | {
        "max_position_embeddings": 48,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    },
    "llama-llama3": _BASE
    | {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 500000.0,
        },
    },
    "llama-yarn": _BASE | {"rope_parameters": {k: v for k, v in YARN.items() if "mscale" not in k}},
    "mistral": _BASE | {"sliding_window": 24, "head_dim": 24},
    "qwen2": _BASE | {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "qwen3": _BASE | {"head_dim": 32, "tie_word_embeddings": True},
    "mixtral": _BASE | {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None},
    "deepseek_v2": _MLA
    | {"topk_method": "group_limited_greedy", "rope_parameters": YARN, "routed_scaling_factor": 1.5},
    "deepseek_v2-lite": _MLA | {"q_lora_rank": None, "topk_method": "greedy", "attention_bias": True},
    "deepseek_v3": _MLA | {"rope_parameters": YARN},
    "deepseek_v3-halves": _MLA | {"rope_interleave": False, "attention_bias": True},
    "deepseek_v32": _DSA,
    "deepseek_v32-yarn": _DSA | {"rope_parameters": YARN},
    "glm_moe_dsa": _DSA
    | {
        "num_hidden_layers": 5,
        "index_topk_freq": 2,
        "index_skip_topk_offset": 2,
        "rms_norm_eps": 1e-5,
        "n_group": 1,
        "topk_group": 1,
    },
    "glm_moe_dsa-yarn": _DSA
    | {"indexer_types": ["full", "shared", "full"], "rope_parameters": YARN, "index_n_heads": 20},
    "jamba": _BASE
    | {
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 6,
    },
    "qwen3_next": _NEXT,
    "qwen3_next-dense": _NEXT
    | {
        "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
        "linear_num_key_heads": 4,
        "linear_conv_kernel_dim": 3,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
    },
    "kimi_linear": _KIMI,
    "kimi_linear-latent": _KIMI
    | {
        "q_lora_rank": 24,
        "linear_attn_config": {
            "full_attn_layers": [2, 4],
            "kda_layers": [1, 3, 5],
            "num_heads": 2,
            "head_dim": 24,
            "short_conv_kernel_size": 3,
        },
    },
    "mamba": _RECURRENT | {"state_size": 8, "time_step_rank": 6},
    "mamba-biased": _RECURRENT
    | {"conv_kernel": 3, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False},
    "mamba2": _RECURRENT | {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 12, "chunk_size": 16},
    "mamba2-biased": _RECURRENT
    | {
        "num_heads": 4,
        "head_dim": 32,
        "n_groups": 1,
        "state_size": 8,
        "use_bias": True,
        "use_conv_bias": False,
        "tie_word_embeddings": True,
    },
}


def make_oracle(name: str, folder: Path, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """Save a random checkpoint of FAMILIES[name] to `folder`; return the transformers model, float32."""
    settings = FAMILIES[name] | changes
    config = transformers.AutoConfig.for_model(name.split("-")[0], **settings)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed)
    model.eval().save_pretrained(folder)
    if name.startswith("kimi_linear"):
        _as_released(folder)
    return model


def _as_released(folder: Path) -> None:
    """Dense layers under the name that released checkpoints of Kimi Linear have: transformers reads it, and saves them
    as if they were experts."""
    file = folder / "model.safetensors"
    tensors = {
        re.sub(r"block_sparse_moe\.(gate|up|down)_proj", r"mlp.\1_proj", name): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})


@torch.no_grad()
def randomise(model: transformers.PreTrainedModel, seed: int) -> None:
    """Give every weight a value that matters: initial ones and zeros in norms and biases would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=generator)
        if "inv_freq" in name or not tensor.numel():
            continue
        if "norm" in name and name.endswith("weight"):
            tensor.copy_(1 + 0.3 * noise)
        elif name.endswith("A_log"):
            tensor.add_(0.2 * noise)
        elif "bias" in name or name.endswith(".D"):
            tensor.copy_(0.3 * noise)
        elif tensor.is_floating_point():
            # Large enough that heads, experts and index scores differ clearly from token to token.
            tensor.copy_(noise * 1.5 * tensor.shape[-1] ** -0.5)


def as_v4(folder: Path) -> None:
    """Rewrite a saved config.json in the spelling of transformers v4."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters", None)
    if rope:
        config["rope_theta"] = rope.pop("rope_theta", 10000.0)
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    indexers = config.pop("indexer_types", None)
    if indexers and "index_topk_freq" not in config:
        config["index_topk_pattern"] = "".join(kind[0].upper() for kind in indexers)
    config.pop("mlp_layer_types", None)
    config["torch_dtype"] = config.pop("dtype", "float32")
    path.write_text(json.dumps(config))
