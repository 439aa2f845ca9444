"""What each design of a model buys: associative recall (MQAR) and perplexity of small models of equal size, trained
from random weights by one recipe, beside what a sequence of each keeps in memory.

    FOVEAL_TEST_DATA=... python benchmarks/architectures.py [--output DIR] [--only DESIGN ...] [--json] [--plot FILE]

Full attention (llama), DSA (deepseek_v32 without experts), Mamba, Mamba-2, and a hybrid (jamba without experts: one
layer of attention to seven of Mamba). Every design is trained twice with the same data, updates, tokens, optimiser and
schedule: on MQAR alone (rows of 256 tokens, 1 to 63 pairs), and on text alone (rows of 512 tokens). The learning rate
alone is each design's own (`Design.rate`). DSA learns as it is meant to: two thirds of the updates dense, then a short
warm-up of its indexers alone (beside the updates that all have), then the last third with its selection, with which it
is measured too.

A run takes some 40 minutes on one core. One that was stopped goes on where it was; each model is a line of
OUTPUT/results.jsonl once it is measured.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
UPDATES, WARMUP_UPDATES = 300, 30
"""Of the whole model; of DSA's indexers besides."""
TOKENS = 2048  # of an update
CONTEXT: Mapping[Task, int] = {"mqar": 256, "text": 512}
PAIRS = (4, 8, 16, 32, 64, 128)  # of which up to 63 fit into the rows trained on
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
    rate: float
    """Of learning: the better of those tried (`--rate`)."""

    @property
    def sparse(self) -> bool:
        """Whether it has indexers, and so stages of their own."""
        return "index_topk" in self.config

    def stages(self, task: Task, updates: int) -> tuple[StageSettings, ...]:
        """What is done with it: the same for all, but that a sparse one's last third is sparse."""
        whole = StageSettings(
            kind="pretrain",
            steps=updates,
            context=CONTEXT[task],
            tokens_per_step=TOKENS,
            micro_tokens=TOKENS,
            sources=(task,),
            optimizer="muon",
            learning_rate=self.rate,
            schedule="wsd",
            warmup_steps=20,
            decay_share=0.3,
            final_share=0.02,
        )
        if not self.sparse:
            return (whole,)
        last = updates // 3
        dense = replace(whole, steps=updates - last, schedule="constant")
        warmup = replace(
            whole, kind="warmup", steps=WARMUP_UPDATES, optimizer="adamw", learning_rate=4e-3, warmup_steps=5
        )
        # The rate falls in the same updates as everybody's.
        sparse = replace(whole, kind="sparse", steps=last, warmup_steps=0, decay_share=0.3 * updates / last)
        return dense, warmup, sparse


DESIGNS = (
    Design(
        "attention",
        "full attention",
        {"model_type": "llama", **_COMMON, **_ATTENTION, "num_hidden_layers": 8, "intermediate_size": 128},
        1.2e-2,
    ),
    Design(
        "dsa",
        "DSA, top-k 32",
        {
            "model_type": "deepseek_v32",
            **_COMMON,
            **_ATTENTION,
            "num_hidden_layers": 8,
            "intermediate_size": 92,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "index_n_heads": 8,
            "index_head_dim": 16,
            "index_topk": 32,
            # Every layer is dense: the experts' sizes are asked for all the same.
            "first_k_dense_replace": 8,
            "n_routed_experts": 1,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 1,
        },
        1.2e-2,
    ),
    Design(
        "mamba",
        "Mamba",
        {"model_type": "mamba", **_COMMON, "num_hidden_layers": 10, "state_size": 16},
        1.2e-2,
    ),
    Design(
        "mamba2",
        "Mamba-2",
        {
            "model_type": "mamba2",
            **_COMMON,
            "num_hidden_layers": 10,
            "state_size": 48,
            "n_groups": 1,
            "num_heads": 4,
            "head_dim": 32,
        },
        1.2e-2,
    ),
    Design(
        "hybrid",
        "hybrid 1:7",
        {
            "model_type": "jamba",
            **_COMMON,
            **_ATTENTION,
            "num_hidden_layers": 8,
            "intermediate_size": 50,
            "num_experts": 1,
            "num_experts_per_tok": 1,
        },
        1.2e-2,
    ),
)


@dataclass(frozen=True)
class Plan:
    """How long and from what the designs learn, and where the results go."""

    text: Path
    output: Path
    updates: int

    def recipe(self, design: Design, task: Task) -> Recipe:
        """The one recipe, with a design's config in it."""
        folder = self.output / f"{design.name}-{task}-{self.updates}-{design.rate:g}"
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.json"
        config.write_text(json.dumps(design.config, indent=2) + "\n", encoding="utf-8")
        made_up = RetrievalSettings(name="mqar", tasks=("mqar",), min_length=CONTEXT["mqar"], other_weight=0.0)
        data = DataSettings(
            tokenizer=TokenizerSettings(vocab_size=VOCABULARY),
            text=(TextSettings(files=(self.text,), name="text"),),
            retrieval=(made_up,),
        )
        run = RunSettings(output=folder, evaluate_tokens=0, checkpoint_minutes=2.0)
        return Recipe(ModelSettings(config=config), data, design.stages(task, self.updates), run)

    @property
    def file(self) -> Path:
        """A line for each model that is done."""
        return self.output / "results.jsonl"


def parameters(design: Design) -> int:
    """All of them, the embedding included."""
    return total_parameters(read_config(dict(design.config))).total


