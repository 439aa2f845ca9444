"""Made-up documents in which something said once has to be found again, at any distance up to the context."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from random import Random
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from foveal.evaluate.tasks import NOISE, RULER, Haystack, Setting
from foveal.evaluate.tasks.associations import draw_associations
from foveal.evaluate.tasks.words import ADJECTIVES, NOUNS, draw_number, draw_pairs, draw_uuid
from foveal.train.data import phrases
from foveal.train.data.haystacks import Hay
from foveal.train.data.rows import Ids, Row
from foveal.train.data.settings import RetrievalSettings
from foveal.train.data.tokenizer import Encoder

VERSION = 4
"""Counts changes of the documents made: streams of other versions are not continued."""


@dataclass(frozen=True)
class _Snippet:
    ids: list[int]
    answers: list[bool]
    """Which ids the document tells before them."""

    @staticmethod
    def plain(ids: Iterable[int]) -> "_Snippet":
        """Nothing of it is an answer."""
        ids = list(ids)
        return _Snippet(ids, [False] * len(ids))

    def __add__(self, other: "_Snippet") -> "_Snippet":
        return _Snippet(self.ids + other.ids, self.answers + other.answers)


@dataclass
class _Draft:
    """A document before it has its length: snippets at moments between 0 and 1, haystack around them."""

    joint: str
    """What stands before each snippet."""
    opening: _Snippet
    closing: _Snippet = field(default_factory=lambda: _Snippet([], []))
    events: list[tuple[float, _Snippet]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Tokens without haystack."""
        parts = (self.opening, self.closing, *(snippet for _, snippet in self.events))
        return sum(len(part.ids) for part in parts)


_Maker = Callable[[Random, int], _Snippet | None]
"""A document's text of at most so many tokens; None where it needs more."""


