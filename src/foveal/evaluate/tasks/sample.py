"""What a task asks: a prompt, the answer that should follow it, and how long both are."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

Count = Callable[[str], int]
"""How many tokens a text has, special ones included."""


@dataclass(frozen=True)
class Sample:
    """One question. `prompt + answer` is a text to train on; the answer's characters are its last ones."""

    prompt: str
    answer: str
    """What should follow, the space before it included."""
    references: tuple[str, ...]
    """What an answer in any wording must contain."""
    task: str = ""
    length: int = 0
    """Tokens that prompt and answer were given; what they take is a little less."""
    depth: float | None = None
    """Where in the haystack the needle lies, 0 to 1; None: anywhere, or there is none."""
    max_tokens: int = 0
    """Tokens that the answer was given."""

    @property
    def needed(self) -> str:
        """The answer up to its last reference: a full stop more or less is no mistake."""
        return self.answer[: max(self.answer.rindex(one) + len(one) for one in self.references)]

    def score(self, text: str) -> float:
        """The share, 0 to 1, of the references that are in the text, in any case of letters (RULER's recall)."""
        lowered = text.lower()
        return sum(reference.lower() in lowered for reference in self.references) / len(self.references)


@dataclass(frozen=True)
class Haystack:
    """What hides a needle: sentences, given in their order, and what stands between two of them."""

    sentences: Sequence[str]
    joint: str

    @staticmethod
    def of_text(text: str) -> "Haystack":
        """The sentences of any text."""
        sentences = [flat for part in re.split(r"(?<=[.!?])\s+", text) if (flat := " ".join(part.split()))]
        if not sentences:
            raise ValueError("a haystack needs at least one sentence")
        return Haystack(sentences, " ")

    def take(self, draw: Random, count: int) -> list[str]:
        """So many sentences from a random one on, the first following the last."""
        start = draw.randrange(len(self.sentences))
        return [self.sentences[(start + place) % len(self.sentences)] for place in range(count)]


NOISE = Haystack(
    ["The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."], joint="\n"
)
"""The filler of the passkey task (arXiv 2305.16300) and of RULER."""


@dataclass(frozen=True)
class Setting:
    """What a sample is made for."""

    length: int
    """Tokens of prompt and answer together."""
    depth: float | None = None
    haystack: Haystack = NOISE


Build = Callable[[Random, int, Setting], Sample]
"""A sample with so many units of filler: sentences, needles or words."""


@dataclass(frozen=True)
class Task:
    """How samples of a task are made."""

    name: str
    build: Build
    answer_tokens: int
    """Tokens that an answer is given, as in RULER; more where the tokenizer needs more for it."""
    least: int = 1
    """Units of filler without which there is no task."""
    has_depth: bool = False
    """Whether the needle can be put at a depth."""

    def sample(self, setting: Setting, count: Count, *, seed: int = 0, index: int = 0) -> Sample:
        """Sample `index` of those with a seed, as long as fits.

        Its prompt and the tokens kept for an answer have at most `setting.length` tokens by `count`. Raises ValueError
        where even the shortest is too long, and for a depth that is not from 0 to 1 or that the task cannot have.
        """
        if setting.depth is not None and not (self.has_depth and 0 <= setting.depth <= 1):
            what = "must be from 0 to 1" if self.has_depth else f"is not for {self.name}"
            raise ValueError(f"depth {setting.depth} {what}")

        def build(size: int) -> Sample:
            draw = Random(f"{self.name} {setting.length} {setting.depth} {seed} {index}")
            built = self.build(draw, size, setting)
            # Small tokenizers may spell an answer letter by letter.
            room = max(self.answer_tokens, count(built.answer) + 1)
            return replace(built, task=self.name, length=setting.length, depth=setting.depth, max_tokens=room)

        def tokens(built: Sample) -> int:
            return count(built.prompt) + built.max_tokens

        shortest = build(self.least)
        if tokens(shortest) > setting.length:
            needed = f"at least {tokens(shortest)} tokens with this tokenizer"
            raise ValueError(f"{self.name} needs {needed}, not {setting.length}")
        return _largest(build, tokens, shortest, self.least, setting.length)


def _largest(
    build: Callable[[int], Sample], tokens: Callable[[Sample], int], shortest: Sample, least: int, length: int
) -> Sample:
    """The sample with the most units that fits in `length` tokens, the next size guessed from the last one's tokens per
    unit: a few samples are made, where bisection would make dozens."""
    best, low, high = shortest, least, None
    base = used = tokens(shortest)
    size = 2 * least + 16
    while high is None or high - low > 1:
        built = build(size)
        taken = tokens(built)
        each = max((taken - base) / (size - least), 1e-3)
        if taken <= length:
            best, low, used = built, size, taken
        else:
            high = size
        guess = low + max(1, int((length - used) / each))
        size = guess if high is None else min(guess, high - 1)
    return best
