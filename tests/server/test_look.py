"""The look as clients get it."""

from array import array
from pathlib import Path

import pytest
from oracle import make_oracle
from tokenizers import Tokenizer
from words import byte_level, save_words

from foveal import LLM, SamplingParams
from foveal.engine.look import LayerSight, TokenSelection
from foveal.models.tokenizer import token_bytes
from foveal.server.look import ChoiceLook, FovealOptions, LookedToken, LookSource, RequestLook

from .serving import serving

LOOK = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, selection=True)


def source_of(llm: LLM) -> LookSource:
    return LookSource(llm.layer_sights, token_bytes(llm.tokenizer), llm.tokenizer.all_special_ids, llm.cache_bytes)


def make(name: str, folder: Path, words: Tokenizer) -> LLM:
    tokens = save_words(words, folder)
    make_oracle(name, folder, vocab_size=tokens, num_hidden_layers=3)
    return LLM(folder, dtype="float32")


def positions(runs: list[int]) -> list[int]:
    return [place for first, last in zip(runs[::2], runs[1::2], strict=True) for place in range(first, last)]


def test_pieces_add_up(tmp_path: Path) -> None:
    """Guards against texts that do not join to the text, characters lost between tokens, and runs of another token."""
    llm = make("deepseek_v32", tmp_path, byte_level("gpt-2"))
    prompt = "the cat 😀 naïve, and the hat on the mat: 2024"
    (output,) = llm.generate(prompt, LOOK)
    source = source_of(llm)
    request = source.request(output.prompt_token_ids)
    assert "".join(token.text for token in request.prompt) == prompt
    assert [(one.layer, one.kind, one.reach) for one in request.layers] == [(n, "sparse", 12) for n in range(3)]
    assert (request.dense_layers, request.recurrent_layers) == (0, 0)
    one = output.outputs[0]
    assert one.selection is not None
    whole = source.choice().add(one.token_ids, one.selection).tokens
    looks = source.choice()
    pieces = [
        token
        for at in range(0, 12, 5)
        for token in looks.add(one.token_ids[at : at + 5], one.selection[at : at + 5]).tokens
    ]
    assert pieces == whole and [token.id for token in whole] == one.token_ids
    for place, token in enumerate(whole):
        assert token.position == len(request.prompt) + place
        assert token.cache_bytes == llm.cache_bytes(token.position + 1)
        for runs, share in zip(token.layers, token.recall, strict=True):
            chosen = positions(runs)
            assert len(chosen) == 12 and chosen == sorted(set(chosen)) and chosen[-1] < token.position
            assert share is not None and 0 < share <= 1


def test_both_endpoints_carry_it(tmp_path: Path) -> None:
    """Guards against a look of another choice, or of a part of the tokens only, whole and as a stream."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    words = byte_level("gpt-2")
    tokens = save_words(words, tmp_path, template)
    make_oracle("deepseek_v32", tmp_path, vocab_size=tokens, eos_token_id=None)
    ask = {"model": "tiny", "n": 2, "seed": 3, "max_tokens": 20, "extra_body": {"foveal": {"selection": True}}}
    with serving(LLM(tmp_path, dtype="float32")) as server, server.client() as client:
        chat, text = client.chat.completions, client.completions
        messages = [{"role": "user", "content": "the cat sat on the mat 😀"}]
        for create, prompt in [(chat.create, {"messages": messages}), (text.create, {"prompt": "the cat sat on"})]:
            whole = create(**ask, **prompt)
            request = RequestLook.model_validate(whole.foveal)
            assert len(request.prompt) == whole.usage.prompt_tokens and len(request.layers) == 3
            looks = [ChoiceLook.model_validate(choice.foveal).tokens for choice in whole.choices]
            streamed: dict[int, list[LookedToken]] = {0: [], 1: []}
            for place, event in enumerate(create(**ask, **prompt, stream=True)):
                assert (getattr(event, "foveal", None) is None) == (place > 0)
                for choice in event.choices:
                    streamed[choice.index] += ChoiceLook.model_validate(choice.foveal).tokens
            for index, look in enumerate(looks):
                assert len(look) == 20 and look[0].position == whole.usage.prompt_tokens
                assert [(one.id, one.layers) for one in look] == [(one.id, one.layers) for one in streamed[index]]
                content = whole.choices[index]
                said = content.text if hasattr(content, "text") else content.message.content
                assert "".join(one.text for one in look if not one.special).startswith(
                    said.rstrip("\N{REPLACEMENT CHARACTER}")
                )
            assert looks[0] != looks[1]
            assert getattr(create(**{**ask, "extra_body": {}}, **prompt), "foveal", None) is None


def test_half_characters_belong_to_the_last_token() -> None:
    """Guards against replacement characters where a character is made of several tokens."""
    source = LookSource([], lambda token: bytes([token]), [1], lambda tokens: tokens)
    data = [*"aß😀".encode(), 1]
    texts = [(token.text, token.special) for token in source.request(data).prompt]
    assert [text for text, _ in texts] == ["a", "", "ß", "", "", "", "😀", "\x01"]
    assert [special for _, special in texts] == [False] * 7 + [True]


def test_windows_and_dense_layers(tmp_path: Path) -> None:
    """Guards against a window that is off by one, and models without an indexer that get an error."""
    llm = make("qwen2", tmp_path, byte_level("qwen2"))
    (output,) = llm.generate("the cat sat on the mat, and the hat", LOOK)
    source = source_of(llm)
    request = source.request(output.prompt_token_ids)
    assert [(one.layer, one.kind, one.reach) for one in request.layers] == [(1, "window", 20), (2, "window", 20)]
    assert request.dense_layers == 1
    one = output.outputs[0]
    for token in source.choice().add(one.token_ids, one.selection or []).tokens:
        assert token.layers == [[max(0, token.position - 20), token.position]] * 2
        assert token.recall == [None, None]


def test_layers_keep_their_order() -> None:
    """Guards against a sparse layer's selection shown for a window, where a model has both."""
    sights = [
        LayerSight(0, "window", 2),
        LayerSight(1, "sparse", 3),
        LayerSight(2, "recurrent"),
        LayerSight(3, "dense"),
    ]
    source = LookSource(sights, lambda token: b"a", [], lambda tokens: 10 * tokens)
    selection = TokenSelection(5, (array("i", [0, 1, 3, 5]),), (0.5,))
    (token,) = source.choice().add([7], [selection]).tokens
    assert token == LookedToken(
        id=7, text="a", special=False, position=5, layers=[[3, 5], [0, 1, 3, 5]], recall=[None, 0.5], cache_bytes=60
    )
    assert source.request([1]).recurrent_layers == 1


def test_options_are_strict() -> None:
    """Guards against an option that is taken and ignored."""
    assert FovealOptions.model_validate({"selection": True}).selection
    for wrong in ({"selections": True}, {"selection": "yes"}):
        with pytest.raises(ValueError):
            FovealOptions.model_validate(wrong)
