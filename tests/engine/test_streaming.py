"""Sinks and a window through the engine, against a loop that keeps keys as the paper does: unturned, and turned anew at
every step by their positions in the cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import VOCAB, make_oracle
from torch import Tensor

from foveal import LLM, SamplingParams, load_model
from foveal.config import read_config
from foveal.config.streaming import MOST_TOKENS, read_streaming, with_streaming
from foveal.costs.cache_bytes import cache_cost, cache_dtypes

SINKS, WINDOW = 3, 21
STREAMING = f"{SINKS}+{WINDOW}"
NEW_TOKENS = 40


class PaperCache:
    """A transformers model with q, k and v projections, token by token, that keeps the first keys and the last."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self.model = model
        self.keys: list[list[Tensor]] = [[] for _ in model.model.layers]
        self.values: list[list[Tensor]] = [[] for _ in model.model.layers]

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """Logits [V] after one more token."""
        trunk = self.model.model
        x_11D = trunk.embed_tokens(torch.tensor([[token]]))
        for number, layer in enumerate(trunk.layers):
            x_11D = x_11D + self._attention(number, layer.self_attn, layer.input_layernorm(x_11D))
            x_11D = x_11D + layer.mlp(layer.post_attention_layernorm(x_11D))
        return self.model.lm_head(trunk.norm(x_11D))[0, 0]

    def _attention(self, number: int, attention: Any, h_11D: Tensor) -> Tensor:
        q, k, v = (
            getattr(attention, f"{name}_proj")(h_11D)[0, 0].view(-1, attention.head_dim) for name in ("q", "k", "v")
        )
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        keys, values = self.keys[number], self.values[number]
        keys.append(k)
        values.append(v)
        if len(keys) > SINKS + WINDOW:
            del keys[SINKS], values[SINKS]
        cos_NP, sin_NP = (x[0] for x in self.model.model.rotary_emb(h_11D, torch.arange(len(keys))[None]))
        k_GNP = _turned(torch.stack(keys, 1), cos_NP, sin_NP)
        q_HP = _turned(q[:, None], cos_NP[-1:], sin_NP[-1:])[:, 0]
        group = len(q) // len(k)
        scores_HN = torch.einsum("hp,hnp->hn", q_HP, k_GNP.repeat_interleave(group, 0)) * attention.scaling
        v_HNP = torch.stack(values, 1).repeat_interleave(group, 0)
        return attention.o_proj(torch.einsum("hn,hnp->hp", scores_HN.softmax(-1), v_HNP).reshape(1, 1, -1))


def _turned(x_XNP: Tensor, cos_NP: Tensor, sin_NP: Tensor) -> Tensor:
    first, second = x_XNP.chunk(2, -1)
    return x_XNP * cos_NP + torch.cat((-second, first), -1) * sin_NP


