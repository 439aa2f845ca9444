"""Made-up documents in which something said once has to be found again, at any distance up to the context."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from random import Random
from typing import Literal, TypeVar
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from foveal.train.data import words
from foveal.train.data.rows import Ids, Row
from foveal.train.data.settings import RetrievalSettings, Task
from foveal.train.data.shards import Shard
from foveal.train.data.tokenizer import Encoder

T = TypeVar("T")

VERSION = 2
"""Counts changes of the documents made: streams of other versions are not continued."""

_ADJECTIVES, _NOUNS, _VERBS = words.ADJECTIVES.split(), words.NOUNS.split(), words.VERBS.split()
_PLACES = words.PLACES.split("|")


@dataclass(frozen=True)
class _Snippet:
    ids: list[int]
    answers: list[bool]
    """Which ids the document so far tells."""

    def __add__(self, other: "_Snippet") -> "_Snippet":
        return _Snippet(self.ids + other.ids, self.answers + other.answers)


@dataclass
class _Draft:
    """A document before it has its length: snippets at moments between 0 and 1, haystack around them."""

    joint: str
    """What stands before each snippet."""
    opening: _Snippet
    closing: _Snippet
    size: int
    """Tokens of everything so far, the end token included."""
    events: list[tuple[float, _Snippet]] = field(default_factory=list)

    def close(self, question: _Snippet) -> None:
        self.closing += question
        self.size += len(question.ids)

    def add(self, events: Iterable[tuple[float, _Snippet]]) -> None:
        for event in events:
            self.events.append(event)
            self.size += len(event[1].ids)


class _Sentences:
    """A haystack of plain sentences; of few of them over and over in every fourth document."""

    def __init__(self, encoder: Encoder) -> None:
        dice = Random("sentences")
        texts = (
            f" The {_pick(dice, _ADJECTIVES)} {_pick(dice, _NOUNS)} {_pick(dice, _VERBS)}"
            f" the {_pick(dice, _ADJECTIVES)} {_pick(dice, _NOUNS)} {_pick(dice, _PLACES)}."
            for _ in range(1024)
        )
        self._sentences = [np.array(encoder.snippet(text)[0], dtype=np.int64) for text in texts]
        self._noise = [np.array(encoder.snippet(f"{joint}{words.NOISE}")[0], dtype=np.int64) for joint in (" ", "\n")]

    def take(self, dice: Random, count: int) -> Ids:
        choices = self._sentences
        if dice.random() < 0.25:
            few = [_pick(dice, self._sentences) for _ in range(1 + _below(dice, 5))]
            choices = [np.concatenate(few), _pick(dice, self._noise)][_below(dice, 2) :][:1]
        found: list[Ids] = [np.empty(0, dtype=np.int64)]
        while count > 0:
            found.append(_pick(dice, choices)[:count])
            count -= len(found[-1])
        return np.concatenate(found)


class _Passages:
    """A haystack of passages from a text source's documents."""

    def __init__(self, shard: Shard, documents: Ids) -> None:
        self._shard, self._documents = shard, documents
        self._ends = np.cumsum(shard.lengths[documents] - 1)  # without the end tokens
        if not len(documents) or self._ends[-1] <= 0:
            raise ValueError("the haystack has no text")

    def take(self, dice: Random, count: int) -> Ids:
        found: list[Ids] = [np.empty(0, dtype=np.int64)]
        place = int(dice.random() * int(self._ends[-1]))
        while count > 0:
            index = int(np.searchsorted(self._ends, place, side="right"))
            length = min(count, int(self._ends[index]) - place)
            document = int(self._documents[index])
            start = place - int(self._ends[index]) + int(self._shard.lengths[document]) - 1
            found.append(self._shard.read(document, start, length))
            count -= length
            place = (place + length) % int(self._ends[-1])
        return np.concatenate(found)


