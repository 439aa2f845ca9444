"""LAMBADA accuracy with foveal and with transformers, on the same dequantised weights and the same token ids.

An example counts when every token of the last word is the likeliest one given all tokens before it: the usual
definition (Paperno et al., arXiv 1606.06031), as lm-evaluation-harness scores `lambada_openai`.
"""

import argparse
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from oracle import load_transformers
from report import circumstances, print_table
from transformers import PreTrainedModel

from foveal import LLM, SamplingParams
from foveal.models.resolve import resolve_model

_SEED = 0


@dataclass(frozen=True)
class Example:
    """The token ids of a passage; the last `answer_length` are its last word."""

    ids: list[int]
    answer_length: int


def read_examples(file: Path, limit: int) -> list[tuple[str, str]]:
    """`limit` pairs (context, last word), the same ones at every call."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    chosen = random.Random(_SEED).sample(lines, min(limit, len(lines)))
    return [(line["context"], line["continuation"]) for line in chosen]


def encode(tokenizer: Any, context: str, word: str) -> Example:
    """Context and word encoded together, split where the context ends."""
    before = tokenizer.encode(context, add_special_tokens=False)
    whole = tokenizer.encode(f"{context} {word}", add_special_tokens=False)
    assert whole[: len(before)] == before, "a token spans the end of the context"
    return Example(whole, len(whole) - len(before))


def foveal_hits(llm: LLM, examples: list[Example]) -> list[bool]:
    """Through the engine: each prompt token's rank among all tokens, 1 for the likeliest."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": example.ids} for example in examples], params)
    hits = []
    for example, output in zip(examples, outputs, strict=True):
        assert output.prompt_logprobs is not None
        answer = list(zip(example.ids, output.prompt_logprobs, strict=True))[-example.answer_length :]
        hits.append(all(entry is not None and entry[token].rank == 1 for token, entry in answer))
    return hits


@torch.inference_mode()
def transformers_hits(model: PreTrainedModel, examples: list[Example]) -> list[bool]:
    """One passage a forward."""
    hits = []
    for example in examples:
        logits_NV = model(torch.tensor([example.ids])).logits[0]
        answer = example.ids[-example.answer_length :]
        hits.append(logits_NV[-example.answer_length - 1 : -1].argmax(-1).tolist() == answer)
    return hits


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help="whatever foveal loads (default: smollm2)")
    parser.add_argument("--limit", type=int, default=500, help="passages, a fixed random choice (default: 500)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    folder = os.environ.get("FOVEAL_TEST_DATA")
    if not folder:
        parser.error("FOVEAL_TEST_DATA must name the folder that holds eval/lambada_openai.jsonl")

    pairs = read_examples(Path(folder) / "eval" / "lambada_openai.jsonl", arguments.limit)
    path = resolve_model(arguments.model)
    llm = LLM(str(path), dtype=arguments.dtype)
    examples = [encode(llm.tokenizer, context, word) for context, word in pairs]
    ours = foveal_hits(llm, examples)
    theirs = transformers_hits(load_transformers(path, getattr(torch, arguments.dtype)), examples)
    report = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "passages": len(examples),
        "foveal": sum(ours) / len(ours),
        "transformers": sum(theirs) / len(theirs),
        "answers_alike": sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours),
        "circumstances": circumstances(),
    }
    print_report(report, as_json=arguments.json)


def print_report(report: dict[str, Any], *, as_json: bool) -> None:
    """The accuracies side by side."""
    if as_json:
        print(json.dumps(report))
        return
    print(", ".join(f"{name} {value}" for name, value in report["circumstances"].items()))
    difference = report["foveal"] - report["transformers"]
    print_table(
        ["model", "dtype", "passages", "transformers", "foveal", "difference", "answers alike"],
        [
            [
                report["model"],
                report["dtype"],
                str(report["passages"]),
                f"{report['transformers']:.4f}",
                f"{report['foveal']:.4f}",
                f"{difference:+.4f}",
                f"{report['answers_alike']:.1%}",
            ]
        ],
    )


if __name__ == "__main__":
    main()
