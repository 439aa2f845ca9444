"""lm-evaluation-harness through `/v1/completions` beside the engine in this process: the same log likelihoods.

The harness (`local-completions`: token ids in, `echo` and the prompt's log probabilities out) runs LAMBADA and ARC-easy
from the task files in lm_eval_tasks/, in a Python of its own:

    python -m venv harness && harness/bin/pip install 'lm-eval[api]' transformers
    python benchmarks/lm_eval_agreement.py --lm-eval-python harness/bin/python

FOVEAL_TEST_DATA names the folder that holds eval/lambada_openai.jsonl and eval/arc_easy.jsonl.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import circumstances, print_table
from served import served

from foveal import LLM, SamplingParams
from foveal.models.tokenizer import load_tokenizer

_TASKS = {"foveal_lambada": "lambada_openai.jsonl", "foveal_arc_easy": "arc_easy.jsonl"}
_BATCH = 8


@dataclass(frozen=True)
class Pair:
    """What a model is asked: how likely is this continuation after this context?"""

    context: str
    continuation: str


@dataclass(frozen=True)
class Score:
    """The continuation's log likelihood, and whether every token of it is the likeliest."""

    loglikelihood: float
    greedy: bool


def pairs_of(task: str, example: dict[str, Any]) -> list[Pair]:
    """As the task's YAML file has them."""
    if task == "foveal_lambada":
        return [Pair(example["context"], f" {example['continuation']}")]
    return [Pair(f"{example['query']}\nAnswer:", f" {choice}") for choice in example["choices"]]


def is_right(example: dict[str, Any], scores: Sequence[Score]) -> bool:
    """LAMBADA: every token of the word is the likeliest; ARC: the right answer is the likeliest."""
    if "gold" not in example:
        return scores[0].greedy
    likelihoods = [score.loglikelihood for score in scores]
    return likelihoods.index(max(likelihoods)) == example["gold"]


def score(llm: LLM, pairs: Sequence[Pair]) -> list[Score]:
    """Through the engine in this process."""
    before = [len(llm.tokenizer.encode(pair.context, add_special_tokens=False)) for pair in pairs]
    ids = [llm.tokenizer.encode(pair.context + pair.continuation, add_special_tokens=False) for pair in pairs]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    scores = []
    outputs = llm.generate([{"prompt_token_ids": one} for one in ids], params)
    for start, one, output in zip(before, ids, outputs, strict=True):
        assert output.prompt_logprobs is not None
        entries = [entry[token] for token, entry in zip(one, output.prompt_logprobs, strict=True) if entry][start - 1 :]
        scores.append(Score(sum(entry.logprob for entry in entries), all(entry.rank == 1 for entry in entries)))
    return scores


def harness(python: str, model: str, options: Sequence[str], limit: int) -> dict[str, list[dict[str, Any]]]:
    """Run the harness against a server; the samples that it logged, by task, in the order of the examples."""
    data = Path(os.environ["FOVEAL_TEST_DATA"]) / "eval"
    with tempfile.TemporaryDirectory() as name, served(model, options) as url:
        folder = Path(name)
        load_tokenizer(model).save_pretrained(folder / "tokenizer")
        for file in Path(__file__).with_name("lm_eval_tasks").glob("*.yaml"):
            (folder / file.name).write_text(file.read_text().replace("FOLDER", str(data)))
        arguments = f"model={model},base_url={url}/v1/completions,tokenizer={folder / 'tokenizer'}"
        arguments += ",tokenizer_backend=huggingface,num_concurrent=2,max_length=2048"
        command = [python, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments]
        command += ["--tasks", *_TASKS, "--include_path", name, "--limit", str(limit), "--batch_size", str(_BATCH)]
        command += ["--output_path", str(folder / "out"), "--log_samples"]
        quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, env=os.environ | quiet, check=False)
        if done.returncode:
            sys.exit("the harness failed; its error is above")
        found = {}
        for task in _TASKS:
            (file,) = (folder / "out").rglob(f"samples_{task}_*.jsonl")
            samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            found[task] = sorted(samples, key=lambda sample: int(sample["doc_id"]))
        return found


def compare(llm: LLM, task: str, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies, and how far the log likelihoods are apart."""
    examples = [sample["doc"] for sample in samples]
    pairs = [pairs_of(task, example) for example in examples]
    scores = iter(score(llm, [pair for some in pairs for pair in some]))
    ours = [[next(scores) for _ in some] for some in pairs]
    theirs = [
        [Score(float(likelihood), str(greedy) == "True") for likelihood, greedy in _answers(one)] for one in samples
    ]
    apart = [
        abs(a.loglikelihood - b.loglikelihood)
        for mine, other in zip(ours, theirs, strict=True)
        for a, b in zip(mine, other, strict=True)
    ]
    return {
        "task": task,
        "examples": len(examples),
        "served": sum(sample["acc"] for sample in samples) / len(samples),
        "in_process": sum(is_right(*pair) for pair in zip(examples, ours, strict=True)) / len(samples),
        "largest_difference": max(apart),
    }


def _answers(sample: dict[str, Any]) -> list[Any]:
    """The harness' (log likelihood, greedy) of each continuation."""
    return [answer[0] if isinstance(answer[0], list) else answer for answer in sample["resps"]]


def main() -> None:
    """Parse, run, print; exit code 1 where an accuracy differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lm-eval-python", required=True, metavar="PATH", help="a Python with lm-eval[api]")
    parser.add_argument("--model", default="smollm2", help="whatever foveal loads (default: smollm2)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=int, default=100, help="examples of each task (default: 100)")
    arguments = parser.parse_args()
    if "FOVEAL_TEST_DATA" not in os.environ:
        parser.error("FOVEAL_TEST_DATA must name the folder that holds eval/")
    options = ["--dtype", arguments.dtype]
    samples = harness(arguments.lm_eval_python, arguments.model, options, arguments.limit)
    llm = LLM(arguments.model, dtype=arguments.dtype)
    reports = [compare(llm, task, found) for task, found in samples.items()]
    print(", ".join(f"{name} {value}" for name, value in circumstances().items()))
    print_table(
        ["task", "examples", "served, lm-eval", "in process", "largest difference of a log likelihood"],
        [
            [
                report["task"],
                str(report["examples"]),
                f"{report['served']:.4f}",
                f"{report['in_process']:.4f}",
                f"{report['largest_difference']:.1e}",
            ]
            for report in reports
        ],
    )
    sys.exit(any(report["served"] != report["in_process"] for report in reports))


if __name__ == "__main__":
    main()
