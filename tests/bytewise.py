"""A random llama of one layer with a byte-level tokenizer and a chat template, written in a moment."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_HIDDEN, _HEADS, _MLP = 32, 4, 48
_PRINTABLE = ord("~") - ord("!") + 1
"""Of the tokens, which are sorted, these come first."""
_TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}assistant:"


def write_tiny_model(folder: Path, max_positions: int = 512, template: str = _TEMPLATE) -> str:
    """Save it as a Hugging Face directory; float32, no end-of-sequence token. Returns the folder's name."""
    vocabulary = _write_tokenizer(folder, template)
    config = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": _HIDDEN,
        "intermediate_size": _MLP,
        "num_hidden_layers": 1,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(vocabulary), folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def _write_tokenizer(folder: Path, template: str) -> int:
    """One token a byte; how many tokens there are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(alphabet)


def _weights(vocabulary: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    square, wide = (_HIDDEN, _HIDDEN), (_MLP, _HIDDEN)
    shapes = {
        "model.embed_tokens": (vocabulary, _HIDDEN),
        **{f"model.layers.0.self_attn.{name}_proj": square for name in "qkvo"},
        "model.layers.0.mlp.gate_proj": wide,
        "model.layers.0.mlp.up_proj": wide,
        "model.layers.0.mlp.down_proj": wide[::-1],
        "lm_head": (vocabulary, _HIDDEN),
    }
    norms = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
    weights = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    weights["lm_head.weight"][_PRINTABLE:] = 0  # it seldom writes them, so that most of its text is whole characters
    return weights | {f"{name}.weight": torch.ones(_HIDDEN) for name in norms}
