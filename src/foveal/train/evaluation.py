"""How a model does on held-out text while it learns."""

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.models.decoder import Decoder
from foveal.nn.batch import Batch
from foveal.train.data import Corpus, Feed, TrainingBatch
from foveal.train.losses import head_loss, next_token
from foveal.train.objective import target_weights
from foveal.train.parallel import Parallel
from foveal.train.schema import RunSettings, StageSettings
from foveal.train.stages import KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE_TOKENS = 48


class Evaluator:
    """Held-out loss, dense and sparse, and a sample."""

    def __init__(
        self,
        decoder: Decoder,
        corpus: Corpus,
        tokenizer: "PreTrainedTokenizerBase",
        run: RunSettings,
        stage: StageSettings,
        parallel: Parallel,
    ) -> None:
        self._decoder, self._corpus, self._tokenizer, self._run, self._stage = decoder, corpus, tokenizer, run, stage
        self._parallel = parallel

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """What to log: the loss on held-out tokens as the stage attends, and sparse where that differs; a sample."""
        values: dict[str, Any] = {}
        if self._run.evaluate_tokens:
            dense = KINDS[self._stage.kind].dense
            values["held_out_loss"] = self._loss(dense)
            if dense and self._decoder.config.index_topk is not None:
                values["held_out_loss_sparse"] = self._loss(dense=False)
            values["held_out_perplexity"] = math.exp(values["held_out_loss"])
        if self._run.sample is not None:
            values["sample"] = self._sample(self._run.sample)
        return values

    def _loss(self, dense: bool) -> float:
        """Mean over the first rows of the held-out documents, the same at every evaluation, whoever computes them."""
        context, ranks = self._stage.context, self._parallel.data_ranks
        rows = max(1, self._run.evaluate_tokens // context)
        feed = Feed(
            self._corpus,
            context=context,
            tokens_per_step=context * ranks,
            seed=self._run.seed,
            rank=self._parallel.data_rank,
            ranks=ranks,
            part="held_out",
        )
        total = torch.zeros(2, dtype=torch.float64)
        for first, batch in zip(range(0, rows, ranks), feed, strict=False):
            sums = self._parallel.forward(partial(self._sums, batch, dense))
            if first + self._parallel.data_rank < rows:  # others only keep the processes together
                total += torch.tensor(sums, dtype=torch.float64)
        loss, weight = self._parallel.total(total).tolist()
        return float(loss / weight)

    def _sums(self, batch: TrainingBatch, dense: bool) -> tuple[float, float]:
        """Of this process's tokens: the weighted losses, and the weights."""
        device = self._parallel.device
        packed = Batch.packed([ids.to(device) for ids in batch.sequences], dense=dense)
        own, rows_t = self._parallel.share(packed)
        weights_T = torch.cat(target_weights(batch)).to(device)[rows_t]
        x_TD, _ = self._decoder.trunk(own)
        loss = head_loss(self._decoder, x_TD, weights_T, next_token(packed.ids_T.roll(-1)[rows_t]))
        return float(loss), float(weights_T.sum())

    def _sample(self, prompt: str) -> str:
        """The prompt's likeliest continuation. Every process computes it; the leading one's word counts, so that none
        ends before the others."""
        ids = self._tokenizer.encode(prompt)
        for _ in range(min(_SAMPLE_TOKENS, self._decoder.config.max_positions - len(ids))):
            following = self._parallel.forward(partial(self._following, ids))
            ids.append(int(self._parallel.first(following)))
            if ids[-1] == self._tokenizer.eos_token_id:
                break
        return str(self._tokenizer.decode(ids))

    def _following(self, ids: list[int]) -> Tensor:
        x_TD, _ = self._decoder.trunk(Batch.packed([torch.tensor(ids, device=self._parallel.device)]))
        return self._decoder.head(x_TD[-1:]).argmax()
