"""What a stage minimises: from a batch to gradients and figures."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveal.kernels.moe import count_choices
from foveal.kernels.transfer import send
from foveal.models.decoder import Decoder
from foveal.models.load import load_model
from foveal.nn.batch import Batch
from foveal.train.data import TrainingBatch
from foveal.train.losses import (
    Compare,
    IndexLoss,
    balance_loss,
    head_loss,
    move_bias,
    next_token,
    routers,
    taught,
    z_loss,
)
from foveal.train.parallel import Parallel
from foveal.train.schema import StageSettings
from foveal.train.stages import KINDS


class Objective:
    """The losses of one stage, and the balance of experts."""

    def __init__(self, decoder: Decoder, stage: StageSettings, parallel: Parallel) -> None:
        self._decoder, self._stage, self._kind, self._parallel = decoder, stage, KINDS[stage.kind], parallel
        self._routers = list(routers(decoder))
        self._used: list[Tensor] = []
        """Tokens of each expert in this update, by router."""
        self._teacher = _teacher(stage.teacher, decoder, parallel.device)

    def accumulate(self, batch: TrainingBatch, rows: int) -> dict[str, Tensor]:
        """Add the gradients of a batch, computed `rows` rows at a time; its losses, as means over the batch of all
        processes: float64 scalars on the device, which nobody has waited for."""
        parallel = self._parallel
        own = [sum(len(ids) for ids in batch.sequences), sum(float(weights.sum()) for weights in target_weights(batch))]
        tokens, targets = parallel.total_of_data(torch.tensor(own, dtype=torch.float64)).tolist()
        if not targets:
            raise ValueError("a batch has no token to learn from: every loss weight is 0")
        self._used = []
        sums: dict[str, Tensor] = {}
        for micro in batch.split(rows):
            losses = parallel.forward(partial(self._losses, micro, tokens, targets))
            torch.stack(list(losses.values())).sum().backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.detach().double()
        totals = parallel.total(torch.stack(list(sums.values())))
        return dict(zip(sums, totals.unbind(), strict=True))

    def balance(self) -> None:
        """Move the routers' biases by how the update's tokens were spread. Once an update."""
        for (_, bias_E), used_E in zip(self._routers, self._used, strict=False):
            if bias_E is not None:
                move_bias(bias_E, self._parallel.total(used_E), self._stage.balance_rate)

    def _losses(self, batch: TrainingBatch, tokens: float, targets: float) -> dict[str, Tensor]:
        """Each loss by name: this part of the mean over all `tokens`, or over `targets`, the sum of their weights."""
        stage, kind = self._stage, self._kind
        collect = frozenset({"experts", "router"} if self._learns_base else ())
        device, sequences = self._parallel.device, batch.sequences
        packed = Batch.packed(sequences, collect=collect, dense=kind.dense, device=device)
        own, rows_t = self._parallel.share(packed)
        watch = None
        if kind.index and self._decoder.config.index_topk is not None:
            compared_T = compared(torch.cat(sequences), stage.index_share)
            watch = IndexLoss(send(compared_T, device)[rows_t] / tokens)
        x_TD, collected = self._decoder.trunk(own, watch=watch)
        losses: dict[str, Tensor] = {}
        if self._learns_base:
            weights_T = send(torch.cat(target_weights(batch)), device)[rows_t] / targets
            # What follows a sequence's last token is another sequence's first: it has weight 0.
            following_T = pad(packed.ids_T[1:], (0, 1))[rows_t]
            losses["loss"] = head_loss(self._decoder, x_TD, weights_T, self._compare(own, following_T))
            routing = collected.get("router", []), collected.get("experts", [])
            losses |= self._routing(own, packed.q_offsets, *routing, tokens)
        if watch is not None:
            assert isinstance(watch.total, Tensor)
            losses["index_loss"] = stage.index_weight * watch.total
        return losses

    @property
    def _learns_base(self) -> bool:
        return (self._stage.learns or self._kind.learns) != "indexer"

    def _compare(self, own: Batch, following_T: Tensor) -> Compare:
        if not self._kind.distils:
            return next_token(following_T)
        with torch.no_grad():
            x_TD, _ = self._teacher.trunk(replace(own, dense=True, collect=frozenset()))
        return taught(self._teacher, x_TD, self._stage.temperature)

    def _routing(
        self, own: Batch, offsets: tuple[int, ...], logits: list[Tensor], chosen: list[Tensor], tokens: float
    ) -> dict[str, Tensor]:
        """The routers' own losses; counts which experts were used. `offsets`: of the whole sequences, of which this
        process may have a part only."""
        used = [count_choices(chosen_TA, x.shape[1]) for chosen_TA, x in zip(chosen, logits, strict=True)]
        self._used = [a + b for a, b in zip(self._used, used, strict=True)] if self._used else used
        stage, losses = self._stage, {}
        if logits and stage.balance_weight:
            whole = partial(self._parallel.whole, own)
            parts = [
                balance_loss(whole(logits_TE), chosen_TA.shape[1], offsets, config)
                for logits_TE, chosen_TA, (config, _) in zip(logits, chosen, self._routers, strict=True)
            ]
            # Processes that share sequences all have their whole loss.
            share = stage.balance_weight / (tokens * self._parallel.contexts)
            losses["balance_loss"] = share * torch.stack(parts).sum()
        if logits and stage.z_weight:
            losses["z_loss"] = stage.z_weight * torch.stack([z_loss(x) for x in logits]).sum() / tokens
        return losses


def target_weights(batch: TrainingBatch) -> list[Tensor]:
    """For each sequence, float32: how much its token t counts in telling token t + 1; the last one counts nothing."""
    weights = batch.loss_weights or [torch.ones(len(ids)) for ids in batch.sequences]
    return [pad(weights_N[1:], (0, 1)) for weights_N in weights]


def compared(ids_T: Tensor, share: float) -> Tensor:
    """How much each token's selection counts in the indexers' loss, float32 [T]: 0 but for a random `share` of them,
    which count the more, so that the mean stays. The same ids give the same draw: a run that is resumed repeats it. All
    on the CPU, so that every device draws alike."""
    dice = torch.Generator().manual_seed(int(ids_T.sum()))
    drawn_T = torch.rand(len(ids_T), generator=dice) < share
    return drawn_T.float() / share


def _teacher(name: str | None, decoder: Decoder, device: torch.device) -> Decoder:
    """The model to learn from: this one, unless another is named."""
    if name is None:
        return decoder
    teacher = load_model(name, dtype=decoder.options.dtype, device=device).requires_grad_(False)
    sizes = teacher.config.vocab_size, decoder.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(f"teacher = {name!r} has {sizes[0]} tokens, and the model {sizes[1]}")
    return teacher
