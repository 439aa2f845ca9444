"""What `generate` and `chat` share: loading a model, and writing an answer while it comes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foveal import LLM
    from foveal.engine import RequestOutput


def load(model: str, dtype: str, index_dtype: str, kv_cache_dtype: str) -> "LLM":
    """The model with its engine; progress goes to standard error."""
    from foveal import LLM

    return LLM(model, dtype=dtype, index_dtype=index_dtype, kv_cache_dtype=kv_cache_dtype, max_num_seqs=1)


def checked(stream: Iterator["RequestOutput"]) -> Iterator["RequestOutput"]:
    """`stream`, with the engine's refusal of a request as a ValueError."""
    for output in stream:
        if output.error is not None:
            raise ValueError(output.error)
        yield output


def write(stream: Iterator["RequestOutput"]) -> str:
    """Print the answer as it grows; the whole of it."""
    text = ""
    for output in checked(stream):
        whole = output.outputs[0].text
        print(whole[len(text) :], end="", flush=True)
        text = whole
    print()
    return text
