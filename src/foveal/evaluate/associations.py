"""How well a model recalls pairs that its context holds: accuracy in MQAR, by the number of pairs."""

from collections.abc import Sequence
from random import Random

import torch

from foveal.evaluate.estimate import Estimate, of_groups
from foveal.evaluate.tasks.associations import draw_associations
from foveal.models.decoder import Decoder
from foveal.nn.batch import Batch

# Tokens computed at a time.
_AT_ONCE = 8192


@torch.no_grad()
def association_accuracy(
    decoder: Decoder,
    ids: Sequence[int],
    pairs: int,
    rows: int,
    *,
    seed: int = 0,
    begin: Sequence[int] = (),
    dense: bool = False,
) -> Estimate:
    """The share of values that are the likeliest token behind their key, over `rows` rows of `pairs` pairs, each asked
    for once (`draw_associations`, of which `ids` are; others than those of a training run).

    `begin`: what the model expects before every text. `dense`: sparse layers attend to everything (`Batch.dense`).
    Raises as `draw_associations`, and ValueError where the model has fewer positions.
    """
    length = len(begin) + 4 * pairs
    if length > decoder.config.max_positions:
        raise ValueError(f"{pairs} pairs take {length} tokens: more than {decoder.config.max_positions} positions")
    draw = Random(f"associations {pairs} {seed}")
    drawn = [draw_associations(draw, ids, pairs) for _ in range(rows)]
    device = decoder.embed_tokens.weight.device
    right: list[float] = []
    at_once = max(1, _AT_ONCE // length)
    for start in range(0, rows, at_once):
        part = drawn[start : start + at_once]
        sequences = [torch.tensor([*begin, *row], device=device) for row, _ in part]
        x_TD, _ = decoder.trunk(Batch.packed(sequences, dense=dense))
        told = torch.tensor([[False] * len(begin) + answers for _, answers in part], device=device)
        foreseen = decoder.head(x_TD[told.flatten().roll(-1)]).argmax(-1)
        right += (foreseen == torch.stack(sequences)[told]).view(len(part), pairs).double().sum(1).tolist()
    return of_groups(torch.tensor(right, dtype=torch.float64), torch.full((rows,), pairs))
