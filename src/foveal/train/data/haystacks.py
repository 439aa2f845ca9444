"""What made-up documents hide things in."""

from random import Random
from typing import Protocol

import numpy as np

from foveal.evaluate.tasks import NOISE
from foveal.evaluate.tasks.words import ADJECTIVES, NOUNS
from foveal.train.data import phrases
from foveal.train.data.rows import Ids
from foveal.train.data.shards import Shard
from foveal.train.data.tokenizer import Encoder


class Hay(Protocol):
    """Endless text."""

    def take(self, dice: Random, count: int) -> Ids:
        """So many ids of it, from a random place."""
        ...


class Sentences:
    """Plain sentences; few of them over and over in every fourth document."""

    def __init__(self, encoder: Encoder) -> None:
        dice = Random("sentences")
        verbs, places = phrases.VERBS.split(), phrases.PLACES.split("|")
        texts = (
            f" The {dice.choice(ADJECTIVES)} {dice.choice(NOUNS)} {dice.choice(verbs)}"
            f" the {dice.choice(ADJECTIVES)} {dice.choice(NOUNS)} {dice.choice(places)}."
            for _ in range(1024)
        )
        self._sentences = [_ids(encoder, text) for text in texts]
        self._noise = [_ids(encoder, f"{joint}{text}") for text in NOISE.sentences for joint in (" ", NOISE.joint)]

    def take(self, dice: Random, count: int) -> Ids:
        """See `Hay`."""
        choices = self._sentences
        if dice.random() < 0.25:
            few = np.concatenate(dice.choices(self._sentences, k=dice.randint(1, 5)))
            choices = [dice.choice([few, *self._noise])]
        found: list[Ids] = [np.empty(0, dtype=np.int64)]
        while count > 0:
            found.append(dice.choice(choices)[:count])
            count -= len(found[-1])
        return np.concatenate(found)


class Passages:
    """Passages from a text source's documents, one after another without their ends."""

    def __init__(self, shard: Shard, documents: Ids) -> None:
        self._shard, self._documents = shard, documents
        self._ends = np.cumsum(shard.lengths[documents] - 1)
        if not len(documents) or self._ends[-1] <= 0:
            raise ValueError("the haystack has no text")

    def take(self, dice: Random, count: int) -> Ids:
        """See `Hay`."""
        found: list[Ids] = [np.empty(0, dtype=np.int64)]
        place = dice.randrange(int(self._ends[-1]))
        while count > 0:
            index = int(np.searchsorted(self._ends, place, side="right"))
            left = int(self._ends[index]) - place
            document = int(self._documents[index])
            start = int(self._shard.lengths[document]) - 1 - left
            found.append(self._shard.read(document, start, min(count, left)))
            count -= len(found[-1])
            place = (place + len(found[-1])) % int(self._ends[-1])
        return np.concatenate(found)


def _ids(encoder: Encoder, text: str) -> Ids:
    return np.array(encoder.snippet(text)[0], dtype=np.int64)
