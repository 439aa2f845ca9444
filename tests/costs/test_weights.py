"""Parameters and their bytes against the models themselves, at full size on the meta device."""

import pytest
import torch
import transformers
from oracle import FAMILIES

from foveal.config import ModelConfig, read_config
from foveal.config.model import Fp8Blocks
from foveal.config.released import released, released_names
from foveal.costs.parameters import bytes_of, count_parameters, released_dtype, total_parameters, weight_bytes
from foveal.costs.weights import Weight
from foveal.kernels import quantise_weight
from foveal.models.decoder import Decoder, Options


def decoder(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    with torch.device("meta"):
        return Decoder(config, Options(dtype=dtype))


@pytest.mark.parametrize("name", released_names())
def test_parameters_and_bytes_of_released_models(name: str) -> None:
    """A weight that is forgotten, or kept in another dtype than planned."""
    config = read_config(released(name))
    for dtype, key in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        parameters = list(decoder(config, dtype).parameters())
        assert sum(parameter.numel() for parameter in parameters) == total_parameters(config).total
        assert sum(parameter.nbytes for parameter in parameters) == weight_bytes(config, key)


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_of_every_family(name: str) -> None:
    """The same for biases, norms and tied heads that no released config here has."""
    config = read_config(transformers.AutoConfig.for_model(name.split("-")[0], **FAMILIES[name]).to_dict())
    parameters = list(decoder(config, torch.bfloat16).parameters())
    assert sum(parameter.numel() for parameter in parameters) == total_parameters(config).total
    assert sum(parameter.nbytes for parameter in parameters) == weight_bytes(config, "bfloat16")


@pytest.mark.parametrize("name", ["mamba-2.8b", "kimi-linear-48b"])
def test_parameters_against_transformers(name: str) -> None:
    """A layer that both the plan and the model have in another size than others have."""
    raw = released(name)
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    stored = {id(parameter): parameter.numel() for parameter in model.parameters()}
    # transformers makes a buffer of the bias that chooses experts.
    buffers = [buffer.numel() for key, buffer in model.named_buffers() if key.endswith("e_score_correction_bias")]
    planned = total_parameters(read_config(released(name))).total
    assert sum(stored.values()) + sum(buffers) == planned


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseek-v3", 671, 37),
        ("deepseek-v2", 236, 21),
        ("glm-5", 744, 40),
        ("mixtral-8x7b", 46.7, 12.9),
        ("llama-3-70b", 70.6, 69.5),
        ("jamba-1.5-large", 398, 94),
        ("kimi-linear-48b", 49, 3),
        ("mamba-2.8b", 2.8, 2.8),
        ("deepseek-67b", 67, 67),
    ],
)
def test_published_sizes(name: str, total: float, active: float) -> None:
    """Built-in facts of another model: the sizes that their makers state, in billions (whole ones, mostly)."""
    count = total_parameters(read_config(released(name)))
    assert count.total / 1e9 == pytest.approx(total, rel=0.015)
    assert count.active / 1e9 == pytest.approx(active, rel=0.04)


def test_tied_embeddings_are_counted_once() -> None:
    """A head that is stored twice on paper, or a token that reads more parameters than there are."""
    config = read_config(released("smollm2-135m"))
    counts = count_parameters(config)
    assert counts["lm_head"].total == 0 and counts["lm_head"].active == counts["embedding"].total
    assert total_parameters(config).active == total_parameters(config).total == 134_515_008


def test_bytes_by_dtype() -> None:
    """Scales that are forgotten, or shared by too many weights."""
    matrix, norm = Weight("attention", "w", 300, 200), Weight("norms", "n", 1, 64, storage="plain", multiplies=False)
    assert bytes_of(matrix, "float32") == 240_000 and bytes_of(matrix, "bfloat16") == 120_000
    assert bytes_of(matrix, "fp8") == 60_000 + 4 * 3 * 2
    assert bytes_of(matrix, "fp8", Fp8Blocks(64, 50)) == 60_000 + 4 * 5 * 4
    assert bytes_of(matrix, "int8") == 60_000 + 4 * 300 and bytes_of(matrix, "int4") == 300 * 7 * 20
    for dtype in ("int8", "int4"):
        whole = Weight("attention", "w", 48, 320)
        assert bytes_of(whole, dtype) == quantise_weight(torch.randn(48, 320), dtype).nbytes
    assert bytes_of(norm, "int4") == 128 and bytes_of(norm, "float32") == 256
    with pytest.raises(ValueError, match="'int3'"):
        bytes_of(matrix, "int3")


def test_released_dtypes() -> None:
    """A checkpoint being planned in a dtype that is not its own."""
    dtypes = {name: released_dtype(read_config(released(name))) for name in released_names()}
    assert {name for name, dtype in dtypes.items() if dtype == "fp8"} == {"deepseek-v3", "deepseek-v3.2"}
    assert dtypes["mamba-2.8b"] == "float32" and dtypes["llama-3-70b"] == "bfloat16"
