"""RULER's variable tracking (arXiv 2404.06654, section 3.2; `variable_tracking.py`)."""

from random import Random

from foveal.evaluate.tasks.sample import NOISE, Haystack, Sample, Setting, Task
from foveal.evaluate.tasks.words import draw_names, draw_number

_HOPS, _LETTERS, _DIGITS = 4, 5, 5
# The worked example before the question: shorter names, so that it cannot be mistaken for the answer.
_EXAMPLE_SENTENCES, _EXAMPLE_LETTERS = 10, 3
_TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {value} in the text above. Answer: According to the chain(s) of "
    # "assgined" is how RULER spells it, and models are compared on its prompts.
    "variable assignment in the text above, {count} variables are assgined the value {value}, they are:"
)


def _tracking(draw: Random, size: int, setting: Setting) -> Sample:
    example, example_names = _chain(draw, _EXAMPLE_SENTENCES, _EXAMPLE_LETTERS, NOISE)
    question, names = _chain(draw, size, _LETTERS, setting.haystack)
    prompt = f"{example} {' '.join(example_names)}\n\n\n\n{question}"
    return Sample(prompt, " " + " ".join(names), tuple(names))


def _chain(draw: Random, size: int, letters: int, haystack: Haystack) -> tuple[str, list[str]]:
    """A prompt with one chain of assignments in so many sentences, and the names that it assigns."""
    names = draw_names(draw, _HOPS + 1, letters)
    value = draw_number(draw, _DIGITS)
    assigned = [value, *(f"VAR {name}" for name in names[:-1])]
    chain = [f"VAR {name} = {source}" for name, source in zip(names, assigned, strict=True)]
    sentences = haystack.take(draw, size)
    places = sorted(draw.sample(range(size + len(chain)), len(chain)))
    for place, assignment in zip(places, chain, strict=True):
        sentences.insert(place, assignment)
    context = haystack.joint.join(sentences)
    return _TEMPLATE.format(context=context, value=value, count=len(names)), names


VT = Task("vt", _tracking, 30)
