"""Samples: as long as asked, solvable, repeatable, and with what RULER says in them."""

import re
from collections import Counter
from random import Random
from typing import Any

import pytest

from foveal.evaluate.tasks import NOISE, PASSKEY, RULER, TASKS, Haystack, Sample, Setting
from foveal.evaluate.tasks.words import draw_names, draw_pairs, draw_words

LENGTH = 6000  # bytes


def count(text: str) -> int:
    return len(text.encode())


def sample(name: str, length: int = LENGTH, depth: float | None = None, **more: Any) -> Sample:
    return TASKS[name].sample(Setting(length, depth, **more), count)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [LENGTH, 20_000])
def test_samples_fill_their_length(name: str, length: int) -> None:
    """Guards against prompts that are too long for the context, or far too short to test it."""
    one = sample(name, length)
    assert one.task == name and one.length == length
    taken = count(one.prompt) + one.max_tokens
    assert 0.93 * length < taken <= length
    assert one.max_tokens > count(one.answer)  # one token a byte: more than RULER's budget where that is needed


@pytest.mark.parametrize("name", TASKS)
def test_samples_are_repeatable_and_different(name: str) -> None:
    task = TASKS[name]
    first, again = (task.sample(Setting(LENGTH), count, seed=3, index=4) for _ in range(2))
    assert first == again
    others = [task.sample(Setting(LENGTH), count, seed=seed, index=index) for seed, index in [(3, 5), (4, 4)]]
    assert len({first.answer, *(one.answer for one in others)}) == 3


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_scores_and_nothing_else_does(name: str) -> None:
    one = sample(name)
    assert one.score(one.answer) == 1.0
    assert one.score(one.answer.upper()) == 1.0
    assert one.score("") == 0.0
    assert one.answer.startswith(" ") and not one.prompt.endswith(" ")


def test_a_part_of_the_references_is_a_part_of_the_score() -> None:
    """RULER's recall."""
    one = sample("cwe")
    assert one.score(" ".join(one.references[:3])) == pytest.approx(0.3)


@pytest.mark.parametrize("name", TASKS)
def test_too_short_a_length_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} needs at least [0-9]+ tokens"):
        sample(name, 60)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["passkey", "niah_single_1", "niah_multikey_2", "niah_multikey_3"])
def test_the_needle_lies_at_its_depth(name: str, depth: float) -> None:
    one = sample(name, depth=depth)
    (value,) = one.references
    assert abs(one.prompt.index(value) / len(one.prompt) - depth) < 0.1
    assert one.depth == depth


def test_depths_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"depth 1\.5 must be from 0 to 1"):
        sample("passkey", depth=1.5)
    with pytest.raises(ValueError, match=r"depth 0\.5 is not for cwe"):
        sample("cwe", depth=0.5)


def test_depths_do_not_share_keys() -> None:
    """Guards against a grid whose cells all ask for the same number."""
    assert sample("passkey", depth=0.0).answer != sample("passkey", depth=1.0).answer


@pytest.mark.parametrize("name", ["passkey", "niah_single_1", "vt"])
def test_any_text_is_a_haystack(name: str) -> None:
    """The sentences come in their order, and the noise is gone."""
    haystack = Haystack.of_text("First one here. Second\none? Third, the last!")
    assert haystack.sentences == ["First one here.", "Second one?", "Third, the last!"]
    question = sample(name, haystack=haystack).prompt.rpartition("\n\n\n\n")[2]
    assert "The grass is green" not in question
    assert "First one here. Second one? Third, the last! First one here." in question


def test_an_empty_haystack_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sentence"):
        Haystack.of_text(" \n ")


def test_passkey() -> None:
    one = sample("passkey")
    (key,) = one.references
    assert re.fullmatch(r"[1-9]\d{4}", key) and one.answer == f" {key}."
    assert one.prompt.count(key) == 2
    assert one.prompt.count(NOISE.sentences[0]) > 40


def test_niah_single() -> None:
    one = sample("niah_single_1")
    (value,) = one.references
    key = re.findall(r"What is the special magic number for (\S+) mentioned", one.prompt)[0]
    assert one.prompt.count(f"One of the special magic numbers for {key} is: {value}.") == 1
    assert len(value) == 7


@pytest.mark.parametrize(("name", "kind"), [("niah_multikey_2", "number"), ("niah_multikey_3", "uuid")])
def test_niah_among_needles(name: str, kind: str) -> None:
    """The haystack is needles, and only one of them has the key that is asked for."""
    one = sample(name)
    needles = dict(re.findall(rf"One of the special magic {kind}s for (\S+) is: (\S+)\.\n", one.prompt))
    key = re.findall(rf"What is the special magic {kind} for (\S+) mentioned", one.prompt)[0]
    assert len(needles) > 20
    assert one.prompt.count(f"for {key} is:") == 1
    assert (needles[key],) == one.references


def test_variable_tracking() -> None:
    """The chain leads from the value to every name, in order, and the example does not use its names."""
    one = sample("vt")
    example, question = one.prompt.split("\n\n\n\n")
    known = re.findall(r"assigned the value (\d+) in the text", question)
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", question):
        assert source == known[-1]
        known.append(name)
    assert tuple(known[1:]) == one.references and len(one.references) == 5
    assert not any(name in example for name in one.references)
    assert re.search(r"they are: [A-Z]{3}( [A-Z]{3}){4}$", example)


@pytest.mark.parametrize(("length", "uses"), [(3000, (6, 1)), (9000, (30, 3))])
def test_common_words(length: int, uses: tuple[int, int]) -> None:
    """RULER's frequencies: 30 and 3, fewer in short prompts."""
    one = TASKS["cwe"].sample(Setting(length), lambda text: len(text.split()))
    listed = one.prompt.rpartition("Memorize the ones that appear most often.")[2].partition("Question")[0]
    counts = Counter(re.findall(r"\d+\. ([\w-]+)", listed))
    assert {word for word, times in counts.items() if times == uses[0]} == set(one.references)
    assert set(counts.values()) == set(uses)
    assert one.answer.split()[:2] == ["1.", one.references[0]]


@pytest.mark.parametrize("size", [TASKS["fwe"].least, 1000])
def test_frequent_words_can_be_told_apart(size: int) -> None:
    """Dots are the most frequent; the answers follow in order, and the fourth is rarer."""
    one = TASKS["fwe"].build(Random(0), size, Setting(500))
    coded = one.prompt.partition("coded words. ")[2].partition("\n")[0].split()
    ranked = Counter(coded).most_common(5)
    assert ranked[0][0] == "..."
    assert tuple(word for word, _ in ranked[1:4]) == one.references
    assert ranked[3][1] > ranked[4][1]


def test_words_are_different() -> None:
    """Beyond the single words there are pairs."""
    for draw in (draw_words, draw_pairs):
        assert len(set(draw(Random(0), 3000))) == 3000
    with pytest.raises(ValueError, match="different word pairs"):
        draw_pairs(Random(0), 10**6)
    assert len(set(draw_names(Random(0), 20, 1))) == 20


def test_ruler_is_what_it_says() -> None:
    assert set(RULER) == {"niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"}


def test_few_samples_are_made_to_find_the_size() -> None:
    """Guards against a search that tokenizes a long prompt dozens of times."""
    calls: list[int] = []

    def counted(text: str) -> int:
        calls.append(len(text))
        return count(text)

    PASSKEY.sample(Setting(200_000), counted)
    assert sum(size > 100_000 for size in calls) <= 6
