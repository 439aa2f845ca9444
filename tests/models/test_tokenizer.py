"""Tokenizers from directories and from GGUF metadata."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer
from words import PRE, SPECIAL, byte_level, sentencepiece

from foveal.models.tokenizer import load_tokenizer, token_bytes

TEXTS = [
    "the cat sat",
    " leading space",
    "two  spaces   and  12  34567 numbers",
    "lines\n\n  and\ttabs \n",
    "emoji 😀🎉, naïve, 你好",
    "don't it'S",
    "<bos>the hat<eos>",
    "",
]


def write_gguf(path: Path, tokenizer: Tokenizer, **fields: Any) -> Path:
    """A GGUF file that holds a tokenizer and nothing else."""
    raw = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(raw["vocab"], key=raw["vocab"].__getitem__)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if fields["model"] == "gpt2":
        writer.add_token_merges([" ".join(pair) for pair in raw["merges"]])
    for key, value in fields.items():
        {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}[type(value)](
            f"tokenizer.ggml.{key}" if key != "chat_template" else "tokenizer.chat_template", value
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", PRE)
def test_a_byte_level_gguf_tokenizes_as_its_original(pre: str, tmp_path: Path) -> None:
    """Guards against words cut otherwise than the merges were learned with (digits, spaces before them, newlines), and
    against special tokens that are cut into pieces."""
    original = byte_level(pre)
    tokenizer = load_tokenizer(write_gguf(tmp_path / "model.gguf", original, model="gpt2", pre=pre))
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == original.encode(text).ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer("<bos>hat<eos>")["input_ids"], skip_special_tokens=True) == "hat"


def test_a_sentencepiece_gguf_tokenizes_as_its_original(tmp_path: Path) -> None:
    """Guards against merges in the wrong order (a GGUF has scores only), a lost prefix space, and missing bytes."""
    original = sentencepiece()
    tokens = original.get_vocab_size()
    # The score of a piece is minus the rank of its earliest merge.
    scores = [-1000.0] * tokens
    for rank, (left, right) in enumerate(json.loads(original.to_str())["model"]["merges"]):
        index = original.token_to_id(left + right)
        scores[index] = max(scores[index], -float(rank))
    path = write_gguf(tmp_path / "model.gguf", original, model="llama", scores=scores, add_bos_token=False)
    tokenizer = load_tokenizer(path)
    for text in ["the cat sat", " the  cats", "hat 😀 z\n", "there", ""]:
        ids = tokenizer(text)["input_ids"]
        assert ids == original.encode(text).ids, text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("fields", "starts"), [({"add_bos_token": True}, True), ({"add_bos_token": False}, False), ({}, False)]
)
def test_the_begin_token_is_added_where_the_file_says_so(fields: dict[str, Any], starts: bool, tmp_path: Path) -> None:
    """Guards against a begin token that is lost or doubled, which changes every answer."""
    path = write_gguf(tmp_path / "model.gguf", byte_level("gpt-2"), model="gpt2", pre="gpt-2", **fields)
    tokenizer = load_tokenizer(path)
    assert (tokenizer("the")["input_ids"][0] == 1) is starts
    assert 1 not in tokenizer("the", add_special_tokens=False)["input_ids"]


def test_special_tokens_and_chat_template_of_a_gguf(tmp_path: Path) -> None:
    """Guards against generation that never ends, and against a chat without its template."""
    template = "{% for message in messages %}<bos>{{ message['content'] }}<eos>{% endfor %}"
    path = write_gguf(tmp_path / "m.gguf", byte_level("gpt-2"), model="gpt2", pre="gpt-2", chat_template=template)
    tokenizer = load_tokenizer(path)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<bos>hi<eos>"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "gpt2", "pre": "viking"}, "'tokenizer.ggml.pre' = 'viking' is not supported"),
        ({"model": "t5", "pre": "gpt-2"}, "tokenizer 't5' is not supported"),
    ],
)
def test_unknown_gguf_tokenizers_are_named(fields: dict[str, str], message: str, tmp_path: Path) -> None:
    """Guards against text quietly cut as GPT-2 cuts it, which gives other tokens."""
    path = write_gguf(tmp_path / "model.gguf", byte_level("gpt-2"), **fields)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)


def test_damaged_gguf_tokenizers_are_named(tmp_path: Path) -> None:
    """Guards against a KeyError or an IndexError where the file lacks a part, or names a token that is not there."""
    path = write_gguf(tmp_path / "scores.gguf", byte_level("gpt-2"), model="llama")
    with pytest.raises(ValueError, match=r"lacks 'tokenizer\.ggml\.scores'"):
        load_tokenizer(path)
    path = write_gguf(tmp_path / "bos.gguf", byte_level("gpt-2"), model="gpt2", pre="gpt-2", bos_token_id=10**6)
    with pytest.raises(ValueError, match=r"'tokenizer\.ggml\.bos_token_id' = 1000000 is not one of"):
        load_tokenizer(path)


def test_a_gguf_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    """Guards against a KeyError for a file that holds weights only."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"model\.gguf has no tokenizer"):
        load_tokenizer(tmp_path / "model.gguf")


def directory(path: Path, tokenizer: Tokenizer) -> Path:
    """A model directory with only a config.json and a tokenizer.json."""
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}))
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("make", [lambda: byte_level("smollm"), sentencepiece])
def test_a_directory_with_only_a_tokenizer_json(make: Any, tmp_path: Path) -> None:
    """Guards against a class guessed from the model type, which rebuilds the tokenizer in its own way."""
    original = make()
    tokenizer = load_tokenizer(directory(tmp_path, original))
    for text in ["the  cat", "12  34", " hat"]:
        assert tokenizer(text)["input_ids"] == original.encode(text).ids
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>")


def test_a_directory_with_a_tokenizer_config(tmp_path: Path) -> None:
    """Guards against settings of tokenizer_config.json and chat_template.jinja that are not read."""
    directory(tmp_path, byte_level("gpt-2"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<unk>"})
    )
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token == "<unk>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


@pytest.mark.parametrize(("make", "before"), [(lambda: byte_level("gpt-2"), b""), (sentencepiece, b" ")])
def test_the_bytes_of_tokens_add_up_to_the_text(make: Any, before: bytes, tmp_path: Path) -> None:
    """Guards against spaces and halves of characters that get lost where tokens are looked at one by one."""
    tokenizer = load_tokenizer(directory(tmp_path, make()))
    to_bytes = token_bytes(tokenizer)
    text = "the cat  sat, naïve 😀 日本"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(to_bytes(token) for token in ids) == before + text.encode()
    assert to_bytes(tokenizer.convert_tokens_to_ids("<eos>")) == b"<eos>"
    assert to_bytes(10**6) == b""


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    """Guards against transformers' own error, which talks about the Hub."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no tokenizer \(looked for tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_torn_tokenizer_is_named(tmp_path: Path) -> None:
    """Guards against a bare Exception from the tokenizers library."""
    file = directory(tmp_path, byte_level("gpt-2")) / "tokenizer.json"
    file.write_text(file.read_text()[:500])
    with pytest.raises(ValueError, match=f"the tokenizer in {tmp_path} cannot be read"):
        load_tokenizer(tmp_path)


def test_a_real_tokenizer_makes_round_trips(test_data: Path) -> None:
    """Guards against a tokenizer that works on made-up vocabularies only."""
    tokenizer = load_tokenizer(test_data / "stories260k")
    for text in ["Once upon a time", "  two  spaces", "emoji 😀\n and lines\n\n"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
