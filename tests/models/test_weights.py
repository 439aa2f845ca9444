"""Reading safetensors directories: what is joined, what is skipped, and what is refused by name."""

import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from foveal.config import read_config
from foveal.config.model import Fp8Blocks
from foveal.models import weights
from foveal.models.decoder import Decoder
from foveal.models.names import checkpoint_tensors
from foveal.models.weights import check, dequantise_blocks, fill, open_safetensors

LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
    "max_position_embeddings": 32,
}
MLA = LLAMA | {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": 6,
    "kv_lora_rank": 4,
    "qk_nope_head_dim": 2,
    "qk_rope_head_dim": 2,
    "v_head_dim": 2,
    "moe_intermediate_size": 4,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 0,
    "first_k_dense_replace": 0,
}
FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [3, 5]}}
Q = "model.layers.0.self_attn.q_proj.weight"


def random_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor that the config's model has."""
    with torch.device("meta"):
        shapes = {name: view.shape for name, view in checkpoint_tensors(Decoder(read_config(config))).items()}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder: Path, config: dict[str, Any], *shards: dict[str, Tensor]) -> Path:
    """A checkpoint directory: one file, or several and their index."""
    (folder / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors")
        return folder
    files = {f"model-{index}.safetensors": shard for index, shard in enumerate(shards)}
    for file, shard in files.items():
        save_file(shard, folder / file)
    index = {"weight_map": {name: file for file, shard in files.items() for name in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load(folder: Path) -> dict[str, Tensor]:
    """The parameters after loading, under their checkpoint names."""
    checkpoint = open_safetensors(folder)
    views = checkpoint_tensors(Decoder(checkpoint.config))
    check(views, checkpoint.tensors)
    fill(views, checkpoint.tensors)
    return views


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_arrives(shards: int, tmp_path: Path) -> None:
    """Guards against tensors that are lost or mixed up, in one file or spread over shards."""
    stored = random_weights(LLAMA)
    split = [dict(list(stored.items())[start::shards]) for start in range(shards)]
    loaded = load(write(tmp_path, LLAMA, *split))
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


def test_dtype_is_converted(tmp_path: Path) -> None:
    """Guards against bytes that are taken for another dtype, and against float32 parameters losing precision."""
    stored = random_weights(MLA)
    halves = {name: tensor.bfloat16() for name, tensor in stored.items()}
    bias = "model.layers.0.mlp.gate.e_score_correction_bias"
    halves[bias] = stored[bias]
    loaded = load(write(tmp_path, MLA, halves))
    assert torch.equal(loaded["lm_head.weight"], stored["lm_head.weight"].bfloat16().float())
    assert loaded[bias].dtype == torch.float32
    assert torch.equal(loaded[bias], stored[bias])


def test_fp8_blocks_follow_the_definition() -> None:
    """Guards against scales on the wrong block, above all in the last blocks, which are cut short."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 11, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 3, generator=generator)
    expected = torch.empty(7, 11)
    for row in range(7):
        for column in range(11):
            expected[row, column] = weight[row, column].float() * scale[row // 3, column // 5]
    assert torch.equal(dequantise_blocks(weight, scale, Fp8Blocks(3, 5)), expected)


def test_fp8_weights_are_joined_with_their_scales(tmp_path: Path) -> None:
    """Guards against raw fp8 values that are loaded as if they were the weights."""
    stored = random_weights(LLAMA)
    quantised, scale = stored[Q].to(torch.float8_e4m3fn), torch.rand(3, 2)
    loaded = load(write(tmp_path, LLAMA | FP8, stored | {Q: quantised, f"{Q}_scale_inv": scale}))
    assert torch.equal(loaded[Q], dequantise_blocks(quantised, scale, Fp8Blocks(3, 5)))


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({f"{Q}_scale_inv": torch.ones(3, 2)}, FP8, f"1 scales without an fp8 weight: {Q}_scale_inv"),
        (
            {"model.stray.weight_scale_inv": torch.ones(1, 1)},
            FP8,
            "without an fp8 weight: model.stray.weight_scale_inv",
        ),
        ({Q: torch.ones(8, 8).to(torch.float8_e4m3fn)}, FP8, f"no {Q}_scale_inv"),
        (
            {Q: torch.ones(8, 8).to(torch.float8_e4m3fn), f"{Q}_scale_inv": torch.ones(2, 2)},
            FP8,
            rf"{Q}_scale_inv is \[2, 2\], not \[3, 2\]",
        ),
        (
            {Q: torch.ones(8, 8).to(torch.float8_e4m3fn), f"{Q}_scale_inv": torch.ones(3, 2)},
            {},
            f"{Q} is stored as F8_E4M3, but there is no 'quantization_config'",
        ),
        ({Q: torch.ones(8, 8, dtype=torch.int8)}, {}, f"{Q} is stored as I8"),
        ({Q: torch.ones(8, 8).to(torch.float8_e5m2)}, {}, f"{Q} is stored as F8_E5M2"),
    ],
)
def test_unfit_quantised_weights_are_refused(
    change: dict[str, Tensor], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Guards against quantised weights that load without their scales, or with scales that do not fit."""
    with pytest.raises(ValueError, match=message):
        open_safetensors(write(tmp_path, LLAMA | config, random_weights(LLAMA) | change))


def test_rotary_buffers_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against old checkpoints that keep inv_freq being refused."""
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(1) for layer in range(2)}
    load(write(tmp_path, LLAMA, random_weights(LLAMA) | buffers))
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert lines == ["skipped 2 rotary buffers: they are computed"]


@pytest.mark.parametrize("declared", [{}, {"num_nextn_predict_layers": 1}])
def test_prediction_layers_are_skipped_with_one_line(
    declared: dict[str, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against every released DeepSeek-V3 being refused for its multi-token-prediction layer, fp8 or not."""
    extra = {
        "model.layers.2.eh_proj.weight": torch.ones(8, 16),
        "model.layers.2.self_attn.o_proj.weight": torch.ones(8, 8).to(torch.float8_e4m3fn),
        "model.layers.2.self_attn.o_proj.weight_scale_inv": torch.ones(3, 2),
    }
    load(write(tmp_path, MLA | declared, random_weights(MLA) | extra))
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert lines == ["skipped 3 tensors of multi-token-prediction layers: they are not used"]


def test_prediction_layers_beside_the_others_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against every released Qwen3-Next being refused for what stands under `mtp`."""
    linear = {f"linear_num_{part}_heads": 2 for part in ("key", "value")}
    linear |= {f"linear_{part}_head_dim": 4 for part in ("key", "value")}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 4}
    raw = LLAMA | linear | experts | {"model_type": "qwen3_next", "head_dim": 8, "shared_expert_intermediate_size": 4}
    load(write(tmp_path, raw, random_weights(raw) | {"mtp.fc.weight": torch.ones(8, 16)}))
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert lines == ["skipped 1 tensors of multi-token-prediction layers: they are not used"]


def test_an_ordinary_layer_is_no_prediction_layer(tmp_path: Path) -> None:
    """Guards against a lowered num_hidden_layers that makes a DeepSeek-V3 of fewer layers out of a whole one."""
    stored = random_weights(MLA | {"num_hidden_layers": 3}) | {"model.layers.3.eh_proj.weight": torch.ones(8, 16)}
    with pytest.raises(ValueError, match=r"unexpected: model\.layers\.2\.") as caught:
        load(write(tmp_path, MLA, stored))
    assert "model.layers.3." not in str(caught.value)


def test_layers_beyond_the_config_are_refused_elsewhere(tmp_path: Path) -> None:
    """Guards against a truncated num_hidden_layers that silently makes another model."""
    extra = {"model.layers.2.input_layernorm.weight": torch.ones(8)}
    with pytest.raises(ValueError, match=r"1 unexpected: model\.layers\.2\.input_layernorm\.weight"):
        load(write(tmp_path, LLAMA, random_weights(LLAMA) | extra))


def test_a_head_that_repeats_tied_embeddings_is_skipped(tmp_path: Path) -> None:
    """Guards against exports that write the tied head out being refused."""
    tied = LLAMA | {"tie_word_embeddings": True}
    stored = random_weights(tied)
    loaded = load(write(tmp_path, tied, stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}))
    assert loaded.keys() == stored.keys()


def test_a_head_unlike_its_tied_embeddings_is_refused(tmp_path: Path) -> None:
    """Guards against a trained head that is thrown away because of a wrong config."""
    tied = LLAMA | {"tie_word_embeddings": True}
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(write(tmp_path, tied, random_weights(LLAMA)))


def test_missing_tensors_are_counted_and_five_named(tmp_path: Path) -> None:
    """Guards against parameters that stay random, and against an error that floods the screen."""
    stored = random_weights(LLAMA)
    kept = {name: tensor for name, tensor in stored.items() if "layers.1." not in name}
    with pytest.raises(ValueError, match=r"9 missing: model\.layers\.1\.") as caught:
        load(write(tmp_path, LLAMA, kept))
    assert str(caught.value).count("model.layers.1.") == 5


def test_a_missing_head_is_named(tmp_path: Path) -> None:
    """Guards against a model without a head that is neither tied nor complete."""
    stored = random_weights(LLAMA)
    del stored["lm_head.weight"]
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight"):
        load(write(tmp_path, LLAMA, stored))


def test_unexpected_and_mis_shaped_tensors_are_named(tmp_path: Path) -> None:
    """Guards against weights that are silently left unread, and against broadcasting a weight of the wrong shape."""
    stored = random_weights(LLAMA) | {"model.extra.weight": torch.ones(1), Q: torch.ones(1, 8)}
    with pytest.raises(
        ValueError, match=rf"1 unexpected: model\.extra\.weight; 1 mis-shaped: {Q} is \[1, 8\], not \[8, 8\]"
    ):
        load(write(tmp_path, LLAMA, stored))


@pytest.mark.parametrize("keep", [4, -40])
def test_a_torn_file_is_named(keep: int, tmp_path: Path) -> None:
    """Guards against half a download: torn in its header, torn in its data."""
    file = write(tmp_path, LLAMA, random_weights(LLAMA)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        open_safetensors(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """Guards against an interrupted download of a sharded model."""
    stored = list(random_weights(LLAMA).items())
    write(tmp_path, LLAMA, dict(stored[:5]), dict(stored[5:]))
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1 missing shards: model-1\.safetensors"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_named(text: str, tmp_path: Path) -> None:
    """Guards against a traceback from inside json for a torn index."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is not a readable index"):
        open_safetensors(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """Guards against which of two values wins depending on the order of files."""
    stored = random_weights(LLAMA)
    with pytest.raises(ValueError, match=rf"{Q} is stored in both model-0\.safetensors and model-1\.safetensors"):
        open_safetensors(write(tmp_path, LLAMA, stored, {Q: stored[Q]}))


def test_directories_without_safetensors_are_refused(tmp_path: Path) -> None:
    """Guards against pickled weights being half supported, and against an empty directory passing for a model."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        open_safetensors(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="convert them to safetensors"):
        open_safetensors(tmp_path)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("threshold", "shown"), [(0, True), (1 << 40, False)])
def test_the_progress_bar_is_for_long_loads_on_a_terminal(
    threshold: int, shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a silent wait on large models, and against noise on small ones."""
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(weights, "_BAR_FROM_BYTES", threshold)
    load(write(tmp_path, LLAMA, random_weights(LLAMA)))
    assert ("loading" in terminal.getvalue()) is shown
