"""A whole model on the Triton kernels, interpreted: what a step on a card runs, short of the card."""

from pathlib import Path

import pytest
import torch
from oracle import VOCAB, make_oracle

from foveal import LLM, SamplingParams
from foveal.kernels import attention, select, sparse_attention


def generate(folder: Path, prompts: list[list[int]], **options: str) -> list[list[int]]:
    """Greedy tokens; prompts in chunks, decoding together."""
    options = {"dtype": "float32", "mla_form": "absorbed", **options}
    llm = LLM(folder, enforce_eager=True, skip_tokenizer_init=True, max_model_len=64, **options)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    return [output.outputs[0].token_ids for output in outputs]


def test_tokens_of_a_sparse_model(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Arguments that a model gives and tests of one kernel do not: shared pages, ropes, records of eight bits."""
    make_oracle("deepseek_v32", tmp_path)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 18), generator=generator).tolist()
    prompts = [ids[0], ids[1][:14]]
    options = {"index_dtype": "fp8", "kv_cache_dtype": "fp8"}
    expected = generate(tmp_path, prompts, **options)
    request.getfixturevalue("interpreted")
    assert {operation.chosen("cpu") for operation in (attention, sparse_attention, select)} == {"triton"}
    assert generate(tmp_path, prompts, **options) == expected
