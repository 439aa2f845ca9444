"""The trainer: stages one after another, resumable at any update."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from foveal.costs.macs import training_flops
from foveal.models.decoder import Decoder
from foveal.train.checkpoints import Checkpoints, fill_from, progress_of
from foveal.train.data import Corpus, Feed, data_cache, open_tokenizer
from foveal.train.evaluation import Evaluator
from foveal.train.learner import Learner, check_indexers, teaches_base
from foveal.train.model import TrainedModel, begin
from foveal.train.objective import Objective
from foveal.train.parallel import Parallel, check_context
from foveal.train.rate import matrix_rate
from foveal.train.report import Quiet, Report
from foveal.train.schema import Recipe, StageSettings
from foveal.train.stages import KINDS


@dataclass
class Progress:
    """How far a run has come."""

    stage: int = 0
    step: int = 0
    """Updates of the current stage."""
    update: int = 0
    """Updates of the whole run."""
    tokens: int = 0
    seconds: float = 0.0
    base_learned: bool = False
    """Whether any stage so far taught more than indexers."""
    feed: dict[str, Any] | None = None


@dataclass
class Interrupted:
    """Whether someone has asked the run to stop after the current update."""

    signal: int | None = field(default=None)


class Trainer:
    """A run of a recipe. Made again with the same recipe it goes on from the last checkpoint."""

    def __init__(self, recipe: Recipe, parallel: Parallel | None = None) -> None:
        """`parallel`: the processes that share the run (see `join`); None: this one alone."""
        self.recipe, self.run, self.parallel = recipe, recipe.run, parallel or Parallel()
        with self.parallel.leader_first():
            self.tokenizer = open_tokenizer(recipe.data, data_cache(recipe.data), recipe.model.start)
            self.corpus = Corpus.build(recipe.data, self.tokenizer)
        self.model: TrainedModel = begin(recipe.model, self.run.seed)
        self._check_vocabulary()
        self._check_held_out()
        for stage in recipe.stages:
            check_indexers(stage, self.decoder.config.index_topk is not None)
        check_context(self.decoder.config, recipe.parallel, recipe.stages)
        self.parallel.shard(self.decoder)
        self.progress = Progress()
        self._checkpoints = Checkpoints(self.run.output / "checkpoints", self.run.keep_checkpoints, self.parallel)
        self._rate = matrix_rate(self.decoder.options.dtype, self.parallel.device) * self.parallel.ranks

    @property
    def decoder(self) -> Decoder:
        """The model that learns."""
        return self.model.decoder

    def train(self, *, merge: bool = False) -> list[Path]:
        """Run all stages that are not done yet; what was written (see `TrainedModel.save`).

        A SIGTERM or Ctrl-C ends the run after the current update, with a checkpoint, as a KeyboardInterrupt.
        """
        base_learns = any(teaches_base(stage) for stage in self.recipe.stages)
        self.model.check_savable(base_learned=base_learns, merge=merge)
        last = self._checkpoints.last()
        if last is not None:
            self.progress = Progress(**progress_of(last))
            self._check_progress(last)
        total = sum(stage.steps for stage in self.recipe.stages)
        done = self.progress.update
        with self._report(total, done) as report, _stoppable() as stop:
            if last is not None:
                report.event({"update": done, "resumed_from": last.name})
            for index in range(self.progress.stage, len(self.recipe.stages)):
                stage = self.recipe.stages[index]
                self._stage(stage, last, report, stop)
                last = None
            if last is not None:  # everything was done before: only the result is written
                fill_from(last, self._model_tensors())
        whole = self.parallel.gathered(self.decoder)
        if not self.parallel.leads:
            return []
        tokenizer = self.run.output / "tokenizer"
        self.tokenizer.save_pretrained(tokenizer)
        model = replace(self.model, decoder=whole)
        return model.save(self.run, tokenizer, base_learned=self.progress.base_learned, merge=merge)

    def _report(self, updates: int, done: int) -> Quiet:
        if not self.parallel.leads:
            return Quiet()
        return Report(self.run.output, updates, done, tensorboard=self.run.tensorboard)

    def _stage(self, stage: StageSettings, last: Path | None, report: Quiet, stop: Interrupted) -> None:
        """One stage, from where the progress says."""
        progress, parallel = self.progress, self.parallel
        if last is not None:  # before the learner, which copies what is narrower than float32
            fill_from(last, self._model_tensors())
        learner = Learner(self.decoder, stage, parallel)
        objective = Objective(self.decoder, stage, parallel)
        evaluator = Evaluator(self.decoder, self.corpus, self.tokenizer, self.run, stage, parallel)
        feed = Feed(
            self.corpus,
            context=stage.context,
            tokens_per_step=stage.tokens_per_step,
            seed=self.run.seed + progress.stage,
            rank=parallel.data_rank,
            ranks=parallel.data_ranks,
            sources=stage.sources or None,
        )
        if progress.feed is not None:
            feed.load_state_dict(progress.feed)
        if last is not None and progress.step:
            fill_from(last, learner.tensors())
        progress.base_learned |= teaches_base(stage)
        rows = (stage.micro_tokens or stage.context) // stage.context
        flops = training_flops(self.decoder.config, stage.context, dense=KINDS[stage.kind].dense)
        saved = time.monotonic()
        for step in range(progress.step, stage.steps):
            start = time.monotonic()
            values = learner.update(step, objective.accumulate(next(feed), rows))
            objective.balance()
            seconds = time.monotonic() - start
            progress.step = step + 1
            progress.update += 1
            progress.tokens += stage.tokens_per_step
            progress.seconds += seconds
            rate = stage.tokens_per_step / seconds
            report.update(
                {
                    "update": progress.update,
                    "stage": stage.kind,
                    **values,
                    "tokens": progress.tokens,
                    "seconds": progress.seconds,
                    "tokens_per_second": rate,
                    "mfu": rate * flops / self._rate,
                }
            )
            ended = progress.step == stage.steps
            evaluated = ended or (self.run.evaluate_every and progress.step % self.run.evaluate_every == 0)
            due = time.monotonic() - saved > 60 * self.run.checkpoint_minutes
            due, stopped = parallel.any(due, stop.signal is not None)
            if ended or stopped or due:
                self._save(learner, feed, ended)
                saved = time.monotonic()
            if evaluated:
                report.event({"update": progress.update, **evaluator.evaluate()})
            if stopped:
                raise KeyboardInterrupt

    def _save(self, learner: Learner, feed: Feed, ended: bool) -> None:
        progress = self.progress
        progress.feed = feed.state_dict()
        tensors = self._model_tensors()
        if ended:  # the next stage has a feed and optimisers of its own
            progress.stage, progress.step, progress.feed = progress.stage + 1, 0, None
        else:
            tensors |= learner.tensors()
        self._checkpoints.save(progress.update, tensors, vars(progress))

    def _model_tensors(self) -> dict[str, Tensor]:
        return {f"model.{name}": p.detach() for name, p in self.decoder.named_parameters()}

    def _check_held_out(self) -> None:
        asked = self.run.evaluate_tokens
        if asked and not self.corpus.held_out_texts and not self.recipe.data.retrieval:
            raise ValueError(
                f"run.evaluate_tokens = {asked}, but no source has more than one document to hold out from"
            )

    def _check_progress(self, last: Path) -> None:
        """ValueError where the recipe has become shorter than what is done."""
        stages, at = self.recipe.stages, self.progress
        if at.stage > len(stages) or (at.stage < len(stages) and at.step >= stages[at.stage].steps):
            raise ValueError(f"{last} is at step {at.step} of stage {at.stage}: further than this recipe goes")

    def _check_vocabulary(self) -> None:
        size, most = len(self.tokenizer), self.decoder.config.vocab_size
        if size > most:
            raise ValueError(f"the tokenizer has {size} tokens, and the model only {most} (vocab_size)")
        longest = max(stage.context for stage in self.recipe.stages)
        if longest > self.decoder.config.max_positions:
            raise ValueError(f"context = {longest}, but the model has {self.decoder.config.max_positions} positions")
        longest = max(self.run.passkey_lengths, default=0)
        if longest > self.decoder.config.max_positions:
            raise ValueError(
                f"passkey_lengths: {longest}, but the model has {self.decoder.config.max_positions} positions"
            )
        if self.run.sample is not None and not self.tokenizer.encode(self.run.sample):
            raise ValueError(f"sample = {self.run.sample!r} has no tokens to continue")


@contextmanager
def _stoppable() -> Iterator[Interrupted]:
    """Note SIGTERM and Ctrl-C instead of dying in the middle of an update; a second Ctrl-C dies."""
    stop = Interrupted()

    def note(number: int, frame: object) -> None:
        if stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
