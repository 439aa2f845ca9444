"""A Mamba model beside an attention model of the same size, through the engine: time and memory of decoding from 1K to
256K tokens, where the two cross, and what a second prompt with a shared beginning waits for its first token.

    python benchmarks/recurrent_decode.py [--contexts 1024 ...] [--prefix 8192] [--quick] [--json] [--plot FILE]

Random weights, float32, one sequence. Attention is grouped-query, 8 heads on 2, so its cache is a quarter of plain
multi-head attention's. Up to 4096 tokens the context is computed; beyond, nobody waits for the prefill: the page table
is filled as if it had been, with random keys and values in the pages (and a zero state in Mamba's slot), and the engine
takes it for a prefix that it knows. What a step computes and reads is the same. Both models take turns.

Reuse: two prompts begin with the same tokens and end with some of their own. The first is computed whole, the second
goes on from a snapshot (Mamba), cached pages (attention), or both (the hybrid).
"""

import argparse
import gc
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import torch
from report import circumstances, print_table
from vs_transformers import FovealSide

from foveal import LLM
from foveal.cache.store import CacheStore
from foveal.config import ModelConfig
from foveal.config.model import BlockConfig, GQAConfig, LayerConfig, MambaConfig, MLPConfig, RopeConfig
from foveal.costs.parameters import total_parameters
from foveal.models.decoder import Decoder
from foveal.train.initial import initialise

_VOCABULARY = 4096
_COMPUTED_MOST = 4096
_ENDS = (32, 256)
_STEPS = 512  # the most that any sequence decodes


