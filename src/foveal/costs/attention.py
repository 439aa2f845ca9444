"""Multiply-accumulates (MACs) of the forms of latent attention."""

from typing import Literal

from foveal.config.model import MLAConfig

MLAForm = Literal["expanded", "absorbed", "masked", "sparse"]


def causal_pairs(queries: int, context: int) -> int:
    """(query, key) pairs when the last `queries` of `context` tokens each see themselves and all before them."""
    return queries * context - queries * (queries - 1) // 2


def selected_pairs(queries: int, context: int, topk: int) -> int:
    """The pairs that remain when a query sees at most `topk` of them."""
    short = max(0, min(queries, topk - (context - queries)))
    return causal_pairs(short, context - queries + short) + (queries - short) * topk


def mla_macs(config: MLAConfig, queries: int, context: int, topk: int | None = None) -> dict[MLAForm, int]:
    """MACs of each form for `queries` new tokens at the end of `context` tokens whose latents are at hand.

    expanded: every context token's latent becomes H keys and values, re-expansion of what is cached included:
        n C H (P + V) + pairs H (P + R + V)
    absorbed: queries are moved into the latent space (DeepSeek-V2, arXiv 2405.04434, section 2.1.2):
        t H (P C + C V) + pairs H (2 C + R)
    masked, sparse (with `topk`): the first with a mask, which saves nothing; the second over selected pairs only.
    What all forms share (projections from and to the hidden state, the indexer) is left out.
    """
    heads, rank = config.heads, config.kv_lora_rank
    pairs = causal_pairs(queries, context)
    expansion = context * rank * heads * (config.nope_dim + config.value_dim)
    expanded = expansion + pairs * heads * (config.nope_dim + config.rope_dim + config.value_dim)
    absorption = queries * heads * rank * (config.nope_dim + config.value_dim)
    pair = heads * (2 * rank + config.rope_dim)
    macs: dict[MLAForm, int] = {"expanded": expanded, "absorbed": absorption + pairs * pair}
    if topk is not None:
        macs |= {"masked": expanded, "sparse": absorption + selected_pairs(queries, context, topk) * pair}
    return macs


def cheapest_mla_form(config: MLAConfig, queries: int, context: int, topk: int | None = None) -> MLAForm:
    """The form with the fewest MACs that gives the right numbers: dense ones while nothing is left out by the selection
    (`topk` is None or context <= topk), masked or sparse beyond."""
    macs = mla_macs(config, queries, context, topk)
    selects = topk is not None and context > topk
    forms: tuple[MLAForm, ...] = ("sparse", "masked") if selects else ("absorbed", "expanded")
    return min(forms, key=macs.__getitem__)
