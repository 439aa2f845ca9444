"""What each design of a model buys: associative recall (MQAR) and perplexity of small models of equal size, trained
from random weights by one recipe, beside what a sequence of each keeps in memory.

    FOVEAL_TEST_DATA=... python benchmarks/architectures.py [--output DIR] [--only DESIGN ...] [--json] [--plot FILE]

Full attention (llama), DSA (deepseek_v32 without experts), Mamba, Mamba-2, and a hybrid (jamba without experts: one
layer of attention to seven of Mamba). Every design is trained twice with the same data, updates, tokens, optimiser and
schedule: on MQAR alone (rows of 32 tokens, 1 to 7 pairs of few keys and values), and on text alone (rows of 512
tokens). On text the learning rate alone is each design's own: of `RATES` that with the lowest perplexity after a short
trial. DSA learns as it is meant to: two thirds of the updates dense, then a short warm-up of its indexers alone (beside
the updates that all have), then the last third with its selection, with which it is measured too.

A run that was stopped goes on where it was; each model is a line of OUTPUT/results.jsonl once it is measured, known by
all that its recipe says.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from report import circumstances, print_table

from foveal.config import read_config
from foveal.costs.cache_bytes import cache_cost, cache_dtypes
from foveal.costs.parameters import total_parameters
from foveal.evaluate.associations import association_accuracy
from foveal.evaluate.perplexity import by_position, window_losses
from foveal.evaluate.text import Window
from foveal.train.data.settings import DataSettings, RetrievalSettings, TextSettings, TokenizerSettings
from foveal.train.schema import ModelSettings, Recipe, RunSettings, StageSettings
from foveal.train.trainer import Trainer

Task = Literal["mqar", "text"]
TASKS: tuple[Task, ...] = ("mqar", "text")

VOCABULARY, HIDDEN = 512, 64
CONTEXT: Mapping[Task, int] = {"mqar": 32, "text": 512}
TOKENS = 2048  # of an update
UPDATES: Mapping[Task, int] = {"mqar": 250, "text": 64}
MQAR_RATE = 6e-3
TRIAL_UPDATES, RATES = 12, (1.2e-2, 2.4e-2, 4.8e-2)  # on text
DECAY = 0.3  # share of the updates in which the learning rate falls
KEYS = 8  # of MQAR; as many values
PAIRS = (2, 3, 4, 6, 8)  # of which up to 7 fit into the rows trained on
ROWS = 64
WINDOWS = 64  # of held-out text
LENGTHS = (4096, 262_144)  # at which memory is told
LARGEST_DIFFERENCE = 0.03  # of parameters, from the mean of all

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 4}


@dataclass(frozen=True)
class Design:
    """A model by its config.json."""

    name: str
    title: str
    config: Mapping[str, Any]

    @property
    def parameters(self) -> int:
        """All of them, the embedding included."""
        return total_parameters(read_config(dict(self.config))).total

    def memory(self) -> dict[str, Any]:
        """What a sequence keeps in bfloat16 (index keys in fp8, states in float32)."""
        cost = cache_cost(read_config(dict(self.config)), cache_dtypes("bfloat16"))
        return {
            "bytes_per_token": cost.bytes_per_token,
            "state_bytes": cost.state_bytes,
            "bytes_at": {length: cost.needed_bytes(length) for length in LENGTHS},
        }


DESIGNS = (
    Design(
        "attention",
        "full attention",
        {"model_type": "llama", **_COMMON, **_ATTENTION, "num_hidden_layers": 2, "intermediate_size": 336},
    ),
    Design(
        "dsa",
        "DSA, top-k 8",
        {
            "model_type": "deepseek_v32",
            **_COMMON,
            **_ATTENTION,
            "num_hidden_layers": 2,
            "intermediate_size": 304,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "index_n_heads": 8,
            "index_head_dim": 16,
            "index_topk": 8,
            # Every layer is dense: the experts' sizes are asked for all the same.
            "first_k_dense_replace": 2,
            "n_routed_experts": 1,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 1,
        },
    ),
    Design(
        "mamba",
        "Mamba",
        {"model_type": "mamba", **_COMMON, "num_hidden_layers": 5, "state_size": 16},
    ),
    Design(
        "mamba2",
        "Mamba-2",
        {
            "model_type": "mamba2",
            **_COMMON,
            "num_hidden_layers": 5,
            "state_size": 48,
            "n_groups": 1,
            "num_heads": 4,
            "head_dim": 32,
        },
    ),
    Design(
        "hybrid",
        "hybrid 1:7",
        {
            "model_type": "jamba",
            **_COMMON,
            **_ATTENTION,
            "num_hidden_layers": 8,
            "mamba_expand": 1,
            "intermediate_size": 20,
            "num_experts": 1,
            "num_experts_per_tok": 1,
        },
    ),
)


@dataclass(frozen=True)
class Run:
    """One model to be trained."""

    design: Design
    task: Task
    updates: int
    rate: float

    @property
    def key(self) -> dict[str, Any]:
        """What its result is known by: with whatever else its recipe says, as a hash."""
        stages = [asdict(stage) for stage in self.stages()]
        recipe = json.dumps([self.design.config, stages, KEYS if self.task == "mqar" else None])
        told = {"design": self.design.name, "task": self.task, "updates": self.updates, "rate": self.rate}
        return {**told, "recipe": sha256(recipe.encode()).hexdigest()[:12]}

    def stages(self) -> tuple[StageSettings, ...]:
        """The same for all designs, but that the last third of a sparse one's is sparse."""
        whole = StageSettings(
            kind="pretrain",
            steps=self.updates,
            context=CONTEXT[self.task],
            tokens_per_step=TOKENS,
            micro_tokens=TOKENS,
            sources=(self.task,),
            optimizer="muon",
            learning_rate=self.rate,
            schedule="wsd",
            warmup_steps=10,
            decay_share=DECAY,
            final_share=0.02,
        )
        if "index_topk" not in self.design.config:
            return (whole,)
        last = -(-self.updates // 3)
        dense = replace(whole, steps=self.updates - last, schedule="constant")
        warmup = replace(whole, kind="warmup", steps=max(1, self.updates // 10), optimizer="adamw", learning_rate=4e-3)
        # The rate falls in the same updates as everybody's.
        sparse = replace(whole, kind="sparse", steps=last, warmup_steps=0, decay_share=DECAY * self.updates / last)
        return dense, warmup, sparse

    def recipe(self, text: Path, output: Path) -> Recipe:
        """The one recipe, with the design's config in it."""
        folder = output / "-".join(str(part) for part in self.key.values())
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.json"
        config.write_text(json.dumps(self.design.config, indent=2) + "\n", encoding="utf-8")
        made_up = RetrievalSettings(
            name="mqar", tasks=("mqar",), mqar_keys=KEYS, min_length=CONTEXT["mqar"], other_weight=0.0
        )
        data = DataSettings(
            tokenizer=TokenizerSettings(vocab_size=VOCABULARY),
            text=(TextSettings(files=(text,), name="text"),),
            retrieval=(made_up,),
        )
        run = RunSettings(output=folder, evaluate_tokens=0, checkpoint_minutes=2.0)
        return Recipe(ModelSettings(config=config), data, self.stages(), run)


@dataclass(frozen=True)
class Bench:
    """Where text is and results go. What is done already is read, not done again."""

    text: Path
    output: Path

    def result(self, run: Run) -> dict[str, Any]:
        """What came of a run."""
        file = self.output / "results.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        for found in map(json.loads, lines):
            if run.key.items() <= found.items():
                return dict(found)
        print(f"{run.design.title}: {run.task}, rate {run.rate:g}", file=sys.stderr, flush=True)
        trainer = Trainer(run.recipe(self.text, self.output))
        trainer.train()
        trainer.decoder.requires_grad_(False)  # what is only computed may be compiled
        measured = accuracies(trainer) if run.task == "mqar" else perplexity(trainer)
        found = {**run.key, "tokens": trainer.progress.tokens, "seconds": trainer.progress.seconds, **measured}
        with file.open("a", encoding="utf-8") as results:
            print(json.dumps(found), file=results)
        return found

    def rate(self, design: Design, task: Task) -> float:
        """That of recall; for text the best of `RATES` for the design."""
        if task == "mqar":
            return MQAR_RATE
        trials = {rate: self.result(Run(design, "text", TRIAL_UPDATES, rate)) for rate in RATES}
        return min(trials, key=lambda rate: float(trials[rate]["perplexity"]["nats"]))


def accuracies(trainer: Trainer) -> dict[str, Any]:
    """Recall by the number of pairs."""
    encoder = trainer.corpus.encoder
    ids = encoder.plain[: 2 * KEYS]
    cells = {pairs: association_accuracy(trainer.decoder, ids, pairs, ROWS, begin=encoder.begin) for pairs in PAIRS}
    return {"accuracy": [{"pairs": pairs, **cell.as_dict()} for pairs, cell in cells.items()]}


def perplexity(trainer: Trainer) -> dict[str, Any]:
    """Of the first windows of held-out documents."""
    corpus, length = trainer.corpus, CONTEXT["text"]
    shard, documents = corpus.shards["text"], corpus.documents("text", "held_out")
    places = [(int(one), start) for one in documents for start in range(0, int(shard.lengths[one]) - length, length)]
    apart = max(1, len(places) // WINDOWS)
    windows = [Window(tuple(shard.read(*place, length).tolist()), 0) for place in places[::apart][:WINDOWS]]
    found = by_position(window_losses(trainer.decoder, windows))
    return {"perplexity": found.whole.as_dict(), "positions": [bucket.as_dict() for bucket in found.buckets]}


def check_sizes(designs: Sequence[Design]) -> None:
    """AssertionError where one design has noticeably more to learn with than another."""
    sizes = [design.parameters for design in designs]
    mean = sum(sizes) / len(sizes)
    assert max(abs(size - mean) for size in sizes) <= LARGEST_DIFFERENCE * mean, sizes


def print_results(designs: Sequence[Design], results: Sequence[Mapping[str, Any]]) -> None:
    """What was learned, and what it costs: a line a design in each table; what is not measured is left empty."""
    by = {(found["design"], found["task"]): found for found in results}
    rates = {found["design"]: f"{found['rate']:g}" for found in results if found["task"] == "text"}
    learned, costs = [], []
    for design in designs:
        recall, text, kept = by.get((design.name, "mqar")), by.get((design.name, "text")), design.memory()
        shares = [f"{100 * cell['mean']:.1f}" for cell in recall["accuracy"]] if recall else [""] * len(PAIRS)
        read = text["perplexity"] if text else None
        learned.append(
            [design.title, *shares, f"{read['perplexity']:.2f} ± {read['perplexity_error']:.2f}" if read else ""]
        )
        costs.append(
            [
                *(design.title, rates.get(design.name, ""), str(design.parameters)),
                *(str(kept["bytes_per_token"]), f"{kept['state_bytes'] / 1024:.1f}"),
                *(f"{size / 1024:.0f}" for size in kept["bytes_at"].values()),
            ]
        )
    print_table(["values recalled of", *(f"{pairs} pairs, %" for pairs in PAIRS), "perplexity"], learned)
    print()
    memories = [f"{length // 1024}K tokens, KiB" for length in LENGTHS]
    print_table(["", "rate on text", "parameters", "bytes a token", "state, KiB", *memories], costs)


def plot(designs: Sequence[Design], results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Recall against the number of pairs; perplexity against the memory of a long sequence."""
    from matplotlib import pyplot

    figure, (recalls, prices) = pyplot.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for number, design in enumerate(designs):
        color = f"C{number}"
        for found in (found for found in results if found["design"] == design.name):
            if found["task"] == "mqar":
                shares = [100 * cell["mean"] for cell in found["accuracy"]]
                recalls.plot(PAIRS, shares, "o-", color=color, label=design.title)
            else:
                size = design.memory()["bytes_at"][LENGTHS[-1]] / 2**20
                prices.plot(size, found["perplexity"]["perplexity"], "o", color=color, label=design.title)
    recalls.plot(PAIRS, [100 / pairs for pairs in PAIRS], ":", color="0.5", label="any value told")
    recalls.set(xscale="log", xlabel="pairs in the context", ylabel="values recalled, %", ylim=(-3, 103))
    recalls.set_xticks(PAIRS, [str(pairs) for pairs in PAIRS])
    recalls.minorticks_off()
    prices.set(xscale="log", xlabel=f"memory of {LENGTHS[-1] // 1024}K tokens, MiB", ylabel="perplexity, held-out text")
    for axes in (recalls, prices):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file)


def main() -> None:
    """Parse, train, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/architectures"), help="runs and results.jsonl")
    parser.add_argument("--only", nargs="+", choices=[design.name for design in DESIGNS], metavar="DESIGN")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--rate", type=float, help="a learning rate for all, without trials")
    parser.add_argument("--share", type=float, default=1.0, help="of the updates, to try the script")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw recall and perplexity (needs matplotlib)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = os.environ.get("FOVEAL_TEST_DATA")
    if data is None:
        parser.error("FOVEAL_TEST_DATA is not set: it names the folder that holds text/classics_simple.txt.gz")
    check_sizes(DESIGNS)
    bench = Bench(Path(data) / "text" / "classics_simple.txt.gz", arguments.output)
    designs = [design for design in DESIGNS if design.name in (arguments.only or [design.name])]
    results = []
    for task, design in product(arguments.tasks, designs):
        rate = arguments.rate or bench.rate(design, task)
        results.append(bench.result(Run(design, task, round(arguments.share * UPDATES[task]), rate)))
    if arguments.plot:
        plot(designs, results, arguments.plot)
    if arguments.json:
        kept = {design.name: design.memory() for design in designs}
        print(json.dumps({"circumstances": circumstances(), "memory": kept, "results": results}))
        return
    print(", ".join(f"{name} {value}" for name, value in circumstances().items()))
    print(", ".join(f"{task}: {UPDATES[task]} updates of {TOKENS} tokens" for task in TASKS), end="\n\n")
    print_results(designs, results)


if __name__ == "__main__":
    main()
