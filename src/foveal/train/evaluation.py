"""How a model does on held-out text while it learns."""

import math
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from foveal.evaluate.answers import DEPTHS, force_answers, make_samples
from foveal.evaluate.recall import over_layers, selection_quality
from foveal.evaluate.tasks import PASSKEY, Setting
from foveal.evaluate.text import Window
from foveal.models.decoder import Decoder
from foveal.nn.batch import Batch
from foveal.train.data import Corpus, Feed, TrainingBatch
from foveal.train.losses import head_loss, next_token
from foveal.train.objective import target_weights
from foveal.train.schema import RunSettings, StageSettings
from foveal.train.stages import KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE_TOKENS = 48
_RECALL_WINDOWS = 2


class Evaluator:
    """Held-out loss, dense and sparse; what selections keep of attention; passkeys; a sample."""

    def __init__(
        self,
        decoder: Decoder,
        corpus: Corpus,
        tokenizer: "PreTrainedTokenizerBase",
        run: RunSettings,
        stage: StageSettings,
    ) -> None:
        self._decoder, self._corpus, self._tokenizer, self._run, self._stage = decoder, corpus, tokenizer, run, stage

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

    def _rows(self) -> Iterator[TrainingBatch]:
        """The first held-out rows, the same at every evaluation: of texts; made-up ones where no text has any."""
        context = self._stage.context
        texts = [name for name in self._corpus.shards if len(self._corpus.documents(name, "held_out"))]
        feed = Feed(
            self._corpus,
            context=context,
            tokens_per_step=context,
            seed=self._run.seed,
            part="held_out",
            sources=texts or None,
        )
        yield from islice(feed, max(1, self._run.evaluate_tokens // context))

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
        kept = over_layers(selection_quality(self._decoder, windows[:_RECALL_WINDOWS], dense=dense))
        return {f"selection_{name}": value for name, value in kept.items()}

    def _passkeys(self) -> dict[str, float]:
        """The share of passkeys that the model would write, by length, dense or sparse as the stage attends."""
        lengths = self._run.passkey_lengths
        settings = [Setting(length, depth) for length in lengths for depth in DEPTHS]
        samples = make_samples(PASSKEY, settings, self._tokenizer)
        if not samples:
            return {}
        dense = KINDS[self._stage.kind].dense
        answers = force_answers(self._decoder, self._tokenizer, samples, dense=dense)
        by_length = {length: [a.score for a in answers if a.sample.length == length] for length in lengths}
        return {f"passkey_{length}": sum(scores) / len(scores) for length, scores in by_length.items()}

    def _loss(self, dense: bool) -> float:
        loss, weight = 0.0, 0.0
        for batch in self._rows():
            packed = Batch.packed(batch.sequences, dense=dense)
            weights_T = torch.cat(target_weights(batch))
            x_TD, _ = self._decoder.trunk(packed)
            loss += float(head_loss(self._decoder, x_TD, weights_T, next_token(packed.ids_T.roll(-1))))
            weight += float(weights_T.sum())
        return loss / weight

    def _sample(self, prompt: str) -> str:
        """The prompt's likeliest continuation."""
        ids = self._tokenizer.encode(prompt)
        for _ in range(min(_SAMPLE_TOKENS, self._decoder.config.max_positions - len(ids))):
            x_TD, _ = self._decoder.trunk(Batch.packed([torch.tensor(ids)]))
            ids.append(int(self._decoder.head(x_TD[-1:]).argmax()))
            if ids[-1] == self._tokenizer.eos_token_id:
                break
        return str(self._tokenizer.decode(ids))