class RetrievalRows:
    """Rows of retrieval documents; row n depends on the seed and n alone."""

    def __init__(
        self,
        settings: RetrievalSettings,
        encoder: Encoder,
        haystack: tuple[Shard, Ids] | None,
        context: int,
        seed: Sequence[int],
    ) -> None:
        if context < settings.min_length:
            raise ValueError(f"min_length = {settings.min_length} is longer than the context of {context} tokens")
        self._settings, self._encoder, self._context, self._seed = settings, encoder, context, tuple(seed)
        self._haystack = _Sentences(encoder) if haystack is None else _Passages(*haystack)
        self._word_starts = np.array(encoder.word_starts())
        self._drafts: dict[Task, Callable[[Random, int], _Draft]] = {
            "passkey": self._passkey,
            "multikey": self._multikey,
            "recall": self._recall,
            "copy": self._copy,
        }

    def row(self, number: int) -> Row:
        """Documents whose lengths lie evenly on a logarithmic scale, until the row is full."""
        dice = Random(f"retrieval {self._seed} {number}")
        sequences, weights, left = [], [], self._context
        shortest = self._settings.min_length
        while left:
            length = min(left, int(shortest * (self._context / shortest) ** dice.random()))
            if left - length < shortest:
                length = left
            ids, answers = self._document(dice, length)
            sequences.append(ids)
            weights.append(self._loss_weights(answers))
            left -= length
        plain = self._settings.answer_weight == self._settings.other_weight == 1
        return Row(tuple(sequences), None if plain else tuple(weights))

    def _loss_weights(self, answers: NDArray[np.bool_]) -> NDArray[np.float32]:
        chosen: NDArray[np.float32] = np.where(
            answers, np.float32(self._settings.answer_weight), np.float32(self._settings.other_weight)
        )
        return chosen

    def _document(self, dice: Random, length: int) -> tuple[Ids, NDArray[np.bool_]]:
        """A document of exactly `length` tokens, and which of them it tells beforehand."""
        draft = self._drafts[_pick(dice, self._settings.tasks)](dice, length)
        if draft.size > length:  # a tokenizer with little but bytes
            draft = self._copy(dice, length)
        hay = self._haystack.take(dice, length - draft.size)
        events = sorted(draft.events, key=lambda event: event[0])
        cuts = [0, *(self._word_start(hay, moment) for moment, _ in events), len(hay)]
        snippets = [*(snippet for _, snippet in events), draft.closing]
        ids, answers = [*draft.opening.ids], [*draft.opening.answers]
        for (start, stop), snippet in zip(pairwise(cuts), snippets, strict=True):
            ids += [*hay[start:stop].tolist(), *snippet.ids]
            answers += [*[False] * (stop - start), *snippet.answers]
        assert len(ids) == length - 1
        return np.array([*ids, self._encoder.end], dtype=np.int64), np.array([*answers, False])

    def _word_start(self, hay: Ids, moment: float) -> int:
        """The first place after a moment where no word is torn apart; the moment itself where words are long."""
        place = int(moment * len(hay))
        near = np.flatnonzero(self._word_starts[hay[place : place + 16]])
        return place + int(near[0]) if len(near) else place

    def _passkey(self, dice: Random, length: int) -> _Draft:
        """One fact, asked for at the end."""
        form, opening = _pick(dice, ((words.PASSKEY, words.PASSKEY_OPENING), (words.MAGIC, words.MAGIC_OPENING)))
        fact = {**next(_facts(dice, "number")), "value": _number(dice, 5 + 2 * _below(dice, 2))}
        draft = self._draft(dice, opening, form, fact)
        draft.close(self._snippet(draft.joint + form[1], fact))
        return draft

    def _multikey(self, dice: Random, length: int) -> _Draft:
        """Facts far apart, some of them asked for on the way."""
        form, most = _pick(dice, words.MULTIKEY), max(16, length // 64)
        return self._facts(dice, length, form, room=length / 4, most=most, asked=0.5)

    def _recall(self, dice: Random, length: int) -> _Draft:
        """A table of pairs, up to most of the document, with questions in between."""
        room = length * (0.1 + 0.8 * dice.random())
        return self._facts(dice, length, _pick(dice, words.RECALL), room=room, most=512, asked=0.3)

    def _facts(
        self, dice: Random, length: int, form: tuple[str, str], *, room: float, most: int, asked: float
    ) -> _Draft:
        """Facts of one form about different keys, as many as there is room for; up to 8 are asked for at the end."""
        needle, question = form
        facts = _facts(dice, "uuid" if form is words.MAGIC and dice.random() < 0.2 else "number")
        told = [next(facts)]
        draft = self._draft(dice, words.MAGIC_OPENING if form is words.MAGIC else "", form, told[0])
        last = self._snippet(draft.joint + question, told[0])
        room = min(room, length) - len(last.ids)
        for fact in islice(facts, 1 + _below(dice, most - 1)):
            moment = dice.random()
            events = [(moment, self._snippet(draft.joint + needle, fact, told=False))]
            if dice.random() < asked:
                events.append((moment + (1 - moment) * dice.random(), self._snippet(draft.joint + question, fact)))
            if draft.size + sum(len(snippet.ids) for _, snippet in events) > room:
                break
            draft.add(events)
            told.append(fact)
        for fact in told[1 : 1 + _below(dice, 8)]:
            asked_again = self._snippet(draft.joint + question, fact)
            if draft.size + len(asked_again.ids) > room:
                break
            draft.close(asked_again)
        draft.close(last)
        return draft

    def _copy(self, dice: Random, length: int) -> _Draft:
        """A passage that comes a second time: told from its fifth token on."""
        size = 8 + _below(dice, max(1, min(length // 4, 512) - 8))
        ids = self._haystack.take(dice, size).tolist()
        if dice.random() < 0.5:
            ids = self._encoder.snippet(" ".join(["", *(_pick(dice, _NOUNS) for _ in range(size))]))[0][:size]
        first = _Snippet(ids, [False] * len(ids))
        again = _Snippet(ids, [False] * 4 + [True] * (len(ids) - 4))
        draft = _Draft("", _Snippet([], []), again, len(ids) + 1)
        draft.add([(dice.random(), first)])
        return draft

    def _draft(self, dice: Random, opening: str, form: tuple[str, str], fact: dict[str, str]) -> _Draft:
        """A document that says one fact somewhere."""
        joint = _pick(dice, (" ", "\n"))
        ids = self._encoder.snippet(opening.format(**fact))[0] if opening else []
        draft = _Draft(joint, _Snippet(ids, [False] * len(ids)), _Snippet([], []), len(ids) + 1)
        draft.add([(dice.random(), self._snippet(joint + form[0], fact, told=False))])
        return draft

    def _snippet(self, form: str, fact: dict[str, str], told: bool = True) -> _Snippet:
        """A form filled in; `told`: its last value is known by now."""
        text = form.format(**fact)
        ids, places = self._encoder.snippet(text)
        value = fact["word" if "{word}" in form else "value"]
        start = text.rindex(value)
        return _Snippet(ids, [told and begin < start + len(value) and stop > start for begin, stop in places])


def _facts(dice: Random, kind: Literal["number", "uuid"]) -> Iterator[dict[str, str]]:
    """Facts about different keys."""
    joint = _pick(dice, (" ", "-"))
    seen: set[int] = set()
    while len(seen) < len(_ADJECTIVES) * len(_NOUNS):
        place = _below(dice, len(_ADJECTIVES) * len(_NOUNS))
        if place in seen:
            continue
        seen.add(place)
        if kind == "uuid":
            yield {"kind": kind, "key": _uuid(dice), "value": _uuid(dice)}
        else:
            value, word = _number(dice, 4 + _below(dice, 4)), f"{_pick(dice, _ADJECTIVES)} {_pick(dice, _NOUNS)}"
            key = f"{_ADJECTIVES[place % len(_ADJECTIVES)]}{joint}{_NOUNS[place // len(_ADJECTIVES)]}"
            yield {"kind": kind, "key": key, "value": value, "word": word}


def _uuid(dice: Random) -> str:
    return str(UUID(int=_below(dice, 1 << 52) << 76 | _below(dice, 1 << 52) << 24 | _below(dice, 1 << 24), version=4))


def _number(dice: Random, digits: int) -> str:
    return str(10 ** (digits - 1) + _below(dice, 9 * 10 ** (digits - 1)))


def _below(dice: Random, count: int) -> int:
    # Of Random's methods only random() promises the same numbers in every version of Python.
    return int(dice.random() * count)


def _pick(dice: Random, choices: Sequence[T]) -> T:
    return choices[_below(dice, len(choices))]
