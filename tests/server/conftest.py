"""Servers that the tests of this folder share."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from bytewise import write_tiny_model

from foveal import LLM

from .serving import Server, serving


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model whose tokens are bytes."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: str) -> Iterator[Server]:
    """That model, served."""
    with serving(LLM(tiny_folder, max_num_seqs=16)) as server:
        yield server


@pytest.fixture
def client(tiny: Server) -> Iterator[openai.OpenAI]:
    """OpenAI's client of that server; afterwards no page may be missing."""
    with tiny.client() as client:
        yield client
    tiny.settle()


@pytest.fixture(scope="session")
def stories_folder(test_data: Path) -> str:
    """A small real model."""
    return str(test_data / "stories260k")
