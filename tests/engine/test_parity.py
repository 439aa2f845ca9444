"""Every family against transformers on random tiny checkpoints: logits, and greedy tokens however scheduled. Ours on
the CPU and, where there is one, on a GPU (`make cuda`); transformers on the CPU."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import FAMILIES, VOCAB, as_v4, make_oracle

from foveal import LLM, SamplingParams, load_model
from foveal.cache.store import CachePlan, CacheStore
from foveal.config import read_config
from foveal.costs.cache_bytes import cache_cost, cache_dtypes
from foveal.nn.mla import MLA

LENGTH = 90
NEW_TOKENS = 12


@pytest.fixture(scope="module", params=FAMILIES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, make_oracle(request.param, folder)


def prompts() -> list[list[int]]:
    """Long ones, two that begin alike for more than a page, and a short one."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (3, LENGTH), generator=generator).tolist()
    return [ids[0], ids[0][:70] + ids[1][:20], ids[2], ids[1][:9]]


@torch.no_grad()
def greedy(model: transformers.PreTrainedModel, prompt: list[int]) -> list[int]:
    """The oracle's own loop: `generate` would add the stopping rules of generation_config.json."""
    model(torch.tensor([[3]]))  # a short input makes its dynamic rope forget the lengths it has seen
    name = "cache_params" if model.config.model_type in ("mamba", "mamba2") else "past_key_values"
    past, ids, tokens = None, torch.tensor([prompt]), []
    for _ in range(NEW_TOKENS):
        output = model(ids, use_cache=True, **{name: past})
        past, ids = output[name], output.logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
    return tokens


def logits(model: transformers.PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The oracle's. Delta rules token by token: its chunks lose small decays behind large ones, up to 3e-4."""
    if model.config.model_type not in ("kimi_linear", "qwen3_next"):
        return model(ids).logits
    past, parts = None, []
    for column in ids.split(1, 1):
        output = model(column, past_key_values=past, use_cache=True)
        past = output.past_key_values
        parts.append(output.logits)
    return torch.cat(parts, 1)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


def test_logits(oracle: tuple[Path, Any], device: str) -> None:
    """Any difference in a layer, a rope, a norm, a router, or the selection."""
    folder, model = oracle
    ids = torch.randint(3, VOCAB, (2, LENGTH))
    model(ids[:, :1])
    ours = load_model(folder, dtype="float32", device=device)
    with torch.no_grad():
        expected = logits(model, ids)
        assert relative_error(ours(ids.to(device)).cpu(), expected) < 1e-4
        for module in ours.modules():
            if isinstance(module, MLA):
                module.form = "expanded" if module.form == "absorbed" else "absorbed"
        assert relative_error(ours(ids.to(device)).cpu(), expected) < 1e-4


def test_bfloat16(oracle: tuple[Path, Any], device: str) -> None:
    """Something rounded to 16 bits that transformers keeps wide: a decay, a state, a norm around one."""
    folder, model = oracle
    if "linear_attention" not in getattr(model.config, "layer_types", ()):
        pytest.skip("no recurrent layer")
    ids = torch.randint(3, VOCAB, (2, LENGTH))
    with torch.no_grad():
        exact, theirs = model(ids).logits, deepcopy(model).bfloat16()(ids).logits.float()
        ours = load_model(folder, dtype="bfloat16", device=device)(ids.to(device)).cpu()
    # Either may be the better one by a half, by where a router falls.
    assert (ours - exact).norm() < 2 * (theirs - exact).norm()


def test_v4_spelling(oracle: tuple[Path, Any], tmp_path: Path) -> None:
    """A config written by transformers v4 being read as something else."""
    folder, _ = oracle
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    as_v4(tmp_path)
    ids = torch.randint(3, VOCAB, (1, LENGTH))
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(ids), load_model(folder)(ids))


SCHEDULES: dict[str, dict[str, Any]] = {
    "one by one": {"max_num_seqs": 1, "enable_prefix_caching": False},
    "mixed batch": {"enable_prefix_caching": False},
    "chunks of 7": {"max_num_batched_tokens": 7, "enable_prefix_caching": False},
    "prefix hits": {"max_num_seqs": 1},
    "eager": {"enforce_eager": True},
}


def llm(folder: Path, device: str, **options: Any) -> LLM:
    return LLM(folder, dtype="float32", device=device, skip_tokenizer_init=True, max_model_len=160, **options)


def plan_of(model: LLM) -> CachePlan:
    store = model.engine._runner._store
    assert isinstance(store, CacheStore)
    return store.plan


def allocated(model: LLM) -> int:
    """Bytes of the cache's tensors."""
    store = model.engine._runner._store
    assert isinstance(store, CacheStore)
    pages = sum(layout.pages.nbytes for layout in store._paged())
    return pages + sum(part.nbytes for block in store._blocks() if block.state for part in block.state.states)


def generate(model: LLM, several: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in several], params)
    return [output.outputs[0].token_ids for output in outputs]


def test_greedy_tokens(oracle: tuple[Path, Any], device: str) -> None:
    """The cache, the batch or the schedule changing what is generated; on a GPU also graphs, but for "eager"."""
    folder, model = oracle
    expected = [greedy(model, prompt) for prompt in prompts()]
    for name, options in SCHEDULES.items():
        assert generate(llm(folder, device, **options), prompts()) == expected, name


def test_prefix_hits_happen(oracle: tuple[Path, Any], device: str) -> None:
    """The schedule named "prefix hits" having none; a recurrent layer needs a snapshot for one."""
    folder, _ = oracle
    model = llm(folder, device, max_num_seqs=1)
    generate(model, prompts())
    assert model.usage.prefix_hit_tokens > 0
    assert (model.usage.snapshots > 0) == plan_of(model).has_slots


@pytest.mark.parametrize("caching", [True, False])
def test_memory_is_that_of_the_plan(oracle: tuple[Path, Any], caching: bool, device: str) -> None:
    """Tensors of another size than `foveal plan` says."""
    folder, _ = oracle
    cost = cache_cost(read_config(folder), cache_dtypes("float32"))
    planned = cost.engine_bytes(3, 160) - (0 if caching else 3 * cost.snapshot_bytes)
    assert allocated(llm(folder, device, max_num_seqs=3, enable_prefix_caching=caching)) == planned


def test_preemption(oracle: tuple[Path, Any], device: str) -> None:
    """A preempted sequence going on from what it no longer has."""
    folder, model = oracle
    several = [(prompt * 2)[:122] for prompt in prompts()[:3]]
    plan = plan_of(llm(folder, device))
    # Each prompt takes two pages, and a third before it ends: four are enough for two prompts, but not for both ends.
    # Behind a window a prompt soon keeps only one. One page more is the null page.
    memory = plan.page_bytes * (4 if plan.window else 5) + plan.slot_bytes * 5
    expected = [greedy(model, prompt) for prompt in several]
    for options in ({"enable_prefix_caching": False}, {}) if plan.has_slots else ({"enable_prefix_caching": False},):
        tight = llm(folder, device, max_num_seqs=4, kv_cache_memory=memory, **options)
        assert generate(tight, several) == expected
        # What keeps nothing for each token never runs out of it.
        assert (tight.engine.preemptions > 0) == plan.has_pages


def test_fork(oracle: tuple[Path, Any], device: str) -> None:
    """Several completions of one prompt writing into each other's pages or states."""
    folder, model = oracle
    expected = greedy(model, prompts()[0])
    params = SamplingParams(n=3, temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = llm(folder, device).generate({"prompt_token_ids": prompts()[0]}, params)[0].outputs
    assert [output.token_ids for output in outputs] == [expected] * 3
