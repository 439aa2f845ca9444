"""Checkpoint names against those that transformers writes, and the views behind them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from foveal.config import read_config
from foveal.models.decoder import Decoder
from foveal.models.names import checkpoint_tensors

from ..oracle import FAMILIES, make_oracle

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
    "max_position_embeddings": 32,
}
MIXTRAL = CONFIG | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_that_transformers_saves(family: str, tmp_path: Path) -> None:
    """Guards against a weight that is looked for under another name or in another shape than checkpoints have."""
    make_oracle(family, tmp_path)
    with torch.device("meta"):
        decoder = Decoder(read_config(tmp_path))
    ours = {name: tuple(view.shape) for name, view in checkpoint_tensors(decoder).items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}


def test_fused_parts_are_filled_in_order() -> None:
    """Guards against q, k and v (or gate and up) landing in each other's rows, and against copies instead of views."""
    decoder = Decoder(read_config(CONFIG))
    views = checkpoint_tensors(decoder)
    attention, feed_forward = decoder.layers[0].blocks
    for value, part in enumerate(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")):
        views[f"model.layers.0.{part}.weight"].fill_(value)
    for value, part in enumerate(("mlp.gate_proj", "mlp.up_proj")):
        views[f"model.layers.0.{part}.weight"].fill_(value)
    assert attention.operation.qkv_proj.weight[:, 0].tolist() == [0] * 8 + [1] * 4 + [2] * 4
    assert feed_forward.operation.gate_up_proj.weight[:, 0].tolist() == [0] * 6 + [1] * 6


def test_each_expert_has_its_own_views() -> None:
    """Guards against experts that are swapped, or gate rows that are taken for up rows (mixtral's w1, w3, w2)."""
    decoder = Decoder(read_config(MIXTRAL))
    views = checkpoint_tensors(decoder)
    for expert in range(3):
        for value, part in enumerate(("w1", "w3", "w2")):
            views[f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight"].fill_(10 * expert + value)
    experts = decoder.layers[0].blocks[1].operation.experts
    assert [rows[:, 0].tolist() for rows in experts.gate_up_proj] == [[10 * e] * 6 + [10 * e + 1] * 6 for e in range(3)]
    assert [rows.unique().tolist() for rows in experts.down_proj] == [[2], [12], [22]]


def test_views_are_outside_autograd_and_parameters_are_not() -> None:
    """Guards against loading that fails on leaf parameters, or that turns training off."""
    decoder = Decoder(read_config(CONFIG))
    assert not any(view.requires_grad for view in checkpoint_tensors(decoder).values())
    assert all(parameter.requires_grad for parameter in decoder.parameters())
