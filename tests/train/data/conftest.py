"""A small tokenizer, and files to read."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from foveal.train.data import TokenizerSettings
from foveal.train.data.tokenizer import train_tokenizer

TEXT = "The quick brown fox, aged 12345, jumps over 67 lazy dogs. What is the pass key? It is 890.\n"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE with a few merges."""
    trained = train_tokenizer([TEXT] * 5, TokenizerSettings(vocab_size=320))
    made: PreTrainedTokenizerBase = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|endoftext|>")
    return made


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, list[str]], Path]:
    """Writes documents into a text file."""

    def write_file(name: str, documents: list[str]) -> Path:
        path = tmp_path / name
        path.write_text("\n<|endoftext|>\n".join(documents))
        return path

    return write_file
