"""A tokenizer of one token a byte, and windows of random tokens."""

import pytest
import torch
from oracle import VOCAB
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foveal.evaluate.text import Window


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; no begin token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture
def windows() -> list[Window]:
    """Random tokens of the tiny checkpoints' vocabulary, longer than a chunk of 64."""
    generator = torch.Generator().manual_seed(1)
    lengths = (150, 97)
    return [Window(tuple(torch.randint(3, VOCAB, (n,), generator=generator).tolist()), n) for n in lengths]
