"""What a recipe says about data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from foveal.train.recipe import key

END_OF_TEXT = "<|endoftext|>"

Task = Literal[
    "passkey",
    "multikey",
    "recall",
    "copy",
    "mqar",
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "vt",
    "cwe",
    "fwe",
]
"""Those from niah_single_1 on are RULER's, as `foveal.evaluate` asks them: one question a document."""


@dataclass(frozen=True)
class TokenizerSettings:
    """A tokenizer: an existing one, or one to train on the text sources."""

    model: str | None = key(
        "take the tokenizer of this model or directory (none: that of the model that the run starts from; train one "
        "for random weights)",
        None,
    )
    vocab_size: int = key("tokens to train, special ones and all 256 bytes included", 6144, at_least=257)
    special_tokens: tuple[str, ...] = key(
        "tokens that text never merges into; the first one ends documents", (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
    )
    sample_megabytes: float = key("text to train on, from the sources by their weights", 256.0, above=0)

    def __post_init__(self) -> None:
        if not self.special_tokens or len(set(self.special_tokens)) < len(self.special_tokens):
            raise ValueError(f"special_tokens = {list(self.special_tokens)!r}: expected at least one, each once")
        if self.vocab_size < 256 + len(self.special_tokens):
            raise ValueError(
                f"vocab_size = {self.vocab_size}: there are 256 bytes and {len(self.special_tokens)} special tokens"
            )


@dataclass(frozen=True)
class TextSettings:
    """Documents from files."""

    files: tuple[Path, ...] = key(
        "text or JSONL files (.jsonl), plain or .gz; folders (searched whole for .txt and .jsonl) and patterns (*, **)"
    )
    name: str | None = key("what logs call this source", None)
    weight: float = key("share of all tokens, relative to the other sources", 1.0, above=0)
    field: str = key("JSONL: which field of each line is the document", "text")
    separator: str = key("text files: what stands between two documents", END_OF_TEXT)

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("files = []: expected at least one")
        if not self.separator:
            raise ValueError("separator = '': expected some text")


@dataclass(frozen=True)
class RetrievalSettings:
    """Made-up documents in which something has to be found again: endless, from the seed."""

    name: str | None = key("what logs call this source", None)
    weight: float = key("share of all tokens, relative to the other sources", 1.0, above=0)
    tasks: tuple[Task, ...] = key(
        "kinds of documents, equally often (name one twice for twice as many); mqar: pairs of single tokens, then keys "
        "that want their values, which alone can be known: other_weight = 0; the last six are those of RULER",
        ("passkey", "multikey", "recall", "copy"),
    )
    mqar_keys: int | None = key(
        "mqar: how many keys there are, and as many values; a row draws its own from the first few, from as many as it "
        "has pairs to all, evenly on a logarithmic scale, so that some come often and are learnt first (none: every "
        "token is a key or a value, all equally often)",
        None,
        at_least=1,
    )
    haystack: str | None = key("the name of the text source to hide things in; none: plain made-up sentences", None)
    min_length: int = key(
        "tokens of the shortest document (a copy, where its task needs more); the longest fills the context",
        256,
        at_least=128,
    )
    answer_weight: float = key("weight in the loss of the tokens that can be known from the document", 1.0, at_least=0)
    other_weight: float = key("weight in the loss of all its other tokens", 1.0, at_least=0)

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks = []: expected at least one")
        if self.answer_weight == self.other_weight == 0:
            raise ValueError("answer_weight and other_weight are both 0: nothing would be learnt")


@dataclass(frozen=True)
class DataSettings:
    """All data of a run."""

    tokenizer: TokenizerSettings = key("how text becomes tokens", TokenizerSettings)
    text: tuple[TextSettings, ...] = key("a source of documents from files", ())
    retrieval: tuple[RetrievalSettings, ...] = key("a source of made-up retrieval documents", ())
    held_out: float = key(
        "share of each text source's documents kept for evaluation, at least one", 0.01, at_least=0, below=1
    )
    cache: Path | None = key("folder for tokenizers and encoded text; none: data/ in foveal's cache folder", None)

    def __post_init__(self) -> None:
        if not self.text and not self.retrieval:
            raise ValueError("no data: expected [[data.text]] or [[data.retrieval]]")
        names = self.names
        if len(set(names)) < len(names):
            raise ValueError(f"several sources have one name: {', '.join(names)}")
        texts = names[: len(self.text)]
        for source in self.retrieval:
            if source.haystack is not None and source.haystack not in texts:
                raise ValueError(f"haystack = {source.haystack!r}: no text source has this name ({', '.join(texts)})")

    @property
    def names(self) -> tuple[str, ...]:
        """Each source's name: as given, or its kind and number. Text sources come first."""
        texts = (source.name or f"text{i}" for i, source in enumerate(self.text))
        made_up = (source.name or f"retrieval{i}" for i, source in enumerate(self.retrieval))
        return (*texts, *made_up)
