"""Quantised models: the mathematics of their dequantised weights, from loading to the engine."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import Tensor, nn

from foveal import LLM, SamplingParams
from foveal.models.decoder import Decoder
from foveal.models.load import load_model
from foveal.nn.linear import ExactLinear, Linear
from foveal.nn.moe import Experts

from ..oracle import VOCAB, make_oracle

# Widths that 32 divides everywhere. Everything is selected: near-ties of index scores would hide real differences.
WIDTHS = {
    "mixtral": {},
    "llama-llama3": {},
    "deepseek_v32": {"q_lora_rank": 32, "kv_lora_rank": 64, "v_head_dim": 16, "index_topk": 64},
    "jamba": {},
}


@pytest.fixture(scope="module", params=WIDTHS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_oracle(request.param, folder, **WIDTHS[request.param])
    return folder


@torch.no_grad()
def dequantised(folder: Path, quantised: Decoder) -> Decoder:
    """A plain decoder with the weights that `quantised` stands for."""
    plain = load_model(folder, dtype="float32")
    for ours, theirs in zip(plain.modules(), quantised.modules(), strict=True):
        if isinstance(theirs, Linear) and theirs.quantised is not None:
            assert isinstance(ours, Linear)
            ours.weight.copy_(theirs.quantised.dequantise(torch.float32))
        if isinstance(theirs, Experts):
            assert isinstance(ours, Experts) and theirs.quantised is not None
            ours.gate_up_proj.copy_(theirs.quantised[0].dequantise(torch.float32))
            ours.down_proj.copy_(theirs.quantised[1].dequantise(torch.float32))
    return plain


def head_of(quantised: Decoder) -> Tensor | None:
    """The rounded copy of tied embeddings."""
    head = quantised._packed_head
    return None if head is None else head.dequantise(torch.float32)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@torch.no_grad()
def test_logits_are_those_of_the_dequantised_weights(folder: Path, quantization: str) -> None:
    """A layer whose quantised weight is not used, is used wrongly, or belongs to another layer."""
    quantised = load_model(folder, dtype="float32", quantization=quantization)
    plain = dequantised(folder, quantised)
    ids_SN = torch.randint(3, VOCAB, (8, 20))
    if (head := head_of(quantised)) is not None:
        hidden: list[Tensor] = []
        plain.norm.register_forward_hook(lambda module, args, out: hidden.append(out))
        plain(ids_SN)
        expected = (hidden[0] @ head.T).unflatten(0, ids_SN.shape)
    else:
        expected = plain(ids_SN)
    difference_SN = (quantised(ids_SN) - expected).abs().amax(-1) / expected.abs().max()
    # Where a choice of experts is nearly a tie, the last digits decide it: all that follows in that sequence differs.
    assert difference_SN.median() < 5e-4 and (difference_SN.amax(1) > 5e-3).sum() <= 1
    assert (load_model(folder, dtype="float32")(ids_SN) - expected).abs().max() > 2e-3 * expected.abs().max()


def test_what_stays_exact(folder: Path) -> None:
    """A router, norm, index weight or absorbed projection that is rounded, or a linear layer that is forgotten."""
    quantised, plain = load_model(folder, dtype="float32", quantization="int8"), load_model(folder, dtype="float32")
    kept = dict(quantised.named_parameters())
    for name, module in plain.named_modules():
        parameters = dict(module.named_parameters(prefix=name, recurse=False))
        rounded = isinstance(module, Linear | Experts) and not isinstance(module, ExactLinear)
        for path, parameter in parameters.items():
            if rounded and not path.endswith("bias"):
                assert path not in kept
            else:
                assert torch.equal(kept[path], parameter)
    assert (quantised._packed_head is not None) == plain.config.tied_embeddings


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@torch.no_grad()
def test_loading_and_quantising_afterwards_agree(folder: Path, quantization: str) -> None:
    """Parts that are filled after they were rounded, or not at all."""
    loaded, rounded = load_model(folder, quantization=quantization), load_model(folder)
    rounded.quantise(quantization)
    rounded.pack()  # leaves quantised weights alone
    ids_SN = torch.randint(3, VOCAB, (1, 30))
    assert torch.equal(loaded(ids_SN), rounded(ids_SN))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_greedy_text_does_not_depend_on_the_batch(folder: Path, quantization: str) -> None:
    """Prefill, chunks and decode in one step, through the engine: as each prompt alone, whatever kernel it meets."""
    llm = LLM(folder, quantization=quantization, skip_tokenizer_init=True, max_num_batched_tokens=48, dtype="float32")
    generator = torch.Generator().manual_seed(2)
    prompts = [
        {"prompt_token_ids": torch.randint(3, VOCAB, (length,), generator=generator).tolist()} for length in (60, 5, 31)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    together = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    alone = [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]
    alike = sum(a == b for one, other in zip(together, alone, strict=True) for a, b in zip(one, other, strict=True))
    assert all(len(tokens) == 8 for tokens in together) and alike >= 20


def test_widths_that_no_group_divides(tmp_path: Path) -> None:
    """int4 that pads or skips silently: the error names the layer."""
    make_oracle("llama", tmp_path, intermediate_size=100)
    with pytest.raises(ValueError, match=r"mlp\.down_proj: int4 in groups of 32 needs inputs that 32 divides, not 100"):
        load_model(tmp_path, quantization="int4")
    load_model(tmp_path, quantization="int8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int3"}, "quantization must be one of int8, int4, not 'int3'"),
        ({"quantization": ""}, "quantization must be one of int8, int4, not ''"),
        ({"quantization": "int8", "dtype": "float16"}, "'int8' goes with dtype float32 or bfloat16, not float16"),
        ({"quantization": "int4", "dtype": "float64"}, "'int4' goes with dtype float32 or bfloat16, not float64"),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, str], message: str) -> None:
    """An option that is ignored, or fails deep inside."""
    make_oracle("llama", tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, **options)


def test_quantising_needs_less_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that would fit once rounded, refused for its size before."""
    make_oracle("llama", tmp_path, num_hidden_layers=8)
    whole = sum(parameter.nbytes for parameter in load_model(tmp_path).parameters())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=whole // 2))
    with pytest.raises(ValueError, match="the weights need"):
        load_model(tmp_path)
    decoder = load_model(tmp_path, quantization="int8")
    assert sum(parameter.nbytes for parameter in decoder.parameters()) < whole // 2
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=whole // 8))
    with pytest.raises(ValueError, match="the weights need"):
        load_model(tmp_path, quantization="int8")


def test_only_one_part_is_whole_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights unrounded in memory before the first is rounded."""
    make_oracle("llama", tmp_path, num_hidden_layers=6)
    whole: list[int] = []
    original = Linear.quantise

    def quantise(self: Linear, quantization: str) -> None:
        whole.append(sum(isinstance(m, Linear) and not m.weight.is_meta for m in modules() if hasattr(m, "weight")))
        original(self, quantization)

    decoders: list[Decoder] = []
    initialise = Decoder.__init__

    def remember(self: Decoder, *args: object) -> None:
        initialise(self, *args)  # type: ignore[arg-type]
        decoders.append(self)

    def modules() -> list[nn.Module]:
        return list(decoders[0].modules())

    monkeypatch.setattr(Decoder, "__init__", remember)
    monkeypatch.setattr(Linear, "quantise", quantise)
    load_model(tmp_path, quantization="int8")
    assert len(whole) == 25 and max(whole) <= 2