def memory(design: Design) -> dict[str, Any]:
    """What a sequence keeps in bfloat16 (index keys in fp8, states in float32)."""
    cost = cache_cost(read_config(dict(design.config)), cache_dtypes("bfloat16"))
    return {
        "bytes_per_token": cost.bytes_per_token,
        "state_bytes": cost.state_bytes,
        "bytes_at": {length: cost.needed_bytes(length) for length in LENGTHS},
    }


def train_and_measure(design: Design, task: Task, plan: Plan) -> dict[str, Any]:
    """One model: a line of the results."""
    trainer = Trainer(plan.recipe(design, task))
    trainer.train()
    found = {
        "design": design.name,
        "task": task,
        "updates": plan.updates,
        "rate": design.rate,
        "parameters": parameters(design),
        "tokens": trainer.progress.tokens,
        "seconds": trainer.progress.seconds,
    }
    trainer.decoder.requires_grad_(False)  # what is only computed may be compiled
    return found | (accuracies(trainer) if task == "mqar" else perplexity(trainer))


def accuracies(trainer: Trainer) -> dict[str, Any]:
    """Recall by the number of pairs."""
    encoder = trainer.corpus.encoder
    cells = {
        pairs: association_accuracy(trainer.decoder, encoder.plain, pairs, ROWS, begin=encoder.begin) for pairs in PAIRS
    }
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


def done(plan: Plan, designs: Sequence[Design]) -> Iterator[dict[str, Any]]:
    """The results that stand in the file, of these designs as they are now."""
    if not plan.file.exists():
        return
    wanted = {(design.name, plan.updates, design.rate, parameters(design)) for design in designs}
    for line in plan.file.read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        if tuple(found[name] for name in ("design", "updates", "rate", "parameters")) in wanted:
            yield found


def measure(plan: Plan, designs: Sequence[Design], tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """All models, those that are done already from the file."""
    results = [found for found in done(plan, designs) if found["task"] in tasks]
    known = {(found["design"], found["task"]) for found in results}
    for design in designs:
        for task in tasks:
            if (design.name, task) in known:
                continue
            print(f"{design.title}: {task}", file=sys.stderr, flush=True)
            found = train_and_measure(design, task, plan)
            with plan.file.open("a", encoding="utf-8") as file:
                print(json.dumps(found), file=file)
            results.append(found)
    return results


def check_sizes(designs: Sequence[Design]) -> None:
    """AssertionError where one design has noticeably more to learn with than another."""
    sizes = [parameters(design) for design in designs]
    mean = sum(sizes) / len(sizes)
    assert max(abs(size - mean) for size in sizes) <= LARGEST_DIFFERENCE * mean, sizes


def print_results(designs: Sequence[Design], results: Sequence[Mapping[str, Any]]) -> None:
    """What was learned, and what it costs: a line a design in each table; what is not measured is left empty."""
    by = {(found["design"], found["task"]): found for found in results}
    learned, costs = [], []
    for design in designs:
        recall, text, kept = by.get((design.name, "mqar")), by.get((design.name, "text")), memory(design)
        shares = [f"{100 * cell['mean']:.1f}" for cell in recall["accuracy"]] if recall else [""] * len(PAIRS)
        read = text["perplexity"] if text else None
        learned.append(
            [design.title, *shares, f"{read['perplexity']:.2f} ± {read['perplexity_error']:.2f}" if read else ""]
        )
        costs.append(
            [
                *(design.title, f"{design.rate:g}", str(parameters(design))),
                *(str(kept["bytes_per_token"]), f"{kept['state_bytes'] / 1024:.1f}"),
                *(f"{size / 1024:.0f}" for size in kept["bytes_at"].values()),
                *(f"{one['seconds']:.0f}" if one else "" for one in (recall, text)),
            ]
        )
    print_table(["values recalled of", *(f"{pairs} pairs, %" for pairs in PAIRS), "perplexity"], learned)
    print()
    memories = [f"{length // 1024}K tokens, KiB" for length in LENGTHS]
    times = [f"{task} training, s" for task in TASKS]
    print_table(["", "rate", "parameters", "bytes a token", "state, KiB", *memories, *times], costs)


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
                size = memory(design)["bytes_at"][LENGTHS[-1]] / 2**20
                prices.plot(size, found["perplexity"]["perplexity"], "o", color=color, label=design.title)
    trained = CONTEXT["mqar"] // 4
    recalls.axvspan(trained, PAIRS[-1], color="0.93", label="more than trained on")
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
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--rate", type=float, help="a learning rate for all, to try it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw recall and perplexity (needs matplotlib)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = os.environ.get("FOVEAL_TEST_DATA")
    if data is None:
        parser.error("FOVEAL_TEST_DATA is not set: it names the folder that holds text/classics_simple.txt.gz")
    check_sizes(DESIGNS)
    plan = Plan(Path(data) / "text" / "classics_simple.txt.gz", arguments.output, arguments.updates)
    designs = [
        design if arguments.rate is None else replace(design, rate=arguments.rate)
        for design in DESIGNS
        if design.name in (arguments.only or [design.name])
    ]
    results = measure(plan, designs, arguments.tasks)
    if arguments.plot:
        plot(designs, results, arguments.plot)
    if arguments.json:
        kept = {design.name: memory(design) for design in designs}
        print(json.dumps({"circumstances": circumstances(), "memory": kept, "results": results}))
        return
    print(", ".join(f"{name} {value}" for name, value in circumstances().items()))
    print(f"{arguments.updates} updates of {TOKENS} tokens", end="\n\n")
    print_results(designs, results)


if __name__ == "__main__":
    main()
