"""The corpus: every source of a recipe, encoded, with the documents that are kept for evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from foveal.models.resolve import cache_dir as foveal_cache
from foveal.train.data.files import short_hash
from foveal.train.data.haystacks import Hay, Passages, Sentences
from foveal.train.data.retrieval import VERSION, RetrievalRows
from foveal.train.data.rows import Ids, RowSource, TextRows
from foveal.train.data.settings import DataSettings
from foveal.train.data.shards import Shard, open_shard
from foveal.train.data.tokenizer import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = Literal["train", "held_out"]


@dataclass(frozen=True)
class OpenSource:
    """A source as rows of some context length, in an order that a seed gave."""

    name: str
    weight: float
    key: str
    """Stands for everything that its rows depend on, apart from context and seed."""
    rows: RowSource


@dataclass(frozen=True)
class Corpus:
    """All sources of a recipe."""

    settings: DataSettings
    shards: Mapping[str, Shard]
    """The text sources' documents, by name."""
    encoder: Encoder

    @staticmethod
    def build(settings: DataSettings, tokenizer: "PreTrainedTokenizerBase", cache: Path | None = None) -> "Corpus":
        """Encode what is not in the cache yet (`data_cache(settings)` if None). Several processes may do this at once.

        Raises ValueError for files that are missing or wrong, OSError where the disk is full.
        """
        encoder = Encoder(tokenizer)
        folder = cache or data_cache(settings)
        names = settings.names[: len(settings.text)]
        shards = {
            name: open_shard(source, encoder, folder, name) for name, source in zip(names, settings.text, strict=True)
        }
        return Corpus(settings, shards, encoder)

    def documents(self, name: str, part: Part) -> Ids:
        """The documents of a text source that belong to a part of the corpus."""
        held_out = self.shards[name].held_out(self.settings.held_out)
        return np.flatnonzero(held_out if part == "held_out" else ~held_out)

    @property
    def held_out_texts(self) -> list[str]:
        """The text sources that have documents kept for evaluation."""
        return [name for name in self.shards if len(self.documents(name, "held_out"))]

    def open(self, part: Part, context: int, seed: int) -> list[OpenSource]:
        """Every source that has documents in this part. Made-up ones have other documents in each part."""
        sources = []
        texts, made_up = self.settings.names[: len(self.shards)], self.settings.names[len(self.shards) :]
        for name, text in zip(texts, self.settings.text, strict=True):
            chosen = self.documents(name, part)
            if len(chosen):
                rows = TextRows(self.shards[name], chosen, context, _seed(seed, name, part))
                key = short_hash(self.shards[name].key, self.settings.held_out, part)
                sources.append(OpenSource(name, text.weight, key, rows))
        for name, task in zip(made_up, self.settings.retrieval, strict=True):
            haystack: Hay
            if task.haystack is None:
                haystack = Sentences(self.encoder)
            elif len(chosen := self.documents(task.haystack, part)):
                haystack = Passages(self.shards[task.haystack], chosen)
            else:
                continue
            made = RetrievalRows(task, self.encoder, haystack, context, _seed(seed, name, part))
            hidden_in = self.shards[task.haystack].key if task.haystack is not None else None
            key = short_hash(VERSION, repr(task), self.encoder.hash, hidden_in, self.settings.held_out, part)
            sources.append(OpenSource(name, task.weight, key, made))
        return sources

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of each text source, held-out documents included."""
        return {name: len(shard.tokens) for name, shard in self.shards.items()}


def data_cache(settings: DataSettings) -> Path:
    """Where encoded text and trained tokenizers are kept."""
    return settings.cache or foveal_cache() / "data"


def _seed(seed: int, name: str, part: Part) -> tuple[int, ...]:
    """Numbers for this source alone, so that sources come and go without changing the others."""
    return seed, int(short_hash(name, part), 16)
