"""Tokenizers for training: one trained on the sources, or an existing model's."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from foveal.models.tokenizer import load_tokenizer
from foveal.train.data.files import building, content_hash, documents, find_files, short_hash
from foveal.train.data.settings import DataSettings, TextSettings, TokenizerSettings

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_VERSION = 1
"""Counts changes of how tokenizers are trained: cached ones of other versions are not used."""


def open_tokenizer(settings: DataSettings, cache: Path, start: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer that the settings ask for; else that of the model `start`; with neither, one is trained, once, and
    kept in `cache`.

    Raises ValueError where there is nothing to train on, or no such model.
    """
    wanted = settings.tokenizer
    if (given := wanted.model or start) is not None:
        return load_tokenizer(given)
    if not settings.text:
        raise ValueError("there is no text to train a tokenizer on: name one with tokenizer.model")
    sources = [(source, find_files(source.files)) for source in settings.text]
    described = [(source.field, source.separator, content_hash(files, cache)) for source, files in sources]
    shares = [source.weight / sum(source.weight for source in settings.text) for source in settings.text]
    target = cache / f"tokenizer-{short_hash(_VERSION, described, shares, vars(wanted))}"
    with building(target) as folder:
        if folder is not None:
            budget = wanted.sample_megabytes * 1e6
            samples = (
                _sample(source, files, int(budget * share))
                for (source, files), share in zip(sources, shares, strict=True)
            )
            save_tokenizer(train_tokenizer(chain.from_iterable(samples), wanted), wanted, folder)
    return load_tokenizer(target)


def train_tokenizer(texts: Iterable[str], settings: TokenizerSettings) -> "Tokenizer":
    """A byte-level BPE whose words are GPT-2's, with every digit a token of its own, so that numbers can be copied."""
    from tokenizers import Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as InTurn
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = InTurn([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=list(settings.special_tokens),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chain.from_iterable(map(_in_parts, texts)), trainer)
    return tokenizer


def save_tokenizer(tokenizer: "Tokenizer", settings: TokenizerSettings, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, for transformers; the first special token ends documents."""
    from transformers import PreTrainedTokenizerFast

    end, *others = settings.special_tokens
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=end,
        additional_special_tokens=others,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    # The name that transformers 4 knows too.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class Encoder:
    """What data needs of a tokenizer: ids of whole documents, of snippets with their places, and its identity."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"{type(tokenizer).__name__} is not built on the tokenizers library: it is too slow to train with"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-text token (eos_token)")
        self._backend: Tokenizer = type(backend).from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self.end: int = int(tokenizer.eos_token_id)
        around = self._backend.encode("").ids
        self.begin: list[int] = around[:-1] if around[-1:] == [self.end] else around
        """What the tokenizer puts before every text."""
        self.size = len(tokenizer)
        added = self._backend.get_added_tokens_decoder()
        self.plain: list[int] = [i for i in range(self.size) if i not in added]
        """The ids of text: no special tokens."""
        self.hash = short_hash(backend.to_str(), self.end)

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's ids, with whatever the tokenizer puts around a prompt (maybe a begin token) and the end token."""
        parts = [_in_parts(text) for text in texts]
        firsts = self._backend.encode_batch_fast([part[0] for part in parts])
        others = iter(
            self._backend.encode_batch_fast(
                list(chain.from_iterable(part[1:] for part in parts)), add_special_tokens=False
            )
        )
        encoded = []
        for part, first in zip(parts, firsts, strict=True):
            ids = list(first.ids)
            if part[1:] and ids[-1:] == [self.end]:
                ids.pop()
            for _ in part[1:]:
                ids += next(others).ids
            encoded.append(ids if ids and ids[-1] == self.end else [*ids, self.end])
        return encoded

    def snippet(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text by itself, and the characters [start, stop) that each stands for."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def count(self, text: str) -> int:
        """How many tokens a text has by itself."""
        return len(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return str(self._backend.decode(ids, skip_special_tokens=True))

    def word_starts(self) -> list[bool]:
        """For each id, whether a word, a line or a sentence may begin with it."""
        pieces = (self._backend.id_to_token(i) or "" for i in range(self.size))
        return [piece[:1] in ("Ġ", "Ċ", "▁", " ", "\n") for piece in pieces]


_PART = 1 << 20


def _in_parts(text: str) -> list[str]:
    """A very long text cut at line ends, since the tokenizer's memory grows with it."""
    parts, start = [], 0
    while len(text) - start > _PART:
        cut = text.rfind("\n", start, start + _PART) + 1 or start + _PART
        parts.append(text[start:cut])
        start = cut
    return [*parts, text[start:]]


def _sample(source: TextSettings, files: Sequence[Path], size: int) -> Iterator[str]:
    """The first documents of a source, up to `size` characters."""
    for path in files:
        for text in documents(path, source.field, source.separator):
            yield text[:size]
            size -= len(text)
            if size <= 0:
                return
