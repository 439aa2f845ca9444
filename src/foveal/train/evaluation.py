"""How a model does on held-out text while it learns."""

import math
from typing import TYPE_CHECKING, Any

import torch

from foveal.models.decoder import Decoder
from foveal.nn.batch import Batch
from foveal.train.data import Corpus, Feed
from foveal.train.losses import head_loss, next_token
from foveal.train.objective import target_weights
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
    ) -> None:
        self._decoder, self._corpus, self._tokenizer, self._run, self._stage = decoder, corpus, tokenizer, run, stage

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
        """Mean over the first rows of the held-out documents, the same at every evaluation."""
        context = self._stage.context
        rows = max(1, self._run.evaluate_tokens // context)
        feed = Feed(self._corpus, context=context, tokens_per_step=context, seed=self._run.seed, part="held_out")
        loss, weight = 0.0, 0.0
        for _, batch in zip(range(rows), feed, strict=False):
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
