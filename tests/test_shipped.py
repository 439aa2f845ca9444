"""The model and the adapter inside the package: what their cards promise."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from foveal import LLM, SamplingParams, load_model
from foveal.config import read_config
from foveal.config.indexers import with_indexers
from foveal.config.model import MLAConfig, MoEConfig
from foveal.config.released import released
from foveal.evaluate.answers import force_answers, make_samples
from foveal.evaluate.tasks import PASSKEY, Setting
from foveal.models.adapter import WEIGHTS, indexer_tensors, read_adapter
from foveal.models.decoder import Decoder, Options
from foveal.models.resolve import resolve_adapter, resolve_model
from foveal.models.tokenizer import load_tokenizer


def size_of(folder: Path) -> float:
    """Megabytes."""
    return sum(file.stat().st_size for file in folder.rglob("*")) / 1e6


@pytest.fixture(scope="module")
def builtin() -> Decoder:
    """That model."""
    return load_model("builtin", dtype="float32")


def test_it_has_everything_and_is_small(builtin: Decoder) -> None:
    """A package too large to download on the way, or a model that shows less than the library has."""
    assert size_of(resolve_model("builtin")) <= 12
    operations = [block.operation for block in builtin.config.blocks]
    assert any(isinstance(one, MoEConfig) for one in operations)
    assert any(isinstance(one, MLAConfig) for one in operations)
    assert all(block.indexer for block in builtin.config.blocks if isinstance(block.operation, MLAConfig))
    assert builtin.config.max_positions >= 8192


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_it_fetches_from_far_beyond_its_selection(builtin: Decoder, dense: bool) -> None:
    """Weights that no longer fit the code: passkeys are found 16 times as far away as tokens are selected."""
    length = 2100
    assert builtin.config.index_topk is not None and length > 16 * builtin.config.index_topk
    tokenizer = load_tokenizer(resolve_model("builtin"))
    samples = make_samples(PASSKEY, [Setting(length, depth) for depth in (0.05, 0.5)], tokenizer, seed=3)
    assert [answer.score for answer in force_answers(builtin, tokenizer, samples, dense=dense)] == [1.0, 1.0]


def test_it_writes_english() -> None:
    """A tokenizer of another model, or weights that were stored badly."""
    llm = LLM("builtin", dtype="float32", max_num_seqs=1, max_model_len=128)
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=60)
    text = llm.generate("The old man said", params)[0].outputs[0].text
    words = text.lower().split()
    assert len(words) > 15 and len({"the", "and", "to", "of", "a", "i", "that"} & set(words)) >= 3


def test_transformers_computes_the_same() -> None:
    """A model that only this library reads, or reads in its own way."""
    from transformers import AutoModelForCausalLM

    folder = resolve_model("builtin")
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    mine = load_model("builtin", dtype="float32", index_dtype="float32")
    ids_1N = torch.tensor([load_tokenizer(folder).encode(Path(__file__).read_text())[:300]])
    assert mine.config.index_topk is not None and ids_1N.shape[1] > 2 * mine.config.index_topk
    with torch.no_grad():
        torch.testing.assert_close(mine(ids_1N), oracle(ids_1N).logits, rtol=1e-3, atol=1e-3)


def test_the_adapter_is_smollm2s() -> None:
    """Indexers for other layers or of another shape than their config says."""
    folder = resolve_adapter("smollm2-indexers")
    assert size_of(folder) < 8
    adapter = read_adapter(folder)
    sizes = {"heads": adapter.heads, "head_dim": adapter.head_dim, "topk": adapter.topk, "rope_dim": adapter.rope_dim}
    config = with_indexers(read_config(released("smollm2-135m")), **sizes)
    with torch.device("meta"):
        expected = {name: list(view.shape) for name, view in indexer_tensors(Decoder(config, Options())).items()}
    with safe_open(folder / WEIGHTS, "pt") as stored:
        assert {name: stored.get_slice(name).get_shape() for name in stored.keys()} == expected  # noqa: SIM118
