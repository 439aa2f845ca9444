"""Decode steps as graphs, on the CPU: Triton's interpreter, and a tape instead of torch.cuda.CUDAGraph."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_adapter
from oracle import VOCAB, make_oracle
from tape import TapeCapture

from foveal import LLM, SamplingParams
from foveal.engine.graphs import DecodeGraphs, GraphLimits

# Prompts on both sides of a page's and of the selection's edge; the last ones wait until others have ended.
LENGTHS, NEW, SEATS, MOST = (61, 6, 62, 11, 5), (7, 9, 4, 6, 3), 4, 128


def generate(folder: Path, capture: TapeCapture | None, **options: Any) -> tuple[list[list[int]], LLM]:
    """Greedy tokens of all prompts; decode steps are graphs where there is a `capture`."""
    llm = LLM(
        folder,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=MOST,
        max_num_seqs=SEATS,
        dtype="float32",
        **options,
    )
    if capture is not None:
        runner = llm.engine._runner
        limits = GraphLimits(SEATS, -(-MOST // 64), least_pages=1)
        step = lambda batch: runner._model.step(batch, runner._store).logits_LV  # noqa: E731
        runner._graphs = DecodeGraphs(step, limits, "cpu", capture)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in NEW]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    return [output.outputs[0].token_ids for output in outputs], llm


FAMILIES = {
    "llama-dynamic": {},
    "mistral": {},
    "deepseek_v32": {},
    "glm_moe_dsa": {"index_topk": 64},  # dense in the graphs of one page, sparse in those of two
    "qwen3_next": {},
    "jamba": {},
    "kimi_linear": {},
    "mamba2": {},
}


# Sizes of the selection of grouped-query attention: always sparse; dense in the graphs of one page.
ADAPTERS = {"llama-adapter": 12, "qwen3-adapter": 64}


@pytest.mark.parametrize("family", [*FAMILIES, *ADAPTERS])
def test_tokens(family: str, tmp_path: Path) -> None:
    """Sequences that come and go, contexts that grow onto another page and into another graph, past the selection's
    size, rows that are filled up: a number of the host, or of an earlier step, that is still in the graph."""
    options = {}
    make_oracle(family.removesuffix("-adapter"), tmp_path, **FAMILIES.get(family, {}))
    if family in ADAPTERS:
        options = {"adapter": make_adapter(tmp_path, tmp_path / "indexers", ADAPTERS[family])}
    expected, _ = generate(tmp_path, None, **options)
    capture = TapeCapture()
    tokens, llm = generate(tmp_path, capture, **options)
    assert tokens == expected
    sizes = set(llm.engine._runner._graphs._graphs)
    assert {pages for _, pages in sizes} == {1, 2} and len({sequences for sequences, _ in sizes}) > 1
    assert capture.captured == len(sizes) < capture.replayed


def test_a_model_that_cannot(tmp_path: Path) -> None:
    """A version that reads as many keys as the graph's bound, or a request that ends over it."""
    make_oracle("llama", tmp_path)
    expected, _ = generate(tmp_path, None, streaming="2+20")
    capture = TapeCapture()
    assert generate(tmp_path, capture, streaming="2+20")[0] == expected
    assert not capture.captured


def test_preemption(tmp_path: Path) -> None:
    """Pages that belong to another sequence by now; padding that writes to them."""
    make_oracle("deepseek_v32", tmp_path)
    options = {"kv_cache_dtype": "fp8", "index_dtype": "fp8"}
    expected, roomy = generate(tmp_path, None, **options)
    tight = 4 * roomy._cache_plan.page_bytes
    tokens, llm = generate(tmp_path, TapeCapture(), kv_cache_memory=tight, **options)
    assert tokens == expected
    assert llm.engine.preemptions
