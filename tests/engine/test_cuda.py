"""Decode steps on a GPU as CUDA graphs; needs one (`make cuda`)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import VOCAB, make_oracle

from foveal import LLM, SamplingParams

pytestmark = pytest.mark.cuda
# On both sides of a page's and of the selection's edge; the last ones wait until others have ended.
LENGTHS, NEW = (61, 6, 62, 11, 5), (7, 9, 4, 6, 3)
EIGHT_BITS = {"kv_cache_dtype": "fp8", "index_dtype": "fp8"}


def generate(folder: Path, **options: Any) -> tuple[list[list[int]], LLM]:
    llm = LLM(folder, dtype="float32", skip_tokenizer_init=True, max_model_len=128, max_num_seqs=4, **options)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in NEW]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    return [output.outputs[0].token_ids for output in outputs], llm


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama-dynamic", {}), ("mistral", {}), ("deepseek_v32", EIGHT_BITS), ("qwen3_next", {}), ("kimi_linear", {})],
)
def test_graphs(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """A graph that reads what was there when it was captured; kernels that read records otherwise than torch."""
    make_oracle(family, tmp_path)
    expected, _ = generate(tmp_path, device="cpu", **options)
    eager, _ = generate(tmp_path, device="cuda", enforce_eager=True, **options)
    graphs, llm = generate(tmp_path, device="cuda", **options)
    assert eager == expected and graphs == expected
    assert llm.engine._runner._graphs._graphs  # some were captured