@dataclass(frozen=True)
class Size:
    """How wide the models are, and how deep."""

    hidden: int
    attention_layers: int
    mamba_layers: int

    def model(self, name: str) -> ModelConfig:
        """The "mamba", "attention" or "hybrid" (1 attention layer to 7 of Mamba) of this size."""
        head = self.hidden // 8
        rope = RopeConfig(dim=head, theta=500_000.0)
        attention = BlockConfig(GQAConfig(heads=8, kv_heads=2, head_dim=head, scale=head**-0.5, rope=rope))
        feed_forward = BlockConfig(MLPConfig(self.hidden * 11 // 4))
        mamba = BlockConfig(MambaConfig(2 * self.hidden, state=16, conv=4, dt_rank=self.hidden // 16, norms=False))
        layers: list[LayerConfig] = [(attention, feed_forward)] * self.attention_layers
        if name == "mamba":
            layers = [(mamba,)] * self.mamba_layers
        elif name == "hybrid":
            count = self.mamba_layers - 1  # a Transformer's layer has the weights of nearly two
            layers = [(attention, feed_forward) if number % 8 == 4 else (mamba,) for number in range(count)]
        return ModelConfig(name, _VOCABULARY, self.hidden, tuple(layers), 1e-6, 1 << 20, tied_embeddings=True)


@dataclass(frozen=True)
class DecodeRow:
    """One model at one context; the time is a median."""

    model: str
    context: int
    computed: bool
    """Whether the context was, or only said to be."""
    milliseconds: float
    """Of one token."""
    cache_bytes: int
    """What the engine holds for the sequence."""
    resident_bytes: int
    """By how much the process grew, cache and scratch memory together."""


@dataclass(frozen=True)
class ReuseRow:
    """Two prompts that begin alike; times to the first token, the first time of its kind."""

    model: str
    shared: int
    own: int
    first_ms: float
    second_ms: float
    hit: int
    """Tokens that the second did not compute."""

    @property
    def ratio(self) -> float:
        """How many times sooner the second's first token comes."""
        return self.first_ms / self.second_ms


def make_decoder(config: ModelConfig) -> Decoder:
    """With random weights, packed as `LLM` packs those that it loads."""
    decoder = Decoder(config)
    initialise(decoder, seed=0)
    decoder.pack()
    return decoder


def make_llm(decoder: Decoder, tokens: int) -> LLM:
    """An engine for one sequence of so many tokens."""
    return LLM(decoder, skip_tokenizer_init=True, max_model_len=tokens, max_num_seqs=1)


def random_ids(count: int, seed: int) -> list[int]:
    """Tokens, the same at every call."""
    return torch.randint(0, _VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def pretend(llm: LLM, tokens: list[int]) -> None:
    """Let the engine believe that it has computed these tokens, and hold their pages and states: random numbers."""
    manager, store = llm.engine._manager, llm.engine._runner._store
    assert isinstance(store, CacheStore)
    for layout in store._paged():
        layout.pages.normal_()
    for block in store._blocks():
        for state in block.state.states if block.state else ():
            state.zero_()
    computed = manager.admit("pretended", tokens, (None, None))
    while computed < len(tokens):
        computed = manager.step_end("pretended", len(tokens))
        assert manager.reserve("pretended", computed)
        manager.commit("pretended", tokens, computed)
    manager.free("pretended")


def decode(decoders: dict[str, Decoder], context: int, turns: int, steps: int) -> list[DecodeRow]:
    """All models at one context, by turns."""
    assert turns * (steps + 1) < _STEPS
    prompt = random_ids(context + 1, seed=1)
    sides, sizes, grown = {}, {}, {}
    for name, decoder in decoders.items():
        gc.collect()
        before = psutil.Process().memory_info().rss
        llm = make_llm(decoder, context + 1 + _STEPS)
        if context > _COMPUTED_MOST:
            pretend(llm, prompt)
        sides[name], sizes[name] = FovealSide(llm), llm.cache_bytes(context)
        sides[name].start([prompt])
        assert context <= _COMPUTED_MOST or llm.usage.prefix_hit_tokens == context
        sides[name].step()
        grown[name] = psutil.Process().memory_info().rss - before
        del llm
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(turns):
        for name, side in sides.items():
            side.step()  # not counted: the caches are still another's
            times[name] += [side.step() for _ in range(steps)]
    return [
        DecodeRow(name, context, context <= _COMPUTED_MOST, statistics.median(own), sizes[name], grown[name])
        for name, own in times.items()
    ]


def crossover(rows: Sequence[DecodeRow]) -> float | None:
    """The context from which attention's step takes longer than Mamba's, between the measured ones by a straight line;
    None: it never does, or always."""
    times = {
        name: {row.context: row.milliseconds for row in rows if row.model == name} for name in ("attention", "mamba")
    }
    excess = [(context, times["attention"][context] - mamba) for context, mamba in times["mamba"].items()]
    for (low, below), (high, above) in pairwise(excess):
        if below < 0 <= above:
            return low + (high - low) * -below / (above - below)
    return None


def reuse(name: str, decoder: Decoder, shared: int, own: int) -> ReuseRow:
    """Two prompts through one engine, after a short one that warms it up."""
    llm = make_llm(decoder, shared + own + _STEPS)
    side = FovealSide(llm)
    side.start([random_ids(100, seed=2)])
    beginning = random_ids(shared, seed=3)
    first, second = (side.start([[*beginning, *random_ids(own, seed)]]) for seed in (4, 5))
    side.stop()
    hit = llm.usage.prefix_hit_tokens
    return ReuseRow(name, shared, own, first, second, hit)


def plot(rows: Sequence[DecodeRow], file: Path) -> None:
    """Time and memory against the context."""
    from matplotlib import pyplot

    figure, (times, sizes) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for name in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == name]
        contexts = [row.context for row in own]
        times.plot(contexts, [row.milliseconds for row in own], "o-", label=name)
        sizes.plot(contexts, [row.cache_bytes / 2**20 for row in own], "o-", label=name)
    for axes, label in ((times, "ms a token"), (sizes, "cache, MiB")):
        axes.set(xlabel="context, tokens", ylabel=label, xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file)


def print_rows(decoded: Sequence[DecodeRow], reused: Sequence[ReuseRow]) -> None:
    """Both tables and the crossover."""
    header = ("decode", "context", "context computed", "ms a token", "cache MiB", "grew by MiB")
    cells = [
        [
            row.model,
            str(row.context),
            "yes" if row.computed else "no",
            f"{row.milliseconds:.2f}",
            f"{row.cache_bytes / 2**20:.1f}",
            f"{row.resident_bytes / 2**20:.1f}",
        ]
        for row in decoded
    ]
    print_table(header, cells)
    crossing = crossover(decoded)
    where = "not between the contexts measured" if crossing is None else f"at {crossing:.0f} tokens"
    print(f"\nattention's step begins to take longer than Mamba's {where}\n")
    header = ("first token", "shared", "own", "first ms", "second ms", "tokens reused", "ratio")
    cells = [
        [
            row.model,
            str(row.shared),
            str(row.own),
            f"{row.first_ms:.0f}",
            f"{row.second_ms:.1f}",
            str(row.hit),
            f"{row.ratio:.1f}",
        ]
        for row in reused
    ]
    print_table(header, cells)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+", help="default: 1K to 256K, by fours")
    parser.add_argument("--prefix", type=int, help="shared tokens of the two prompts (default: 8192)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="small models, short contexts, few repetitions")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory (needs matplotlib)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = Size(128, 4, 7) if arguments.quick else Size(512, 8, 13)
    contexts = arguments.contexts or [
        1 << power for power in (range(10, 15, 2) if arguments.quick else range(10, 19, 2))
    ]
    prefix = arguments.prefix or (1024 if arguments.quick else 8192)
    turns, steps = (2, 4) if arguments.quick else (5, 16)

    decoders = {name: make_decoder(size.model(name)) for name in ("mamba", "attention", "hybrid")}
    decoded = [row for context in contexts for row in decode(decoders, context, turns, steps)]
    reused = [reuse(name, decoder, prefix, own) for own in _ENDS for name, decoder in decoders.items()]
    parameters = {name: total_parameters(size.model(name)).total for name in decoders}
    if arguments.plot:
        plot(decoded, arguments.plot)
    if arguments.json:
        rows = {
            "decode": [asdict(row) for row in decoded],
            "reuse": [asdict(row) | {"ratio": row.ratio} for row in reused],
        }
        facts = {"circumstances": circumstances(), "parameters": parameters, "crossover_tokens": crossover(decoded)}
        print(json.dumps(facts | rows))
        return
    print(", ".join(f"{name} {value}" for name, value in circumstances().items()))
    print("parameters: " + ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in parameters.items()), end="\n\n")
    print_rows(decoded, reused)


if __name__ == "__main__":
    main()
