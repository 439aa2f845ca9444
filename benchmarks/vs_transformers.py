"""Foveal beside transformers in one process: prefill and decode times of the same models on the same threads.

Models: SmolLM2-135M, and a random deepseek_v32 with 29M parameters. benchmarks/README.md says how it is made fair.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from oracle import load_transformers
from report import circumstances, print_table
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV32Config, DynamicCache, PreTrainedModel, StaticCache

from foveal import LLM, SamplingParams
from foveal.engine import Request
from foveal.models.resolve import resolve_model

_SEED = 0
_TRIAL_LENGTH = 1024


@dataclass(frozen=True)
class Effort:
    """How often everything is repeated."""

    prefills: int
    steps: int


@dataclass(frozen=True)
class Case:
    """Prompts of equal length: how many and how long."""

    batch: int
    length: int

    def prompts(self, vocabulary: int) -> list[list[int]]:
        """Random token ids, the same at every call."""
        generator = torch.Generator().manual_seed(_SEED)
        return torch.randint(0, vocabulary, (self.batch, self.length), generator=generator).tolist()


@dataclass(frozen=True)
class Row:
    """One line of the table; times are medians."""

    what: str
    dtype: str
    transformers_ms: float
    foveal_ms: float
    transformers_setup: str

    @property
    def ratio(self) -> float:
        """How many times faster foveal is."""
        return self.transformers_ms / self.foveal_ms


class Side(Protocol):
    """One of the two implementations, timed in milliseconds."""

    def start(self, prompts: list[list[int]]) -> float:
        """Forget what went before and take the prompts to their first new tokens."""

    def step(self) -> float:
        """Compute one more token of each sequence."""


@dataclass(frozen=True)
class Implementation:
    """Which of its own implementations transformers uses; `experts` is None where the model has none."""

    attention: str
    experts: str | None

    def use(self, model: PreTrainedModel) -> None:
        """Switch `model` to it."""
        model.set_attn_implementation(self.attention)
        if self.experts:
            model.set_experts_implementation(self.experts)

    def __str__(self) -> str:
        return self.attention + (f"+{self.experts}" if self.experts else "")


@dataclass(frozen=True)
class Setup:
    """How a transformers model is run."""

    prefill: Implementation
    decode: Implementation
    cache: str


class TransformersSide:
    """A plain greedy loop around the model's forward; of the logits only the last, as in transformers' `generate`."""

    def __init__(self, model: PreTrainedModel, setup: Setup, room: int) -> None:
        """`room`: tokens that a static cache holds beyond the prompt."""
        self._model, self._setup, self._room = model, setup, room
        self._cache: DynamicCache | StaticCache | None = None
        self._latest_S1 = torch.empty(0, 1, dtype=torch.int64)

    def start(self, prompts: list[list[int]]) -> float:
        """See `Side`."""
        self._cache = None  # the memory of the last one, before the next is made
        length = len(prompts[0]) + self._room
        static = self._setup.cache == "static"
        config = self._model.config
        self._cache = StaticCache(config, max_cache_len=length) if static else DynamicCache(config=config)
        return self._forward(self._setup.prefill, torch.tensor(prompts, device=self._model.device))

    def step(self) -> float:
        """See `Side`."""
        return self._forward(self._setup.decode, self._latest_S1)

    @torch.inference_mode()
    def _forward(self, implementation: Implementation, ids_SN: Tensor) -> float:
        implementation.use(self._model)
        start = time.perf_counter()
        output = self._model(ids_SN, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._latest_S1 = output.logits[:, -1].argmax(-1, keepdim=True)
        if ids_SN.is_cuda:
            torch.cuda.synchronize(ids_SN.device)
        return _since(start)


class FovealSide:
    """The real path: requests through the engine's scheduler, paged cache and sampler."""

    def __init__(self, llm: LLM) -> None:
        self._engine = llm.engine
        self._ids: list[str] = []

    def start(self, prompts: list[list[int]]) -> float:
        """See `Side`."""
        self.stop()
        start = time.perf_counter()
        self._ids = [self._add(str(index), prompt) for index, prompt in enumerate(prompts)]
        waiting = set(self._ids)
        while waiting:
            waiting -= self._step()
        return _since(start)

    def step(self) -> float:
        """See `Side`."""
        start = time.perf_counter()
        answered = self._step()
        elapsed = _since(start)
        assert answered == set(self._ids)
        return elapsed

    def stop(self) -> None:
        """Leave the engine to others."""
        for request_id in self._ids:
            self._engine.abort(request_id)

    def _add(self, request_id: str, prompt: list[int]) -> str:
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=None)
        self._engine.add(Request(request_id, prompt, params, stream=True))
        return request_id

    def _step(self) -> set[str]:
        outputs = self._engine.step()
        for output in outputs:
            assert not output.finished, output.error
        return {output.request_id for output in outputs}


