"""What rounding the weights costs in quality: LAMBADA accuracy and perplexity, and the weights' size, beside bfloat16.

The model `smollm2` comes as a GGUF of 4 bits already (Q4_1: groups of 32 with a scale and a lowest value), so that its
int4 rounds rounded weights once more, on a grid like their own. It flatters int4; `--model` names another one.
"""

import argparse
import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from lambada import encode, foveal_hits, read_examples
from report import circumstances, print_table
from torch.nn.functional import cross_entropy

from foveal import LLM, load_model
from foveal.models.decoder import Decoder
from foveal.models.resolve import resolve_model
from foveal.nn.linear import Linear
from foveal.nn.moe import Experts

# dtype and quantization.
VARIANTS = (
    ("float32", None),
    ("bfloat16", None),
    ("bfloat16", "int8"),
    ("bfloat16", "int4"),
)
WINDOW = 512
"""Tokens that are predicted from those before them in the same window."""
TEXT_START = 20_000
"""Characters left out at the beginning of the text: title and contents."""


@torch.inference_mode()
def perplexity(decoder: Decoder, ids: list[int]) -> float:
    """exp of the mean negative log likelihood of every token of each window but its first."""
    losses = []
    for start in range(0, len(ids) - WINDOW, WINDOW):
        window_N = torch.tensor(ids[start : start + WINDOW + 1])
        logits_NV = decoder(window_N[None, :-1])[0]
        losses.append(cross_entropy(logits_NV, window_N[1:]).item())
    return math.exp(sum(losses) / len(losses))


def weight_bytes(decoder: Decoder) -> int:
    """Of everything that a step reads; a head that is tied to the embeddings counts once more where it is a copy."""
    total = sum(parameter.nbytes for parameter in decoder.parameters())
    for module in decoder.modules():
        if isinstance(module, Linear) and module.quantised is not None:
            total += module.quantised.nbytes
        if isinstance(module, Experts) and module.quantised is not None:
            total += sum(part.nbytes for part in module.quantised)
    head = decoder._packed_head
    return total if head is None else total + head.nbytes


def measure(
    path: Path, data: Path, dtype: str, quantization: str | None, options: argparse.Namespace
) -> dict[str, Any]:
    """One row of the table."""
    llm = LLM(path, dtype=dtype, quantization=quantization)
    pairs = read_examples(data / "eval" / "lambada_openai.jsonl", options.limit)
    hits = foveal_hits(llm, [encode(llm.tokenizer, context, word) for context, word in pairs])
    with gzip.open(data / "text" / "novel_0.txt.gz", "rt", encoding="utf-8") as file:
        text = file.read()[TEXT_START : TEXT_START + 12 * options.tokens]
    ids = llm.tokenizer.encode(text, add_special_tokens=False)[: options.tokens + 1]
    del llm
    decoder = load_model(path, dtype=dtype, quantization=quantization)
    return {
        "weights": quantization or dtype,
        "activations": dtype,
        "bytes": weight_bytes(decoder),
        "lambada": sum(hits) / len(hits),
        "perplexity": perplexity(decoder, ids),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help="whatever foveal loads (default: smollm2)")
    parser.add_argument("--limit", type=int, default=500, help="LAMBADA passages, a fixed random choice (default: 500)")
    parser.add_argument(
        "--tokens", type=int, default=8192, help=f"of the novel, in windows of {WINDOW} (default: 8192)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    folder = os.environ.get("FOVEAL_TEST_DATA")
    if not folder:
        parser.error("FOVEAL_TEST_DATA must name the folder that holds eval/ and text/")
    if options.tokens < WINDOW:
        parser.error(f"--tokens must be at least {WINDOW}")
    path = resolve_model(options.model)
    rows = [measure(path, Path(folder), *variant, options) for variant in VARIANTS]
    report = {"model": options.model, "passages": options.limit, "tokens": options.tokens, "rows": rows}
    if options.json:
        print(json.dumps({**report, "circumstances": circumstances()}))
        return
    print(", ".join(f"{name} {value}" for name, value in circumstances().items()))
    print(f"{options.model}, {options.limit} passages, {options.tokens} tokens")
    cells = [
        [
            row["weights"],
            row["activations"],
            f"{row['bytes'] / 2**20:.0f}",
            f"{row['lambada']:.4f}",
            f"{row['perplexity']:.3f}",
            f"{row['perplexity'] / rows[1]['perplexity'] - 1:+.2%}",
        ]
        for row in rows
    ]
    print_table(["weights", "activations", "MiB", "LAMBADA", "perplexity", "to bfloat16"], cells)


if __name__ == "__main__":
    main()
