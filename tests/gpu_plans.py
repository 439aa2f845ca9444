"""Launches of every GPU kernel at the sizes of DeepSeek-V3.2 and of a common grouped-query model, for any card.

As a program: compiles them all for one compute capability and prints, for each, what came of it as a line of JSON.
"""

import json
import sys

import torch
from gpu_code import read_code
from gpu_compile import compile_for

from foveal.config.formats import latent_bytes
from foveal.kernels import Columns, Contexts, KeySource, OneHead, Queries, Rows
from foveal.kernels.gpu.device import Card
from foveal.kernels.gpu.flash import Seen, packed_attention, plain_attention, selected_attention
from foveal.kernels.gpu.latent import latent_attention
from foveal.kernels.gpu.launch import Choice, Launch
from foveal.kernels.gpu.pairs import pair_products
from foveal.kernels.gpu.places import places
from foveal.kernels.gpu.rounding import round_index, store_index_keys, store_latents
from foveal.kernels.gpu.select import select_top
from foveal.kernels.gpu.sparse_backward import sparse_backward
from foveal.kernels.gpu.sparse_divergence import selected_divergence
from foveal.kernels.gpu.warmup import Gaze, warmup_divergence
from foveal.kernels.records import IndexKeyRecords, LatentRecords

HEADS, RANK, ROPE, INDEX_HEADS, INDEX_DIM, TOPK = 128, 512, 64, 64, 128, 2048
CONTEXT = 4096
_PAGED = Contexts((CONTEXT,), (-1,), torch.zeros(1, CONTEXT // 64, dtype=torch.int64))
_BFLOAT16 = {"dtype": torch.bfloat16}


def launches(card: Card) -> dict[str, Launch]:
    """By name; tiles are those that the card gets."""
    return {**_attentions(card), **_selections(card), **_roundings(), **_experts(), **_training(card)}


def _attentions(card: Card) -> dict[str, Launch]:
    choice = Choice(card=card)
    plain = Rows(torch.zeros(128, RANK + ROPE, **_BFLOAT16))
    records = LatentRecords(torch.zeros(128, latent_bytes(RANK, ROPE, "fp8"), dtype=torch.uint8), RANK, torch.bfloat16)
    q_THX = torch.zeros(1, HEADS, RANK + ROPE, **_BFLOAT16)
    selection_TK = torch.zeros(1, TOPK, dtype=torch.int32)
    last = Queries((0, 1), (CONTEXT - 1,))
    found = {}
    for name, stored, chosen in (("dense", plain, None), ("sparse fp8", records, selection_TK)):
        keys = KeySource(OneHead(stored), _PAGED)
        values = KeySource(Columns(keys.records, RANK), _PAGED)
        work = latent_attention(q_THX, keys, values, chosen, last, scale=0.1, choice=choice)
        found |= {"rows": work.launches[0], f"latent {name}": work.launches[-2]}
    found["combine"] = work.launches[-1]
    rows = KeySource(Rows(torch.zeros(128, 8, 128, **_BFLOAT16)), _PAGED)
    q_THP = torch.zeros(64, 32, 128, **_BFLOAT16)
    chunk = Queries((0, 64), (CONTEXT - 64,))
    windowed = packed_attention(q_THP, rows, rows, chunk, scale=0.1, seen=Seen(True, 1024, 4), choice=choice)
    chosen_TK = torch.zeros(64, TOPK, dtype=torch.int32)
    selected = selected_attention(q_THP, rows, rows, chosen_TK, chunk, scale=0.1, choice=choice)
    wide = torch.zeros(1, 128, 4, 256, **_BFLOAT16)
    full = plain_attention(wide, wide, wide, scale=0.1, seen=Seen(False, None, 0), choice=choice)
    flash = {"window": windowed, "selected": selected, "wide": full}
    return {**found, **{f"flash {name}": work.launches[0] for name, work in flash.items()}}


def _selections(card: Card) -> dict[str, Launch]:
    found = {}
    for stored, dtype, tokens in (("fp8", torch.float8_e4m3fn, 64), ("int8", torch.int8, 1)):
        records = IndexKeyRecords(torch.zeros(2, 64 * (INDEX_DIM + 4), dtype=torch.uint8), INDEX_DIM, stored)
        q_TIJ = torch.zeros(tokens, INDEX_HEADS, INDEX_DIM, dtype=torch.uint8).view(dtype)
        weights_TI, queries = torch.zeros(tokens, INDEX_HEADS), Queries((0, tokens), (CONTEXT - tokens,))
        keys = KeySource(records, _PAGED)
        planned, _ = select_top(q_TIJ, weights_TI, keys, queries, topk=TOPK, choice=Choice(card=card))
        found[f"score {stored}"] = planned[0]
    return {**found, "merge": planned[1]}


def _roundings() -> dict[str, Launch]:
    keys_TJ, rows_T = torch.zeros(8, INDEX_DIM, **_BFLOAT16), torch.zeros(8, dtype=torch.int64)
    pages = torch.zeros(2, 64 * (INDEX_DIM + 4), dtype=torch.uint8)
    records = torch.zeros(64, latent_bytes(RANK, ROPE, "fp8"), dtype=torch.uint8)
    return {
        "round int8": round_index(keys_TJ, "int8")[0],
        "write index keys": store_index_keys(keys_TJ, rows_T, pages, "fp8"),
        "write latents": store_latents(torch.zeros(8, RANK + ROPE, **_BFLOAT16), rows_T, records, RANK),
    }


def _experts() -> dict[str, Launch]:
    x_TD, weight_EYX = torch.zeros(2, 1024, **_BFLOAT16), torch.zeros(2, 512, 1024, **_BFLOAT16)
    chosen_TA = torch.zeros(2, 8, dtype=torch.int64)
    return {"expert pairs": pair_products(x_TD, weight_EYX, chosen_TA, chosen_TA.flatten())[0]}


def _training(card: Card) -> dict[str, Launch]:
    tokens = 128
    q_THX, latents_RX = (
        torch.zeros(tokens, HEADS, RANK + ROPE, **_BFLOAT16),
        torch.zeros(tokens, 1, RANK + ROPE, **_BFLOAT16),
    )
    out_THC = q_THX[..., :RANK].contiguous()
    rows_TK = torch.zeros(tokens, TOPK, dtype=torch.int64)
    choice = Choice(card=card)
    backward, *_ = sparse_backward(
        q_THX, latents_RX, latents_RX[..., :RANK], out_THC, out_THC, rows_TK, scale=0.1, choice=choice
    )
    where = places(Queries((0, tokens), (0,)), Contexts.packed([tokens]), tokens, torch.device("cpu"))
    q_TIJ = torch.zeros(tokens, INDEX_HEADS, INDEX_DIM, **_BFLOAT16)
    gaze = Gaze(q_THX, latents_RX, 0.1)
    warmup = warmup_divergence(
        q_TIJ, torch.zeros(tokens, INDEX_HEADS), q_TIJ[:, 0], gaze, torch.zeros(tokens), where, tokens
    )
    selected = selected_divergence(
        q_TIJ, torch.zeros(tokens, INDEX_HEADS), q_TIJ[:, 0], gaze, torch.zeros(tokens), rows_TK
    )
    names = ("attention sums", "index sums", "divergence", "selected sums", "selected divergence")
    launched = (*warmup.launches, *selected.launches)
    return {"sparse backward": backward, **dict(zip(names, launched, strict=True))}


def main() -> None:
    """Compile everything for the capability named on the command line."""
    card = Card(int(sys.argv[1]), 108)
    for name, launch in launches(card).items():
        compiled = compile_for(launch, card.capability)
        code = read_code(compiled.cubin)
        facts = {
            "name": name,
            "shared": compiled.shared_memory,
            "registers": code.registers,
            "spilled": code.spilled,
            "warps": launch.warps,
            "blocks": code.blocks(card.capability, launch.warps, compiled.shared_memory),
            "loop": code.loop,
        }
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
