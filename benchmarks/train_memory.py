"""Peak memory and time of one training step against its context: the indexer's warm-up, computed tile by tile and
naively, and language-model training with dense and sparse attention.

Each figure comes from a process of its own, which builds the model, runs one step on a single document of that length,
and reports how much its peak of resident memory grew over what it held before the step. The model is the built-in one
(5 layers, 3.1M parameters). Naive warm-up is what the
formula says: targets and scores of all pairs of tokens, differentiated by autograd.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import circumstances, print_table
from torch import Tensor

from foveal.config import read_config
from foveal.models.decoder import Decoder, Options
from foveal.nn.batch import Batch
from foveal.nn.watch import Sight
from foveal.train.initial import initialise
from foveal.train.learner import Learner
from foveal.train.losses import IndexLoss, head_loss, next_token
from foveal.train.schema import StageSettings

RECIPES = Path(__file__).parent.parent / "recipes"
CASES = ("warm-up, tiled", "warm-up, naive", "dense", "sparse", "sparse, layers recomputed")
NAIVE_MOST = 8192
"""Naive warm-up beyond this needs more memory than most machines have."""


class NaiveLoss:
    """The indexers' loss as the formula stands there: every pair of tokens at once."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0

    def __call__(self, sight: Sight) -> None:
        glance, gaze = sight.glance, sight.gaze
        count = len(gaze.q_THP)
        future_TN = torch.ones(count, count, dtype=torch.bool).triu(1)
        k_NP = gaze.keys.context(0, 0, count)[:, 0]
        logits_HTN = torch.einsum("thp,np->htn", gaze.q_THP, k_NP) * gaze.scale
        p_TN = logits_HTN.masked_fill(future_TN, float("-inf")).softmax(-1).mean(0).detach()
        products_TIN = torch.einsum("tij,nj->tin", glance.q_TIJ, glance.keys.context(0, 0, count)).relu()
        scores_TN = torch.einsum("tin,ti->tn", products_TIN, glance.weights_TI).masked_fill(future_TN, float("-inf"))
        log_TN = scores_TN.log_softmax(-1).masked_fill(future_TN, 0.0)
        self.total = self.total + (torch.special.xlogy(p_TN, p_TN) - p_TN * log_TN).sum() / count


def loss_of(case: str, decoder: Decoder, ids_N: Tensor) -> Tensor:
    """The loss whose gradient the case computes."""
    batch = Batch.packed([ids_N], dense=case.startswith(("warm-up", "dense")))
    if case.startswith("warm-up"):
        watch: Any = IndexLoss(torch.full((len(ids_N),), 1 / len(ids_N))) if "tiled" in case else NaiveLoss()
        decoder.trunk(batch, watch=watch)
        assert isinstance(watch.total, Tensor)
        return watch.total
    watch = IndexLoss(torch.full((len(ids_N),), 1 / len(ids_N))) if case.startswith("sparse") else None
    x_TD, _ = decoder.trunk(batch, watch=watch)
    language = head_loss(decoder, x_TD, torch.full((len(ids_N),), 1 / len(ids_N)), next_token(ids_N.roll(-1)))
    return language if watch is None else language + watch.total


def step(case: str, context: int) -> dict[str, float]:
    """One step in this process: seconds, and bytes by which memory grew at most."""
    torch.manual_seed(0)
    options = Options(index_dtype="float32", checkpoint_activations="recomputed" in case)
    config = json.loads((RECIPES / "builtin.json").read_text()) | {"max_position_embeddings": 1 << 17}
    decoder = Decoder(read_config(config), options)
    initialise(decoder, 0)
    kind: Any = "warmup" if case.startswith("warm-up") else "pretrain" if case == "dense" else "sparse"
    Learner(decoder, StageSettings(kind=kind, steps=1, context=context, tokens_per_step=context))
    ids_N = torch.randint(4096, (context,))
    loss_of(case, decoder, ids_N[:256]).backward()  # what is allocated once
    before, start = peak(), time.perf_counter()
    loss_of(case, decoder, ids_N).backward()
    return {"seconds": time.perf_counter() - start, "bytes": peak() - before, "resident": peak()}


def peak() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(case: str, context: int, say: Callable[[str], None]) -> dict[str, float] | None:
    """`step` in a process of its own; None where it does not fit."""
    if "naive" in case and context > NAIVE_MOST:
        return None
    say(f"{case}, {context} tokens ...")
    command = [sys.executable, __file__, "--case", case, "--contexts", str(context)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Print the table, or one step's figures where a case is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--case", choices=CASES, help="one case, in this process")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(step(args.case, args.contexts[0])))
        return
    rows = []
    for context in args.contexts:
        for case in CASES:
            found = measure(case, context, lambda line: print(line, file=sys.stderr, flush=True))
            if found is not None:
                rows.append({"context": context, "case": case, **found})
    if args.json:
        print(json.dumps({"circumstances": circumstances(), "rows": rows}))
        return
    print(", ".join(f"{name} {value}" for name, value in circumstances().items()), end="\n\n")
    print_table(("case", "tokens", "grew by MiB", "resident MiB", "seconds"), [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> list[str]:
    sizes = (f"{row[name] / 2**20:.0f}" for name in ("bytes", "resident"))
    return [row["case"], str(row["context"]), *sizes, f"{row['seconds']:.1f}"]


if __name__ == "__main__":
    main()
