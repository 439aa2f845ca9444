"""What `generate` and `chat` share: loading a model, and writing an answer while it comes."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveal import LLM
    from foveal.engine import RequestOutput


def load(model: str, settings: Mapping[str, Any], length: Callable[[Any], int] | None = None) -> "LLM":
    """The model with its engine, for one sequence at a time; `settings` are options of `LLM`.

    `length`: how many tokens the only request will have, given the tokenizer; the cache is made for no more than these.
    """
    from foveal import LLM
    from foveal.cache import PAGE_SIZE
    from foveal.models.load import open_checkpoint
    from foveal.models.resolve import resolve_model
    from foveal.models.tokenizer import load_tokenizer

    path = resolve_model(model)
    tokenizer = load_tokenizer(path)
    longest = None
    if length is not None:
        pages = -(-length(tokenizer) // PAGE_SIZE)
        longest = min(open_checkpoint(path, streaming=settings["streaming"]).config.max_positions, pages * PAGE_SIZE)
    return LLM(path, tokenizer=tokenizer, max_num_seqs=1, max_model_len=longest, **settings)


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
