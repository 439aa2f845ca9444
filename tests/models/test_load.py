"""`load_model` and its parts, from a directory to logits."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import transformers

from foveal.cache.store import plan_cache
from foveal.models.load import generation_defaults, load_model, open_checkpoint
from foveal.nn.mla import MLA

from ..oracle import make_oracle


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny random llama."""
    make_oracle("llama", tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of a saved config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def test_loaded_weights_give_the_logits_of_transformers(tmp_path: Path) -> None:
    """Guards against weights that arrive in the wrong place and against parameters or buffers left unfilled."""
    oracle = make_oracle("llama-llama3", tmp_path)
    ids_SN = torch.arange(40).reshape(2, 20)
    model = load_model(tmp_path)
    assert not model.training
    torch.testing.assert_close(model(ids_SN), oracle(ids_SN).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"hidden_act": "swish"}),
        ("llama", {"hidden_act": "gelu_new"}),
        ("qwen2", {"hidden_size": 66, "use_sliding_window": False}),  # heads of 16, and 2 dimensions over
        ("mamba", {"hidden_act": "gelu"}),
        ("mamba2", {"hidden_act": "gelu"}),
        ("mamba2", {"time_step_limit": [0.3, 0.5]}),
        ("jamba", {"hidden_act": "gelu"}),
        ("kimi_linear", {"hidden_act": "gelu"}),
        ("qwen3_next", {"hidden_act": "gelu"}),
        ("qwen3_next", {"num_experts": 0}),
        ("deepseek_v3", {"n_shared_experts": 0}),
        ("deepseek_v32", {"mlp_bias": True}),
    ],
)
@torch.no_grad()
def test_what_transformers_computes_another_way(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Guards against settings that transformers honours, or states without honouring them, read otherwise."""
    oracle = make_oracle(name, tmp_path, **changes)
    ids_SN = torch.randint(3, 128, (2, 40))
    expected = oracle(ids_SN).logits
    # The oracle's chunks of a delta rule are off by up to 3e-4 (see tests/engine/test_parity.py).
    assert (load_model(tmp_path)(ids_SN) - expected).abs().max() < 1e-3 * expected.abs().max()


@torch.no_grad()
def test_kimi_linear_as_transformers_saves_it(tmp_path: Path) -> None:
    """Guards against dense layers that are refused for the name of experts."""
    released, saved = tmp_path / "released", tmp_path / "saved"
    oracle, ids_SN = make_oracle("kimi_linear", released), torch.arange(40).reshape(2, 20)
    oracle.save_pretrained(saved)
    assert torch.equal(load_model(saved)(ids_SN), load_model(released)(ids_SN))


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        ("float32", "auto", torch.float32),
        ("bfloat16", "auto", torch.bfloat16),
        ("float16", "auto", torch.bfloat16),
        ("float32", "bfloat16", torch.bfloat16),
        ("bfloat16", torch.float32, torch.float32),
    ],
)
def test_dtype(llama: Path, stored: str, asked: str | torch.dtype, expected: torch.dtype) -> None:
    """Guards against a dtype that is asked for and not given; `auto` avoids float16, which CPUs do not have."""
    edit_config(llama, dtype=stored)
    assert {parameter.dtype for parameter in load_model(llama, dtype=asked).parameters()} == {expected}


def test_parameters_that_stay_float32_do(tmp_path: Path) -> None:
    """Guards against a bfloat16 router bias or index weights, which change what is chosen."""
    make_oracle("deepseek_v32", tmp_path)
    model = load_model(tmp_path, dtype="bfloat16")
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert {name.rpartition("indexer.")[2] for name in kept if "indexer" in name} == {
        "k_norm.weight",
        "k_norm.bias",
        "weights_proj.weight",
    }
    assert "layers.2.blocks.1.operation.gate.e_score_correction_bias" in kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int7"}, "dtype 'int7' is not supported"),
        ({"dtype": torch.int8}, "dtype torch.int8 is not supported"),
        ({"device": "warp"}, "device 'warp' is not one that torch knows"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"index_dtype": "int3"}, "index_dtype must be one of .*'int3'"),
        ({"index_dtype": torch.int16}, "index_dtype must be one of .*'int16'"),
        ({"index_dtype": "fp8"}, "index_dtype 'fp8' is for index keys, which llama does not have"),
        ({"mla_form": "folded"}, "mla_form must be one of .*'folded'"),
        ({"mla_form": "absorbed"}, "mla_form 'absorbed' is for latent attention, which llama does not have"),
    ],
)
def test_unknown_settings_are_named(llama: Path, settings: dict[str, Any], message: str) -> None:
    """Guards against a setting that is ignored, or fails deep inside torch."""
    with pytest.raises(ValueError, match=message):
        load_model(llama, **settings)


@pytest.mark.parametrize(
    ("index_dtype", "stored"),
    [
        ("auto", torch.float32),
        ("bf16", torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float8_e4m3fn, "fp8"),
        ("int8", "int8"),
        (torch.int8, "int8"),
    ],
)
def test_sparse_attention_settings_arrive(index_dtype: str | torch.dtype, stored: object, tmp_path: Path) -> None:
    """Guards against index keys or a form of attention other than asked for, and against torch dtypes being refused."""
    make_oracle("deepseek_v32", tmp_path)
    model = load_model(tmp_path, index_dtype=index_dtype, mla_form="absorbed")
    plan = plan_cache(model.config, model.options.dtype, index_dtype=model.options.index_dtype)
    assert plan.index_dtype == stored
    assert {module.form for module in model.modules() if isinstance(module, MLA)} == {"absorbed"}


def test_an_unknown_dtype_in_the_config_is_named(llama: Path) -> None:
    """Guards against a quiet default for a dtype that is not understood."""
    edit_config(llama, dtype="float4")
    with pytest.raises(ValueError, match="dtype 'float4' is not supported"):
        load_model(llama)


def test_cuda_without_cuda_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against torch's own long error where there is no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda:0' was asked for, but this machine has no usable CUDA device"):
        load_model(llama, device="cuda:0")


def test_a_model_beyond_memory_is_refused_with_both_figures(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the kernel killing the process halfway through loading."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
    needed = 4 * transformers.AutoModelForCausalLM.from_pretrained(llama).num_parameters()
    with pytest.raises(ValueError, match=rf"the weights need {needed / 2**20:.1f} MiB, but only 0\.1 MiB"):
        load_model(llama)


def test_generation_defaults(llama: Path) -> None:
    """Guards against a lost or damaged generation_config.json, which names the end tokens of chat models."""
    assert generation_defaults(llama)["eos_token_id"] == 2
    (llama / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json is not valid JSON"):
        generation_defaults(llama)
    (llama / "generation_config.json").unlink()
    assert generation_defaults(llama) == {}


@torch.no_grad()
def test_a_real_model_agrees_with_transformers(test_data: Path) -> None:
    """Guards against agreement on random weights only."""
    folder = test_data / "stories260k"
    ids_SN = torch.randint(3, 512, (2, 64), generator=torch.Generator().manual_seed(0))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert open_checkpoint(folder).config.tied_embeddings
    torch.testing.assert_close(load_model(folder)(ids_SN), oracle(ids_SN).logits, rtol=1e-4, atol=1e-4)
