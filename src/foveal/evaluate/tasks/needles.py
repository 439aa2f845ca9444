"""Needles in haystacks: the passkey (arXiv 2305.16300) and RULER's retrieval tasks (arXiv 2404.06654, `niah.py`)."""

from random import Random

from foveal.evaluate.tasks.sample import Sample, Setting, Task
from foveal.evaluate.tasks.words import draw_number, draw_pairs, draw_uuid

_PASSKEY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there."
)
_NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
_NIAH = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {key} mentioned in the provided text? The "
    "special magic {kind} for {key} mentioned in the provided text is"
)
_DIGITS, _PASSKEY_DIGITS = 7, 5


def _passkey(draw: Random, size: int, setting: Setting) -> Sample:
    key = draw_number(draw, _PASSKEY_DIGITS)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    sentences = setting.haystack.take(draw, size)
    _hide(draw, sentences, needle, setting.depth)
    context = setting.haystack.joint.join(sentences)
    return Sample(f"{_PASSKEY}\n{context}\nWhat is the pass key? The pass key is", f" {key}.", (key,))


def _niah_single(draw: Random, size: int, setting: Setting) -> Sample:
    (key,), value = draw_pairs(draw, 1), draw_number(draw, _DIGITS)
    sentences = setting.haystack.take(draw, size)
    _hide(draw, sentences, _NEEDLE.format(kind="number", key=key, value=value), setting.depth)
    return _niah("number", key, value, setting.haystack.joint.join(sentences))


def _niah_numbers(draw: Random, size: int, setting: Setting) -> Sample:
    """The haystack is needles of the same kind."""
    key, *others = draw_pairs(draw, size + 1)
    value = draw_number(draw, _DIGITS)
    needles = [_NEEDLE.format(kind="number", key=other, value=draw_number(draw, _DIGITS)) for other in others]
    _hide(draw, needles, _NEEDLE.format(kind="number", key=key, value=value), setting.depth)
    return _niah("number", key, value, "\n".join(needles))


def _niah_uuids(draw: Random, size: int, setting: Setting) -> Sample:
    key, value = draw_uuid(draw), draw_uuid(draw)
    needles = [_NEEDLE.format(kind="uuid", key=draw_uuid(draw), value=draw_uuid(draw)) for _ in range(size)]
    _hide(draw, needles, _NEEDLE.format(kind="uuid", key=key, value=value), setting.depth)
    return _niah("uuid", key, value, "\n".join(needles))


def _niah(kind: str, key: str, value: str, context: str) -> Sample:
    return Sample(_NIAH.format(kind=kind, key=key, context=context), f" {value}.", (value,))


def _hide(draw: Random, sentences: list[str], needle: str, depth: float | None) -> None:
    """Put the needle between two sentences: so far into them, or anywhere."""
    place = draw.randrange(len(sentences) + 1) if depth is None else round(depth * len(sentences))
    sentences.insert(place, needle)


PASSKEY = Task("passkey", _passkey, 16, has_depth=True)
NIAH_SINGLE_1 = Task("niah_single_1", _niah_single, 128, has_depth=True)
NIAH_MULTIKEY_2 = Task("niah_multikey_2", _niah_numbers, 128, has_depth=True)
NIAH_MULTIKEY_3 = Task("niah_multikey_3", _niah_uuids, 128, has_depth=True)
