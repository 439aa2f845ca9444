"""Tokenizers: transformers reads a directory's; a GGUF file's is built from its metadata."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveal.models.gguf import read_gguf
from foveal.models.resolve import resolve_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

# How text is cut into words before merging, by `tokenizer.ggml.pre`: a regular expression of the models' authors.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _WORDS % "{1,3}", "qwen2": _WORDS % "", "deepseek-r1-qwen": _WORDS % ""}


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in a directory, or of a model (anything that `resolve_model` understands), with its chat template
    where it has one.

    Raises ValueError where there is none, or none that can be read.
    """
    alone = Path(path).expanduser()
    found = alone if (alone / "tokenizer.json").is_file() else resolve_model(str(path))
    return _from_gguf(found) if found.is_file() else _from_directory(found)


def token_bytes(tokenizer: "PreTrainedTokenizerBase") -> Callable[[int], bytes]:
    """A function from a token id to what the token stands for in UTF-8, maybe half a character; b"" for an unknown id.

    Decoding a token alone would not do: half a character comes out as a replacement character, and a leading space may
    get lost.
    """
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kinds = str(json.loads(backend.to_str())["decoder"]) if backend else ""
    read = _byte_level_piece if "ByteLevel" in kinds else _fallback_piece

    def to_bytes(token: int) -> bytes:
        if token in added:
            return added[token].encode()
        piece = tokenizer.convert_ids_to_tokens(token)
        return read(piece) if isinstance(piece, str) else b""

    return to_bytes


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the others follow from code point 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _byte_level_piece(piece: str) -> bytes:
    return bytes(_BYTES[letter] for letter in piece if letter in _BYTES)


def _fallback_piece(piece: str) -> bytes:
    """SentencePiece: a byte by its number, or text with its spaces as U+2581."""
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()


def _from_directory(directory: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    single = directory / "tokenizer.json"
    known = (single, directory / "tokenizer.model", directory / "vocab.json", directory / "tokenizer_config.json")
    if not any(file.is_file() for file in known):
        raise ValueError(f"{directory} has no tokenizer (looked for {', '.join(file.name for file in known)})")
    try:
        if single.is_file() and not known[-1].is_file():
            # AutoTokenizer would guess a class from the model's type, and that class may rebuild the tokenizer.
            return _fast(tokenizer_file=str(single), **_config_tokens(directory))
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
        return loaded
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"the tokenizer in {directory} cannot be read: {error}") from error


def _config_tokens(directory: Path) -> dict[str, str]:
    """The begin and end tokens, which config.json names by id where there is no tokenizer_config.json."""
    from tokenizers import Tokenizer

    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = {name: raw.get(f"{name}_id") for name in ("bos_token", "eos_token")}
    tokens = {name: backend.id_to_token(token_id) for name, token_id in ids.items() if isinstance(token_id, int)}
    return {name: token for name, token in tokens.items() if token is not None}


def _fast(**settings: Any) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(**settings)
    return tokenizer


def _from_gguf(path: Path) -> "PreTrainedTokenizerBase":
    metadata = read_gguf(path).metadata
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    if "tokens" not in fields:
        raise ValueError(f"{path} has no tokenizer")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if fields.get("model") not in builders:
        raise ValueError(f"{path}: tokenizer {fields.get('model')!r} is not supported (only {', '.join(builders)})")
    try:
        backend = builders[fields["model"]](fields)
        _add_special(backend, fields)
        special = {name: _token(fields, key) for name, key in _SPECIAL.items() if f"{key}_token_id" in fields}
    except KeyError as error:
        raise ValueError(f"{path} lacks 'tokenizer.ggml.{error.args[0]}'") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return _fast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _token(fields: Mapping[str, Any], key: str) -> str:
    """The token that `tokenizer.ggml.<key>_token_id` names."""
    index, tokens = fields[f"{key}_token_id"], fields["tokens"]
    if not 0 <= index < len(tokens):
        raise ValueError(f"'tokenizer.ggml.{key}_token_id' = {index} is not one of {len(tokens)} tokens")
    return str(tokens[index])


def _byte_level(fields: Mapping[str, Any]) -> "Tokenizer":
    """Byte-level BPE, as GPT-2's."""
    from tokenizers import Tokenizer, decoders, models

    vocab = {token: index for index, token in enumerate(fields["tokens"])}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in fields["merges"])]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=fields.get("pre") == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(fields.get("pre", "default"))
    tokenizer.decoder = decoders.ByteLevel()
    if fields.get("pre") in ("qwen2", "deepseek-r1-qwen"):
        from tokenizers import normalizers

        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _pre_tokenizer(kind: str) -> "PreTokenizer":
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if kind in ("default", "gpt-2"):
        return ByteLevel(add_prefix_space=False)
    if kind == "smollm":
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if kind not in _SPLITS:
        known = ", ".join(["gpt-2", "smollm", *_SPLITS])
        raise ValueError(f"'tokenizer.ggml.pre' = {kind!r} is not supported (only {known})")
    split = Split(Regex(_SPLITS[kind]), behavior="isolated")
    return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(fields: Mapping[str, Any]) -> "Tokenizer":
    """SentencePiece BPE with byte fallback, as Llama 1 and 2's."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: index for index, token in enumerate(fields["tokens"])}
    unknown = _token({"unknown_token_id": 0, **fields}, "unknown")
    merges = _merges(vocab, fields["scores"])
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = fields.get("add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins whatever pair makes the best-scored piece; as a list, best first."""
    pairs = [
        (scores[index], (piece[:cut], piece[cut:]))
        for piece, index in vocab.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    return [pair for _, pair in sorted(pairs, key=lambda scored: -scored[0])]


def _add_special(tokenizer: "Tokenizer", fields: Mapping[str, Any]) -> None:
    """Tokens that are matched whole, and a begin token before every text where the file asks for it."""
    from tokenizers import AddedToken, processors

    kinds = list(zip(fields["tokens"], fields.get("token_type", []), strict=False))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == _CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == _USER_DEFINED])
    if fields.get("add_bos_token", fields["model"] == "llama") and "bos_token_id" in fields:
        bos = _token(fields, "bos")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, fields["bos_token_id"])]
        )
