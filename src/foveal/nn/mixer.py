"""What every mixer is: something that lets tokens see earlier ones."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from foveal.cache.layouts import BlockCache
from foveal.kernels import Queries
from foveal.kernels.transfer import upload
from foveal.nn.step import Step


class Mixer(nn.Module):
    """Base of the mixers. `forward` takes what `query_latent` returned, so that an indexer can use it as well."""

    def query_latent(self, x_TD: Tensor) -> Tensor:
        """What queries are projected from: the hidden state itself unless the mixer compresses it."""
        return x_TD

    def forward(
        self, x_TD: Tensor, latent_TX: Tensor, step: Step, cache: BlockCache | None, selection_TK: Tensor | None
    ) -> Tensor:
        """[T, D] -> [T, D]; attends to the selection, where there is one. Shows `step.gaze` where there is a watch."""
        raise NotImplementedError


def gather_queries(queries: Queries, members: Sequence[int], device: torch.device) -> tuple[Tensor, Queries]:
    """The packed rows of some sequences, and how they are packed once gathered."""
    rows = [row for s in members for row in range(queries.offsets[s], queries.offsets[s + 1])]
    offsets = [0]
    for s in members:
        offsets.append(offsets[-1] + queries.lengths[s])
    positions = tuple(queries.positions[s] for s in members)
    return upload(rows, device), Queries(tuple(offsets), positions)


def by_form(
    forms: Sequence[str],
    run: Callable[..., Tensor],
    queries: Queries,
    inputs: Sequence[Tensor | None],
) -> Tensor:
    """Each sequence in its own form, sequences of one form together: run(form, members, queries, *inputs).

    inputs: [T, ...] or None, given to `run` for the members' tokens alone. Returns [T, ...] in the old order.
    """
    kinds = sorted(set(forms))
    if len(kinds) == 1:
        return run(kinds[0], range(len(forms)), queries, *inputs)
    rows, parts = [], []
    for kind in kinds:
        members = [s for s, form in enumerate(forms) if form == kind]
        device = next(x.device for x in inputs if x is not None)
        rows_t, own = gather_queries(queries, members, device)
        parts.append(run(kind, members, own, *(x if x is None else x[rows_t] for x in inputs)))
        rows.append(rows_t)
    return torch.cat(parts)[torch.cat(rows).argsort()]
