"""How a model does on held-out text while it learns."""

import math
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.evaluate.answers import DEPTHS, force_answers, make_samples
from foveal.evaluate.perplexity import row_losses
from foveal.evaluate.recall import over_layers, selection_quality
from foveal.evaluate.tasks import PASSKEY, Setting
from foveal.evaluate.text import Window
from foveal.kernels.transfer import send
from foveal.models.decoder import Decoder
from foveal.nn.batch import Batch
from foveal.train.data import Corpus, Feed, TrainingBatch
from foveal.train.objective import target_weights
from foveal.train.parallel import Parallel
from foveal.train.schema import RunSettings, StageSettings
from foveal.train.stages import KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE_TOKENS = 48
_RECALL_WINDOWS = 2


class Evaluator:
    """Held-out loss, dense and sparse; what selections keep of attention; passkeys; a sample.

    Several processes divide the loss; all else is short, and each computes it whole.
    """

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
        """What to log, as the stage attends; the loss also sparse where that differs."""
        values: dict[str, Any] = {}
        if self._run.evaluate_tokens:
            dense = KINDS[self._stage.kind].dense
            values["held_out_loss"] = self._loss(dense)
            if dense and self._decoder.config.index_topk is not None:
                values["held_out_loss_sparse"] = self._loss(dense=False)
            values["held_out_perplexity"] = math.exp(values["held_out_loss"])
            values |= self._selections(dense)
        values |= self._passkeys()
        if self._run.sample is not None:
            values["sample"] = self._sample(self._run.sample)
        return values

    def _rows(self, rank: int = 0, ranks: int = 1) -> Iterator[TrainingBatch]:
        """The first held-out rows, the same at every evaluation: of texts; made-up ones where no text has any. Of each
        `ranks` of them the rank-th, which at the end may be one too many."""
        context = self._stage.context
        feed = Feed(
            self._corpus,
            context=context,
            tokens_per_step=context * ranks,
            seed=self._run.seed,
            rank=rank,
            ranks=ranks,
            part="held_out",
            sources=self._corpus.held_out_texts or None,
        )
        yield from islice(feed, -(-self._wanted_rows // ranks))

    @property
    def _wanted_rows(self) -> int:
        return max(1, self._run.evaluate_tokens // self._stage.context)

    def _selections(self, dense: bool) -> dict[str, float]:
        """What the indexers' selections keep of attention, where some document is long enough to choose from."""
        topk = self._decoder.config.index_topk
        if topk is None:
            return {}
        windows = [
            Window(tuple(ids.tolist()), 0) for batch in self._rows() for ids in batch.sequences if len(ids) > topk
        ]
        if not windows:
            return {}
        measure = partial(selection_quality, self._decoder, windows[:_RECALL_WINDOWS], dense=dense)
        kept = over_layers(self._parallel.forward(measure))
        return {f"selection_{name}": value for name, value in kept.items()}

    def _passkeys(self) -> dict[str, float]:
        """The share of passkeys that the model would write, by length, dense or sparse as the stage attends."""
        lengths = self._run.passkey_lengths
        settings = [Setting(length, depth) for length in lengths for depth in DEPTHS]
        samples = make_samples(PASSKEY, settings, self._tokenizer)
        if not samples:
            return {}
        dense = KINDS[self._stage.kind].dense
        ask = partial(force_answers, self._decoder, self._tokenizer, samples, dense=dense)
        answers = self._parallel.forward(ask)
        by_length = {length: [a.score for a in answers if a.sample.length == length] for length in lengths}
        return {f"passkey_{length}": sum(scores) / len(scores) for length, scores in by_length.items()}

    def _loss(self, dense: bool) -> float:
        parallel = self._parallel
        total = torch.zeros(2, dtype=torch.float64, device=parallel.device)
        for number, batch in enumerate(self._rows(parallel.data_rank, parallel.data_ranks)):
            sums = parallel.forward(partial(self._sums, batch, dense))
            # What is one too many keeps the processes together, and does not count.
            if number * parallel.data_ranks + parallel.data_rank < self._wanted_rows:
                total += sums
        loss, weight = parallel.total(total).tolist()
        return float(loss / weight)

    def _sums(self, batch: TrainingBatch, dense: bool) -> Tensor:
        """float64 [2], of this process's tokens: the sums of the weighted losses, and of the weights."""
        device = self._parallel.device
        packed = Batch.packed(batch.sequences, dense=dense, device=device)
        own, rows_t = self._parallel.share(packed)
        weights_T = send(torch.cat(target_weights(batch)), device)[rows_t]
        x_TD, _ = self._decoder.trunk(own)
        losses_T = row_losses(self._decoder, x_TD, packed.ids_T.roll(-1)[rows_t])
        return torch.stack(((losses_T * weights_T).sum(), weights_T.sum())).double()

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
        x_TD, _ = self._decoder.trunk(Batch.packed([torch.tensor(ids)], device=self._parallel.device))
        return self._decoder.head(x_TD[-1:]).argmax()
