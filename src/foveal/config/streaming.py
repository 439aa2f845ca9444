"""StreamingLLM: any model with plain attention, without end, over a few first tokens and the latest ones."""

import re
from dataclasses import replace

from foveal.config.model import BlockConfig, GQAConfig, MLAConfig, ModelConfig

MOST_TOKENS = 2**22
"""The length that streaming lifts `max_positions` to. Positions stay inside the cache and set no limit; but the ids of
a sequence, and a page table of 8 bytes for 64 of them, are still there at every step."""


def read_streaming(text: str) -> tuple[int, int]:
    """(sinks, window) of "4+1020". ValueError for anything else, or a window below 1."""
    found = re.fullmatch(r"([0-9]{1,9})\+([0-9]{1,9})", text)
    if found is None or not int(found[2]):
        raise ValueError(f"streaming {text!r} is not SINKS+WINDOW, in tokens, such as 4+1020")
    return int(found[1]), int(found[2])


def with_streaming(config: ModelConfig, sinks: int, window: int) -> ModelConfig:
    """The model with every attention layer seeing the first `sinks` tokens and the last `window` (arXiv 2309.17453).

    Positions are those inside the cache (section 3.2): a query is never further from a sink than sinks + window - 1,
    so that the model meets no distance that it was not trained on, however long the sequence, and `max_positions` is
    lifted to MOST_TOKENS. With sinks = 0 this is a plain window.
    Raises ValueError, naming the reason, where that has no meaning: latent attention, indexers, no attention at all,
    windows narrower than sinks + window, rope that depends on the length, more tokens than the model has positions.
    """
    blocks = [block.operation for block in config.blocks]
    if any(isinstance(operation, MLAConfig) for operation in blocks):
        raise ValueError(f"{config.family} keeps latents, for which streaming is not there: their keys have no sinks")
    if config.index_topk is not None:
        raise ValueError(f"{config.family} has indexers, which select from the whole context: streaming drops it")
    if not any(isinstance(operation, GQAConfig) for operation in blocks):
        raise ValueError(f"{config.family} has no attention, so its cache is constant without streaming")
    if sinks + window > config.max_positions:
        raise ValueError(
            f"streaming {sinks}+{window} keeps more tokens than the {config.max_positions} positions of the model"
        )

    def streaming(block: BlockConfig) -> BlockConfig:
        mixer = block.operation
        if not isinstance(mixer, GQAConfig):
            return block
        if mixer.window is not None and mixer.window < sinks + window:
            raise ValueError(
                f"streaming {sinks}+{window} does not fit {config.family}: a layer sees {mixer.window} tokens only"
            )
        if mixer.rope and mixer.rope.scaling.kind == "dynamic":
            raise ValueError(f"{config.family} has dynamic rope, which follows the length that streaming forgets")
        return replace(block, operation=replace(mixer, window=window, sinks=sinks))

    layers = tuple(tuple(streaming(block) for block in layer) for layer in config.layers)
    return replace(config, layers=layers, max_positions=max(MOST_TOKENS, config.max_positions))