def fastest_setup(model: PreTrainedModel, prompts: list[list[int]], steps: int) -> Setup:
    """Try what transformers offers on these prompts: the fastest prefill, and the fastest decode with its cache."""
    experts = ("eager", "grouped_mm", "batched_mm") if model.config.model_type == "deepseek_v32" else (None,)
    choices = [Implementation(attention, kind) for attention in ("sdpa", "eager") for kind in experts]
    # batched_mm copies the weights of every expert that every token chose: gigabytes in a prefill.
    prefills = [choice for choice in choices if choice.experts != "batched_mm"]
    prefill = min(prefills, key=lambda choice: _tried(model, Setup(choice, choice, "dynamic"), prompts, 0))
    setups = [Setup(prefill, choice, cache) for cache in ("dynamic", "static") for choice in choices]
    return min(setups, key=lambda setup: _tried(model, setup, prompts, steps))


def _tried(model: PreTrainedModel, setup: Setup, prompts: list[list[int]], steps: int) -> float:
    """Milliseconds of one step; with no steps, of the prefill (the faster of two)."""
    side = TransformersSide(model, setup, room=steps)
    if not steps:
        return min(side.start(prompts) for _ in range(2))
    side.start(prompts)
    return statistics.median(side.step() for _ in range(steps))


@dataclass(frozen=True)
class Contender:
    """One checkpoint, loaded in both libraries."""

    name: str
    llm: LLM
    model: PreTrainedModel
    dtype: str

    def compare(self, case: Case, effort: Effort) -> list[Row]:
        """The rows of one case; the two sides take turns."""
        prompts = case.prompts(self.model.config.vocab_size)
        trial = [prompt[:_TRIAL_LENGTH] for prompt in prompts]
        setup = fastest_setup(self.model, trial, effort.steps)
        ours = FovealSide(self.llm)
        ours.start(trial)  # the trial has warmed up transformers
        ours.step()
        sides: list[Side] = [TransformersSide(self.model, setup, room=effort.steps), ours]
        prefills = list(zip(*([side.start(prompts) for side in sides] for _ in range(effort.prefills)), strict=True))
        steps = list(zip(*([side.step() for side in sides] for _ in range(effort.steps)), strict=True))
        ours.stop()
        decode = f"{setup.decode}, {setup.cache} cache"
        rows = [self._row(f"decode, batch {case.batch}, context {case.length}", steps, decode)]
        if case.batch == 1:
            rows.insert(0, self._row(f"prefill {case.length}", prefills, str(setup.prefill)))
        return rows

    def _row(self, what: str, times: list[tuple[float, ...]], setup: str) -> Row:
        theirs, ours = (statistics.median(side) for side in times)
        return Row(f"{self.name} {what}", self.dtype, theirs, ours, setup)


def contenders(dtypes: list[str], only: str | None) -> Iterator[tuple[Contender, list[Case]]]:
    """Every checkpoint, or the one named, in every dtype with its cases, one at a time."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = [
            ("SmolLM2-135M", resolve_model("smollm2"), [Case(1, 512), Case(8, 512)]),
            ("DSA-29M", random_dsa(Path(folder)), [Case(1, 1024), Case(1, 4096)]),
        ]
        for name, path, cases in checkpoints:
            if only not in (None, name):
                continue
            for dtype in dtypes:
                # Prompts repeat here; a prefix hit would leave nothing to prefill.
                # transformers keeps index keys in the model's dtype, so both do here.
                index = {"index_dtype": "bf16"} if dtype == "bfloat16" and name.startswith("DSA") else {}
                llm = LLM(str(path), dtype=dtype, enable_prefix_caching=False, skip_tokenizer_init=True, **index)
                yield Contender(name, llm, load_transformers(path, getattr(torch, dtype)), dtype), cases
                del llm
                gc.collect()


def random_dsa(folder: Path) -> Path:
    """A deepseek_v32 checkpoint with 29 million random weights, written to `folder`."""
    torch.manual_seed(_SEED)
    config = DeepseekV32Config(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=256,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        index_n_heads=8,
        index_head_dim=64,
        index_topk=256,
        max_position_embeddings=8192,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, help="torch threads on both sides (default: torch's choice)")
    parser.add_argument("--quick", action="store_true", help="float32 only, one prefill and a few steps of each")
    parser.add_argument("--only", choices=["SmolLM2-135M", "DSA-29M"], help="one of the two models")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    effort = Effort(prefills=1, steps=4) if arguments.quick else Effort(prefills=3, steps=20)
    dtypes = ["float32"] if arguments.quick else ["float32", "bfloat16"]

    pairs = contenders(dtypes, arguments.only)
    rows = [row for contender, cases in pairs for case in cases for row in contender.compare(case, effort)]
    print_rows(rows, as_json=arguments.json)


def print_rows(rows: list[Row], *, as_json: bool) -> None:
    """The table under the circumstances it was measured in."""
    if as_json:
        measured = [{**asdict(row), "ratio": row.ratio} for row in rows]
        print(json.dumps({"circumstances": circumstances(), "rows": measured}))
        return
    print(", ".join(f"{name} {value}" for name, value in circumstances().items()))
    print_table(
        ["what", "dtype", "transformers ms", "foveal ms", "ratio", "transformers with"],
        [
            [
                row.what,
                row.dtype,
                f"{row.transformers_ms:.1f}",
                f"{row.foveal_ms:.1f}",
                f"{row.ratio:.2f}",
                row.transformers_setup,
            ]
            for row in rows
        ],
    )


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    main()
