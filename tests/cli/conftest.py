"""A tiny checkpoint with a byte-level tokenizer, and a way to run the command in this process."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from foveal.cli.main import main

_HIDDEN, _HEADS, _MLP = 32, 4, 48
_TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}assistant:"


class Ran(NamedTuple):
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `foveal` with these arguments."""

    def call(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["foveal", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return Ran(code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random llama of one layer, in a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = _write_tokenizer(folder)
    config = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": _HIDDEN,
        "intermediate_size": _MLP,
        "num_hidden_layers": 1,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(vocabulary), folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def _write_tokenizer(folder: Path) -> int:
    """One token a byte; how many tokens there are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": _TEMPLATE}
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
    return {
        **{f"{name}.weight": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()},
        **{f"{name}.weight": torch.ones(_HIDDEN) for name in norms},
    }
