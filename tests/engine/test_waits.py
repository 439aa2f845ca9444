"""A step on a GPU makes the host wait once, for its tokens; on a device that is not there (`waiting`)."""

from pathlib import Path

import pytest
import torch
import transformers
from oracle import FAMILIES, make_oracle
from waiting import DEVICE, device_that_is_not_there, on_device

from foveal import LLM, SamplingParams
from foveal.cache import CacheManager
from foveal.cache.store import CacheStore, plan_cache
from foveal.config import ModelConfig, read_config
from foveal.config.indexers import with_indexers
from foveal.engine.graphs import DecodeGraphs, GraphLimits, Work
from foveal.engine.request import Request, SequenceState, seeded_generator
from foveal.engine.runner import Runner
from foveal.engine.sampler import Sampler
from foveal.engine.scheduler import Chunk
from foveal.models.decoder import Decoder, Options

pytest.importorskip("triton")
SAMPLED = (
    SamplingParams(temperature=0, min_tokens=200, max_tokens=200),
    SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, presence_penalty=0.5, logit_bias={3: 1.0}),
)
# (tokens of the prompt, tokens computed): next tokens, before and behind the end of a page and of a selection.
LENGTHS = ((5, 5), (60, 70))


def config_of(family: str) -> ModelConfig:
    settings = FAMILIES[family.removesuffix("-indexed")]
    config = read_config(transformers.AutoConfig.for_model(family.split("-")[0], **settings).to_dict())
    return with_indexers(config, heads=16, head_dim=32, topk=12) if family.endswith("-indexed") else config


def running(manager: CacheManager, params: SamplingParams, prompt: int, computed: int) -> Chunk:
    """The next token of a sequence whose others are computed."""
    request = Request(f"{prompt}", [1] * prompt, params)
    sequence = SequenceState(request, 0, [1] * (computed + 1), seeded_generator(0, 0))
    request.sequences = [sequence]
    sequence.computed = manager.admit(sequence.key, sequence.tokens, reusable=False) or 0
    assert manager.reserve(sequence.key, computed + 1)
    return Chunk(sequence, computed, 1)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    "family", ["llama-dynamic", "qwen3-indexed", "deepseek_v32", "jamba", "qwen3_next", "kimi_linear"]
)
def test_a_decode_step(family: str, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`item`, `nonzero`, truth values as an index, a blocking copy anywhere in a step; and within a graph, any copy at
    all, which would be of memory that is the host's again by the next replay."""
    config = config_of(family)
    sent: list[int] = []
    with device_that_is_not_there(monkeypatch) as waits, torch.inference_mode():

        def capture(work: Work) -> Work:
            work()  # makes what is kept for good
            before = waits.sent
            work()
            sent.append(waits.sent - before)
            return work

        model = on_device(lambda: Decoder(config, Options(dtype=torch.bfloat16)))
        plan = plan_cache(config, torch.bfloat16)
        manager = CacheManager(8, 4 if plan.has_slots else 0)
        store = CacheStore(plan, 8, 4 if plan.has_slots else 0, DEVICE)
        chunks = [running(manager, *one) for one in zip(SAMPLED, *zip(*LENGTHS, strict=True), strict=True)]
        limits = GraphLimits(3, 4, least_pages=1)
        replayed = DecodeGraphs(lambda batch: model.step(batch, store).logits_LV, limits, DEVICE, capture)
        runner = Runner(model, store, manager, device=DEVICE, graphs=replayed if graphs else None)
        waits.fetched = 0
        logits_LV = runner.run(chunks).logits_LV
        assert waits.fetched == 0
        Sampler([2]).sample(logits_LV, [chunk.sequence for chunk in chunks])
        assert waits.fetched == 1
    assert sent == ([0] if graphs else [])


class NoCapture:
    """`Capture` that captures nothing, and asks no driver for a pool."""

    def __init__(self, device: torch.device) -> None: ...

    def __call__(self, work: Work) -> Work:
        """See `Capture`."""
        return work


@pytest.mark.parametrize("family", ["mistral", "deepseek_v32", "jamba"])
def test_requests(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From `LLM` to answers, chunks, forks and prefix hits among them: a tensor of the host in the middle, which would
    fail on a card. Here the host may wait."""
    make_oracle(family, tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1 << 30, 1 << 30))
    monkeypatch.setattr("foveal.engine.llm.CudaCapture", NoCapture)
    prompt = [*range(3, 93)]
    params = SamplingParams(n=2, temperature=0, max_tokens=3, ignore_eos=True, logprobs=2)
    with device_that_is_not_there(monkeypatch) as waits:
        waits.patient = True
        options = {"dtype": "float32", "device": DEVICE, "skip_tokenizer_init": True}
        llm = LLM(tmp_path, max_model_len=160, max_num_batched_tokens=50, **options)
        for _ in range(2):
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in (prompt, prompt[:20])], params)
            assert [len(one.token_ids) for output in outputs for one in output.outputs] == [3] * 4, outputs
    assert llm.usage.prefix_hit_tokens > 0