class RetrievalRows:
    """Rows of retrieval documents; row n depends on the seed and n alone."""

    def __init__(
        self, settings: RetrievalSettings, encoder: Encoder, haystack: Hay, context: int, seed: Sequence[int]
    ) -> None:
        if context < settings.min_length:
            raise ValueError(f"min_length = {settings.min_length} is longer than the context of {context} tokens")
        self._settings, self._encoder, self._context, self._seed = settings, encoder, context, tuple(seed)
        self._haystack = haystack
        self._word_starts = np.array(encoder.word_starts())
        self._makers: dict[str, _Maker] = {
            "passkey": self._passkey,
            "multikey": self._multikey,
            "recall": self._recall,
            "copy": self._copy,
            "mqar": self._mqar,
            **{name: partial(self._ruler, name) for name in RULER},
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
            # RULER's documents do not take all of their length, and nothing may fit into the last of it.
            made = self._document(dice, length) if left >= shortest else _Snippet.plain(self._hay(dice, left))
            sequences.append(np.array(made.ids, dtype=np.int64))
            weights.append(self._loss_weights(np.array(made.answers)))
            left -= len(made.ids)
        plain = self._settings.answer_weight == self._settings.other_weight == 1
        return Row(tuple(sequences), None if plain else tuple(weights))

    def _loss_weights(self, answers: NDArray[np.bool_]) -> NDArray[np.float32]:
        chosen: NDArray[np.float32] = np.where(
            answers, np.float32(self._settings.answer_weight), np.float32(self._settings.other_weight)
        )
        return chosen

    def _document(self, dice: Random, length: int) -> _Snippet:
        """A document of at most `length` tokens."""
        begin, end = _Snippet.plain(self._encoder.begin), _Snippet.plain([self._encoder.end])
        room = length - len(begin.ids) - len(end.ids)
        made = self._makers[dice.choice(self._settings.tasks)](dice, room)
        if made is None:  # a tokenizer with little but bytes
            made = self._copy(dice, room)
        return begin + made + end

    def _finish(self, draft: _Draft, dice: Random, length: int) -> _Snippet | None:
        """The document with exactly `length` tokens."""
        if draft.size > length:
            return None
        hay = self._haystack.take(dice, length - draft.size)
        events = sorted(draft.events, key=lambda event: event[0])
        cuts = [0, *(self._word_start(hay, moment) for moment, _ in events), len(hay)]
        made = draft.opening
        ids, answers = list(made.ids), list(made.answers)
        snippets = [*(snippet for _, snippet in events), draft.closing]
        for (start, stop), snippet in zip(pairwise(cuts), snippets, strict=True):
            ids += [*hay[start:stop].tolist(), *snippet.ids]
            answers += [*[False] * (stop - start), *snippet.answers]
        return _Snippet(ids, answers)

    def _hay(self, dice: Random, count: int) -> list[int]:
        ids: list[int] = self._haystack.take(dice, count).tolist()
        return ids

    def _word_start(self, hay: Ids, moment: float) -> int:
        """The first place after a moment where no word is torn apart; the moment itself where words are long."""
        place = int(moment * len(hay))
        near = np.flatnonzero(self._word_starts[hay[place : place + 16]])
        return place + int(near[0]) if len(near) else place

    def _passkey(self, dice: Random, length: int) -> _Snippet | None:
        """One fact, asked for at the end."""
        form, opening = dice.choice(
            ((phrases.PASSKEY, phrases.PASSKEY_OPENING), (phrases.MAGIC, phrases.MAGIC_OPENING))
        )
        (fact,) = _facts(dice, "number", 1)
        fact["value"] = draw_number(dice, dice.choice((5, 7)))
        draft = self._draft(dice, opening, form, fact)
        draft.closing += self._snippet(draft.joint + form[1], fact)
        return self._finish(draft, dice, length)

    def _multikey(self, dice: Random, length: int) -> _Snippet | None:
        """Facts far apart, some of them asked for on the way."""
        most = max(16, length // 64)
        draft = self._table(dice, dice.choice(phrases.MULTIKEY), room=length // 4, most=most, asked=0.5)
        return self._finish(draft, dice, length)

    def _recall(self, dice: Random, length: int) -> _Snippet | None:
        """A table of pairs, up to most of the document, with questions in between."""
        room = int(length * (0.1 + 0.8 * dice.random()))
        return self._finish(
            self._table(dice, dice.choice(phrases.RECALL), room=room, most=512, asked=0.3), dice, length
        )

    def _table(self, dice: Random, form: tuple[str, str], *, room: int, most: int, asked: float) -> _Draft:
        """Facts of one form about different keys, as many as there is room for; up to 8 are asked for at the end."""
        needle, question = form
        kind: Literal["number", "uuid"] = "uuid" if form is phrases.MAGIC and dice.random() < 0.2 else "number"
        facts = _facts(dice, kind, dice.randint(2, most))
        first = next(facts)
        draft = self._draft(dice, phrases.MAGIC_OPENING if form is phrases.MAGIC else "", form, first)
        last = self._snippet(draft.joint + question, first)
        room -= draft.size + len(last.ids)
        told = []
        for fact in facts:
            moment = dice.random()
            events = [(moment, self._snippet(draft.joint + needle, fact, told=False))]
            if dice.random() < asked:
                events.append((moment + (1 - moment) * dice.random(), self._snippet(draft.joint + question, fact)))
            room -= sum(len(snippet.ids) for _, snippet in events)
            if room < 0:
                break
            draft.events += events
            told.append(fact)
        for fact in told[: dice.randrange(8)]:
            again = self._snippet(draft.joint + question, fact)
            room -= len(again.ids)
            if room < 0:
                break
            draft.closing += again
        draft.closing += last
        return draft

    def _copy(self, dice: Random, length: int) -> _Snippet:
        """A passage that comes a second time: told from its fifth token on."""
        size = dice.randrange(8, max(9, min(length * 2 // 5, 512)))
        ids = self._hay(dice, size)
        if dice.random() < 0.5:
            ids = self._encoder.snippet(" ".join(["", *dice.choices(NOUNS, k=size)]))[0][:size]
        draft = _Draft("", _Snippet([], []), _Snippet(ids, [False] * 4 + [True] * (len(ids) - 4)))
        draft.events.append((dice.random(), _Snippet.plain(ids)))
        made = self._finish(draft, dice, length)
        assert made is not None
        return made

    def _mqar(self, dice: Random, length: int) -> _Snippet:
        """Pairs of single tokens, their number evenly on a logarithmic scale; queries fill the rest."""
        ids, most = self._encoder.plain, self._settings.mqar_keys
        pairs = int((1 + min(length // 4, most or len(ids) // 2)) ** dice.random())
        if most is not None:
            few = int(pairs * ((1 + most) / pairs) ** dice.random())
            ids = ids[:few] + ids[most : most + few]
        return _Snippet(*draw_associations(dice, ids, pairs, length // 2 - pairs))

    def _ruler(self, name: str, dice: Random, length: int) -> _Snippet | None:
        """One of RULER's questions, in its own noise or in ours."""
        haystack = NOISE
        if dice.random() < 0.5:
            haystack = Haystack.of_text(self._encoder.text(self._hay(dice, length)))
        setting = Setting(length, haystack=haystack)
        try:
            sample = RULER[name].sample(setting, self._encoder.count, seed=dice.getrandbits(32))
        except ValueError:  # the question alone is longer
            return None
        return self._marked(sample.prompt + sample.answer, len(sample.prompt))

    def _draft(self, dice: Random, opening: str, form: tuple[str, str], fact: dict[str, str]) -> _Draft:
        """A document that says one fact somewhere."""
        draft = _Draft(dice.choice((" ", "\n")), _Snippet.plain(self._encoder.snippet(opening.format(**fact))[0]))
        draft.events.append((dice.random(), self._snippet(draft.joint + form[0], fact, told=False)))
        return draft

    def _snippet(self, form: str, fact: dict[str, str], told: bool = True) -> _Snippet:
        """A form filled in; `told`: its last value is known by now."""
        text, value = form.format(**fact), fact["word" if "{word}" in form else "value"]
        start = text.rindex(value)
        return self._marked(text, start, start + len(value)) if told else _Snippet.plain(self._encoder.snippet(text)[0])

    def _marked(self, text: str, start: int, stop: int | None = None) -> _Snippet:
        """A text whose characters from `start` to `stop` (None: to its end) are the answer."""
        ids, places = self._encoder.snippet(text)
        stop = len(text) if stop is None else stop
        return _Snippet(ids, [begin < stop and end > start for begin, end in places])


def _facts(dice: Random, kind: Literal["number", "uuid"], count: int) -> Iterator[dict[str, str]]:
    """Facts about different keys."""
    joint = dice.choice((" ", "-"))
    for pair in draw_pairs(dice, count):
        if kind == "uuid":
            yield {"kind": kind, "key": draw_uuid(dice), "value": draw_uuid(dice)}
        else:
            word = f"{dice.choice(ADJECTIVES)} {dice.choice(NOUNS)}"
            value = draw_number(dice, dice.randint(4, 7))
            yield {"kind": kind, "key": pair.replace("-", joint), "value": value, "word": word}