def greedy(model: transformers.PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    cache, tokens = PaperCache(model), list(prompt)
    for token in prompt[:-1]:
        cache.step(token)
    for _ in range(count):
        tokens.append(int(cache.step(tokens[-1]).argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module", params=["llama", "llama-llama3", "llama-yarn", "qwen3"])
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, make_oracle(request.param, folder, max_position_embeddings=64)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("streaming")
    return folder, make_oracle("llama", folder, max_position_embeddings=64)


def llm(folder: Path, **options: Any) -> LLM:
    return LLM(folder, dtype="float32", skip_tokenizer_init=True, streaming=STREAMING, **options)


def generate(model: LLM, prompts: list[list[int]], count: int = NEW_TOKENS) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    return [output.outputs[0].token_ids for output in outputs]


def prompts() -> list[list[int]]:
    """Two that begin alike for more than a page, one shorter than the sinks."""
    ids = torch.randint(3, VOCAB, (3, 90), generator=torch.Generator().manual_seed(1)).tolist()
    return [ids[0], ids[0][:75] + ids[1][:20], ids[2][:2]]


def test_logits(oracle: tuple[Path, Any]) -> None:
    """Positions of sinks that go on growing, a rope scaling forgotten for them, keys that were computed from evicted
    tokens being computed anew."""
    folder, model = oracle
    ids = torch.randint(3, VOCAB, (90,))
    cache = PaperCache(model)
    expected = torch.stack([cache.step(int(token)) for token in ids])
    with torch.no_grad():
        ours = load_model(folder, dtype="float32", streaming=STREAMING)(ids[None])[0]
    assert float((ours - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1, "enable_prefix_caching": False},
        {"max_num_batched_tokens": 7},
        {"max_num_seqs": 1},
        {"enforce_eager": True},
    ],
    ids=["one by one", "chunks of 7", "prefix hits", "eager"],
)
def test_schedules(llama: tuple[Path, Any], options: dict[str, Any]) -> None:
    """The cache, the batch or the schedule changing what is generated; decoding in blocks that know no sinks."""
    folder, model = llama
    engine = llm(folder, **options)
    assert generate(engine, prompts()) == [greedy(model, prompt, NEW_TOKENS) for prompt in prompts()]
    assert engine.usage.pages_in_use == 0


def test_preemption_and_fork(llama: tuple[Path, Any]) -> None:
    """A preempted sequence, or a copy of one, going on with pages in the place of its sinks that are not its own."""
    folder, model = llama
    several = [(prompt * 45)[:90] for prompt in prompts()]
    # A sequence holds its sinks' page and at most two more; four pages and the null page are too few for all.
    bytes_of_page = llm(folder)._cache_plan.page_bytes
    tight = llm(folder, kv_cache_memory=5 * bytes_of_page, max_num_batched_tokens=16, enable_prefix_caching=False)
    assert generate(tight, several) == [greedy(model, prompt, NEW_TOKENS) for prompt in several]
    assert tight.engine.preemptions > 0
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, n=2)
    output = llm(folder).generate([{"prompt_token_ids": several[0]}], params)[0]
    assert {tuple(one.token_ids) for one in output.outputs} == {tuple(greedy(model, several[0], NEW_TOKENS))}


def test_constant_memory(llama: tuple[Path, Any]) -> None:
    """A cache that grows with the sequence, or a length that the model's positions or the cache still bound."""
    folder, model = llama
    engine = llm(folder, max_num_seqs=1, max_num_batched_tokens=16)
    assert engine.engine.longest == MOST_TOKENS
    most = 0
    count = 6 * (SINKS + WINDOW) + 64
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    for output in engine.stream({"prompt_token_ids": prompts()[0]}, params):
        most = max(most, engine.usage.pages_in_use)
        tokens = output.outputs[0].token_ids
    assert tokens == greedy(model, prompts()[0], count)
    config = with_streaming(read_config(folder), SINKS, WINDOW)
    cost = cache_cost(config, cache_dtypes("float32"))
    assert most == 3 == max(cost.sequence_pages(n) for n in range(1000))
    assert cost.sequence_bytes(10_000) == cost.sequence_bytes(10_000 + 64 * 1000)
    # Pages for sinks, for the window and a step, and one on either side; the null page.
    assert engine.usage.pages_total == 1 + 2
    store_bytes = (engine.usage.pages_total + 1) * cost.page_bytes
    assert store_bytes == cost.engine_bytes(1, MOST_TOKENS, step=16)


def test_a_length_is_still_a_limit(llama: tuple[Path, Any]) -> None:
    """`max_model_len` beyond the model's own positions being refused, or ignored."""
    folder, _ = llama
    engine = llm(folder, max_model_len=150)
    assert len(generate(engine, [prompts()[0]], 60)[0]) == 60
    assert len(generate(engine, [prompts()[0]], 61)[0]) == 60


@pytest.mark.parametrize("text", ["4", "4+0", "-1+9", "4+x", "", "4+1020+3"])
def test_what_is_no_reach(text: str) -> None:
    """A misspelt option being taken for another."""
    with pytest.raises(ValueError, match="is not SINKS"):
        read_streaming(text)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deepseek_v3", {}, "keeps latents"),
        ("mamba", {}, "has no attention"),
        ("llama-dynamic", {}, "dynamic rope"),
        ("mistral", {"sliding_window": 23}, "sees 23 tokens only"),
        ("llama", {"max_position_embeddings": 20}, "more tokens than the 20 positions"),
    ],
)
def test_refusals(family: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Results without meaning instead of an error that says why."""
    make_oracle(family, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, streaming=STREAMING)
