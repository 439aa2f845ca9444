"""What a training recipe may say."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from foveal.train.data.settings import DataSettings, TokenizerSettings
from foveal.train.optim import Schedule
from foveal.train.recipe import key
from foveal.train.stages import KINDS, Kind


@dataclass(frozen=True)
class IndexerSettings:
    """An indexer for each attention layer of a model that has none."""

    heads: int = key("index heads; with few, many scores are exactly 0", 16, at_least=1)
    head_dim: int = key("width of an index key; a power of two for fp8 and int8 keys", 64, at_least=2)
    rope_dim: int | None = key(
        "how many of these are turned by position, even (none: half; with latent attention as many as there)",
        None,
        at_least=0,
    )
    topk: int = key("tokens that each query attends to", 512, at_least=1)

    def __post_init__(self) -> None:
        if self.rope_dim is not None and (self.rope_dim % 2 or self.rope_dim > self.head_dim):
            raise ValueError(f"rope_dim = {self.rope_dim}: expected an even number up to head_dim = {self.head_dim}")


@dataclass(frozen=True)
class ModelSettings:
    """Which model learns."""

    start: str | None = key("start from this model: a directory, a .gguf file, a Hub id or an alias", None)
    config: Path | None = key("start from random weights: a Hugging Face config.json", None)
    indexer: IndexerSettings | None = key("add indexers to a model that has none", None)
    adapter: Path | None = key("start from these indexers", None)
    dtype: Literal["float32", "bfloat16", "float64"] = key(
        "of weights and activations; the optimiser keeps at least float32; float64 is for comparisons", "float32"
    )
    checkpoint_activations: bool = key("compute each layer again in the backward pass: less memory, more time", False)

    def __post_init__(self) -> None:
        if (self.start is None) == (self.config is None):
            raise ValueError("expected either start (a model) or config (a config.json), and not both")
        if self.indexer is not None and self.adapter is not None:
            raise ValueError("indexer and adapter are both given: an adapter brings its own dimensions")


@dataclass(frozen=True)
class StageSettings:
    """One stage of training; stages follow one another."""

    kind: Kind = key("; ".join(f"{name}: {kind.doc}" for name, kind in KINDS.items()))
    steps: int = key("updates", at_least=1)
    context: int = key("tokens of a row: the longest dependency that can be learned", at_least=2)
    tokens_per_step: int = key("tokens of one update; a multiple of context", at_least=2)
    micro_tokens: int | None = key("tokens computed at a time; a multiple of context (none: context)", None, at_least=2)
    sources: tuple[str, ...] = key("names of the sources of data that it reads (none: all)", ())
    learns: Literal["all", "indexer"] | None = key("which parameters learn (none: what the kind says)", None)
    optimizer: Literal["adamw", "muon"] = key("muon: for matrices, with adamw for the rest", "adamw")
    learning_rate: float = key("the highest", 1e-3, above=0)
    indexer_learning_rate: float | None = key("the indexers' own (none: learning_rate)", None, above=0)
    schedule: Schedule = key("wsd: warm up, stay, fall at the end", "wsd")
    warmup_steps: int = key("steps until learning_rate is reached", 100, at_least=0)
    decay_share: float = key("wsd: share of the steps in which the rate falls", 0.2, at_least=0, at_most=1)
    final_share: float = key("of learning_rate at the end", 0.0, at_least=0, at_most=1)
    weight_decay: float = key("of matrices", 0.1, at_least=0)
    beta2: float = key("adamw's memory of squared gradients", 0.95, at_least=0, below=1)
    clip: float = key("largest norm of the gradient; 0: no limit", 1.0, at_least=0)
    index_weight: float = key("factor of the indexers' loss", 1.0, at_least=0)
    index_share: float = key(
        "share of the tokens whose selections are compared with attention, drawn anew for each micro-batch",
        1.0,
        above=0,
        at_most=1,
    )
    balance_rate: float = key("step of the routers' biases towards even use", 1e-3, at_least=0)
    balance_weight: float = key("factor of the sequence-wise balance loss", 1e-4, at_least=0)
    z_weight: float = key("factor of the routers' z-loss", 0.0, at_least=0)
    teacher: str | None = key("distil: the model to learn from (none: this model's own dense form)", None)
    temperature: float = key("distil: of both distributions", 1.0, above=0)

    def __post_init__(self) -> None:
        micro = self.context if self.micro_tokens is None else self.micro_tokens
        if micro % self.context:
            raise ValueError(f"micro_tokens = {micro}: expected a multiple of context = {self.context}")
        if self.tokens_per_step % micro:
            raise ValueError(f"tokens_per_step = {self.tokens_per_step}: expected a multiple of {micro}")
        if self.learns == "indexer" and not KINDS[self.kind].index:
            raise ValueError(f"learns = 'indexer': a {self.kind} stage has no loss for indexers")
        if self.teacher is not None and not KINDS[self.kind].distils:
            raise ValueError(f"teacher = {self.teacher!r}: a {self.kind} stage has none")


@dataclass(frozen=True)
class RunSettings:
    """Where results go, and how a run is watched."""

    output: Path = key("folder of the run: checkpoints, logs, and the result in model/ or adapter/")
    seed: int = key("of weights and data", 0, at_least=0)
    checkpoint_minutes: float = key("between checkpoints", 5.0, above=0)
    keep_checkpoints: int = key("older ones are deleted", 2, at_least=1)
    evaluate_every: int = key(
        "steps between evaluations on held-out text; 0: at the end of each stage alone", 0, at_least=0
    )
    evaluate_tokens: int = key("held-out tokens of an evaluation; 0: none", 65536, at_least=0)
    passkey_lengths: tuple[int, ...] = key("lengths, in tokens, of passkey tasks at each evaluation", (), at_least=1)
    sample: str | None = key("a prompt to continue at each evaluation", None)
    stored_dtype: Literal["float32", "bfloat16"] | None = key(
        "of the matrices of the result (none: the model's own, which config.json names in any case)", None
    )
    tensorboard: bool = key("write TensorBoard logs as well (extra train)", False)


@dataclass(frozen=True)
class ParallelSettings:
    """How the processes that torchrun starts divide the work. Weights and rows are always divided."""

    expert: int = key("processes that divide the experts among them; divides their number", 1, at_least=1)
    context: int = key("processes that divide each row's tokens among them; divides their number", 1, at_least=1)
    timeout_minutes: float = key("a process that the others wait for longer is given up", 30.0, above=0)


@dataclass(frozen=True)
class Recipe:
    """A training run."""

    model: ModelSettings = key("which model")
    data: DataSettings = key("which text")
    stages: tuple[StageSettings, ...] = key("what is done, one after another")
    run: RunSettings = key("where to, and how it is watched")
    parallel: ParallelSettings = key("several processes", ParallelSettings)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("no [[stages]]")
        known = self.data.names
        if unknown := {name for stage in self.stages for name in stage.sources} - set(known):
            raise ValueError(f"stages.sources: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
        tokenizer, start = self.data.tokenizer, self.model.start
        if start is not None and tokenizer.model is None and tokenizer != TokenizerSettings():
            raise ValueError(
                f"data.tokenizer says how to train one, but {start} has its own (tokenizer.model takes another's)"
            )
