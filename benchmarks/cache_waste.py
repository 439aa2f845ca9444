"""How much of the allocated cache holds no token: pages of 64 tokens against one contiguous piece a request.

200 requests of uniform random length, all of them at a time, run through `LLM`'s engine (a random model of a few
kilobytes: what it says does not matter), and the engine's own figure is read after every step. Contiguous allocation,
for comparison, gives every running request room for the longest that is allowed.

A request's last page is half empty on average, so pages waste about 32 of 1056 places (3 %) at 1 to 2048 tokens. The
second row shows the limit of that: at 1 to 512 tokens it is arithmetically about 32 of 288 (11 %), whatever the engine
does.

    python benchmarks/cache_waste.py [--json] [--seed N]
"""

import argparse
import json
import random
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from report import print_table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from foveal import LLM, SamplingParams
from foveal.cache import PAGE_SIZE
from foveal.engine import Request

REQUESTS = 200
LONGEST = 2048
ANSWER = 16


@dataclass(frozen=True)
class Waste:
    """Shares, 0 to 1, of the allocated token places that hold no token, over the same steps."""

    lengths: str
    paged: float
    paged_when_fullest: float
    contiguous: float


def tiny_model(folder: Path) -> None:
    """A random llama that costs next to nothing to run."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    disable_progress_bar()
    config = LlamaConfig(vocab_size=32, max_position_embeddings=LONGEST, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)


def measure(folder: Path, longest: int, seed: int) -> Waste:
    """Run requests of 1 to `longest` tokens each, answer included, and look at the cache after every step."""
    options = {"max_num_seqs": REQUESTS, "max_num_batched_tokens": REQUESTS * LONGEST}
    llm = LLM(folder, skip_tokenizer_init=True, enable_prefix_caching=False, **options)
    randomness = random.Random(seed)
    for key in range(REQUESTS):
        length = randomness.randint(1, longest)
        answer = min(ANSWER, max(1, length - 1))
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        llm.engine.add(Request(str(key), [3] * max(1, length - answer), params))
    held = paged = contiguous = 0
    fullest = resident_waste = 0.0
    while llm.engine.has_work:
        llm.engine.step()
        usage = llm.usage
        held += usage.tokens_held
        paged += usage.pages_in_use * PAGE_SIZE
        contiguous += LONGEST * llm.engine.running
        if usage.tokens_held > fullest:
            fullest, resident_waste = usage.tokens_held, usage.waste
    return Waste(f"1-{longest}", 1 - held / paged, resident_waste, 1 - held / contiguous)


def main() -> None:
    parser = argparse.ArgumentParser(description="Share of the allocated cache that holds no token.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(Path(folder))
        rows = [measure(Path(folder), longest, arguments.seed) for longest in (2048, 512)]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    print(f"Allocated cache without a token: {REQUESTS} requests at a time, seed {arguments.seed}")
    header = ["tokens a request", f"pages of {PAGE_SIZE}, mean", "when fullest", f"contiguous, {LONGEST}"]
    shares = [(row.paged, row.paged_when_fullest, row.contiguous) for row in rows]
    print_table(header, [[row.lengths, *(f"{x:.1%}" for x in line)] for row, line in zip(rows, shares, strict=True)])


if __name__ == "__main__":
    main()
