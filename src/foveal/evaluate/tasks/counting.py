"""RULER's aggregation tasks: common and frequent words (arXiv 2404.06654, section 3.3; `common_words_extraction.py`,
`freq_words_extraction.py`)."""

import string
from math import pi
from random import Random

from foveal.evaluate.tasks.sample import Sample, Setting, Task
from foveal.evaluate.tasks.words import draw_names, draw_words

_CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 "
    "words that appear most often in the list are:"
)
_FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text? Answer: According to the coded text above, the "
    "three most frequently appeared words are:"
)
_COMMON = 10
# Up to here the list and its example are shorter, and words in it rarer: (words, uses of common ones, of others).
_SHORT = 4096
_CODE_LETTERS = 6
_ZETA_2 = pi**2 / 6


def _common_words(draw: Random, size: int, setting: Setting) -> Sample:
    short = setting.length < _SHORT
    example, example_words = _list(draw, *((20, 3, 1) if short else (40, 10, 3)))
    question, words = _list(draw, size, *((6, 1) if short else (30, 3)))
    prompt = f"{_CWE.format(context=example)}{_numbered(example_words)}\n{_CWE.format(context=question)}"
    return Sample(prompt, _numbered(words), tuple(words))


def _list(draw: Random, size: int, common_uses: int, other_uses: int) -> tuple[str, list[str]]:
    """A shuffled list of `size` different words, and those of them that are common."""
    words = draw_words(draw, size)
    common = words[:_COMMON]
    uses = common * common_uses + words[_COMMON:] * other_uses
    draw.shuffle(uses)
    return _numbered(uses).strip(), common


def _numbered(words: list[str]) -> str:
    return "".join(f" {place}. {word}" for place, word in enumerate(words, 1))


def _frequent_words(draw: Random, size: int, setting: Setting) -> Sample:
    """Coded word number k is used size k^-2 / zeta(2) times; the first of them is dots."""
    codes = ["...", *draw_names(draw, max(4, setting.length // 50), _CODE_LETTERS, string.ascii_lowercase)]
    uses = [code for rank, code in enumerate(codes, 1) for _ in range(int(size / (rank**2 * _ZETA_2)))]
    draw.shuffle(uses)
    words = codes[1:4]
    return Sample(_FWE.format(context=" ".join(uses)), " " + ", ".join(words), tuple(words))


CWE = Task("cwe", _common_words, 120, least=_COMMON + 1)
# With fewer words the third and the fourth code are used equally often.
FWE = Task("fwe", _frequent_words, 50, least=100)
