"""Answers that are written, and answers that are only checked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import make_oracle

from foveal import load_model
from foveal.engine import LLM, SamplingParams
from foveal.evaluate import answers, perplexity
from foveal.evaluate.answers import cells, force_answers, generate_answers, make_samples, split_answer
from foveal.evaluate.tasks import PASSKEY, Sample, Setting
from foveal.models import Decoder

LENGTH = 230


@pytest.fixture
def model(tmp_path: Path) -> Decoder:
    """Random, with a token for every byte."""
    make_oracle("llama", tmp_path, vocab_size=256, max_position_embeddings=512)
    return load_model(tmp_path)


def short(prompt: str, answer: str) -> Sample:
    return Sample(prompt, answer, (answer.strip(" ."),), "passkey", LENGTH, None, 4)


def greedy(model: Decoder, tokenizer: Any, prompt: str, count: int) -> list[int]:
    ids = tokenizer.encode(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


@torch.no_grad()
def test_what_the_model_writes_is_scored(model: Decoder, tokenizer: Any) -> None:
    """Guards against answers that get into another sample's row, and against more tokens than the sample has."""
    prompts = [f"{word} is what I say, and so on" for word in ("This", "That", "Nothing", "Everything", "Something")]
    expected = [tokenizer.decode(greedy(model, tokenizer, prompt, 4)) for prompt in prompts]
    samples = [short(prompt, f" {text}") for prompt, text in zip(prompts, expected, strict=True)]
    samples[3] = short(prompts[3], " none of this")
    llm = LLM(model, tokenizer=tokenizer, max_num_seqs=2, max_model_len=LENGTH)
    done: list[int] = []
    written = generate_answers(llm, samples, done.append, at_once=2)
    assert [one.text for one in written] == expected
    assert [one.score for one in written] == [1.0, 1.0, 1.0, 0.0, 1.0]
    assert done == [LENGTH] * 5


@torch.no_grad()
def test_every_token_must_be_foreseen(model: Decoder, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an answer judged by its first or its last token alone, or one row off."""
    monkeypatch.setattr(perplexity, "TILE_LOGITS", 256 * 2)
    monkeypatch.setattr(answers, "TILE_LOGITS", 256 * 2)
    prompt = "It was a dark and stormy night, " * 4
    ids = greedy(model, tokenizer, prompt, 6)
    right = tokenizer.encode(prompt) + ids
    for place in range(-7, 0):
        wrong = list(right)
        wrong[place] = (wrong[place] + 1) % 256
        # Ids, not text: a random model writes bytes that are no characters.
        foreseen = answers._foreseen(answers.Prefill(model, len(right)), wrong, len(right) - 6)
        assert not foreseen or place == -7
    assert answers._foreseen(answers.Prefill(model, len(right)), right, len(right) - 6)


def test_forced_answers_of_samples(model: Decoder, tokenizer: Any) -> None:
    samples = make_samples(PASSKEY, [Setting(400, 0.0), Setting(400, 1.0)], tokenizer, each=2)
    assert [(one.depth, one.length) for one in samples] == [(0.0, 400), (0.0, 400), (1.0, 400), (1.0, 400)]
    assert len({one.answer for one in samples}) == 4
    forced = force_answers(model, tokenizer, samples)
    assert [one.score for one in forced] == [0.0] * 4  # a random model knows nothing
    table = cells(forced)
    assert [(one.depth, one.score.count) for one in table] == [(0.0, 2), (1.0, 2)]
    assert table[0].as_dict() == {
        "task": "passkey", "length": 400, "depth": 0.0, "mean": 0.0, "error": 0.0, "count": 2,
    }  # fmt: skip


class Greedy:
    """A tokenizer that joins a space with what follows, over the end of the prompt too."""

    def encode(self, text: str) -> list[int]:
        return [sum(map(ord, part)) for part in text.replace(" ", "| ").split("|") if part]


def test_the_answer_begins_where_the_tokens_differ() -> None:
    """Guards against answers whose first token was already in the prompt."""
    ids, start = split_answer(Greedy(), Sample("a bc", " de fg hi", ("fg", "de")))
    assert (len(ids), start) == (4, 2)
    # The prompt's last token grows: the answer begins with it.
    ids, start = split_answer(Greedy(), Sample("a bc", "de fg.", ("fg",)))
    assert (len(ids), start) == (3, 1)


def test_a_prompt_without_room_is_an_error(model: Decoder, tokenizer: Any) -> None:
    llm = LLM(model, tokenizer=tokenizer, max_num_seqs=1, max_model_len=64)
    with pytest.raises(ValueError, match="passkey at 230 tokens: the prompt has 80 tokens"):
        generate_answers(llm, [short("x" * 80, " y")])


def test_a_loaded_model_is_not_loaded_again(model: Decoder, tokenizer: Any) -> None:
    """Options of loading that would be ignored are refused."""
    with pytest.raises(ValueError, match="dtype = 'bfloat16' is for loading"):
        LLM(model, tokenizer=tokenizer, dtype="bfloat16")
    with pytest.raises(ValueError, match="needs its tokenizer"):
        LLM(model)
    llm = LLM(model, tokenizer=tokenizer, max_num_seqs=1, max_model_len=64)
    assert llm.generate("abc", SamplingParams(temperature=0.0, max_tokens=3))[0].prompt_token_ids == tokenizer.encode(
        "abc"
    )
    assert not model.fused  # left as it was
