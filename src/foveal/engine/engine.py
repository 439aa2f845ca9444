"""The step loop: schedule, run, choose tokens, answer. `LLM` and the server drive it."""

import logging
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from foveal.cache import CacheManager, CacheUsage
from foveal.engine.detokenize import Detokenizer
from foveal.engine.guidance import Grammars
from foveal.engine.outputs import FinishReason, RequestOutput
from foveal.engine.request import Request, SequenceState, seeded_generator
from foveal.engine.runner import Runner, StepLogits
from foveal.engine.sampler import Sampler
from foveal.engine.scheduler import Chunk, Scheduler
from foveal.kernels.transfer import upload

_logger = logging.getLogger(__name__)


class Decodes(Protocol):
    """What the engine needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """The text of the tokens."""


class Engine:
    """Serves many requests at a time with one model; not thread-safe.

    `add` takes a request at any time, `step` brings all of them forward and answers, `abort` drops one.
    """

    def __init__(
        self,
        runner: Runner,
        manager: CacheManager,
        scheduler: Scheduler,
        *,
        vocab_size: int,
        max_model_len: int,
        eos_ids: Sequence[int] = (),
        tokenizer: Decodes | None = None,
        seed: int = 0,
        plain_rope: int | None = None,
    ) -> None:
        """`max_model_len`: most tokens of a prompt and its completion together. `eos_ids` end a completion. Without a
        tokenizer there is no text. Requests without a seed use `seed` + the number of requests before them.
        `plain_rope`: the longest prompt that `dynamic` rope leaves unscaled; None: it does not depend on the prompt."""
        self._runner = runner
        self._manager = manager
        self._scheduler = scheduler
        self._vocab_size = vocab_size
        longest = scheduler.longest
        self._limit = max_model_len if longest is None else min(max_model_len, longest)
        self._eos_ids = frozenset(eos_ids)
        self._tokenizer = tokenizer
        self._grammars = Grammars(tokenizer, vocab_size, eos_ids)
        self._sampler = Sampler(eos_ids, self._decode_token if tokenizer else None)
        self._seed = seed
        self._plain_rope = plain_rope
        self._added = 0
        self._requests: dict[str, Request] = {}
        self._rejected: list[Request] = []

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests or self._rejected)

    @property
    def running(self) -> int:
        """How many sequences hold pages."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """How many sequences wait for pages or a seat."""
        return len(self._scheduler.waiting)

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its completion together, as the model and its cache have room for."""
        return self._limit

    @property
    def preemptions(self) -> int:
        """How often a sequence had to give up its pages and be computed again."""
        return self._scheduler.preemptions

    @property
    def usage(self) -> CacheUsage:
        """How full the cache is."""
        return self._manager.usage

    def check(self, request: Request) -> None:
        """ValueError where the request asks for what cannot be: an unknown token, a stop string without a tokenizer,
        guidance that cannot be followed, an id that is taken."""
        params = request.params
        if request.id in self._requests:
            raise ValueError(f"request_id {request.id!r} is taken by a request that is not finished")
        if not request.prompt_ids:
            raise ValueError("prompt has no tokens")
        asked = {
            "prompt_token_ids": request.prompt_ids,
            "logit_bias": params.logit_bias or (),
            "stop_token_ids": params.stop_token_ids or (),
        }
        for name, tokens in asked.items():
            unknown = [token for token in tokens if not 0 <= token < self._vocab_size]
            if unknown:
                raise ValueError(f"{name} has {unknown[0]}, which is not among the model's {self._vocab_size} tokens")
        for name, count in [("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)]:
            if count is not None and count > self._vocab_size:
                raise ValueError(f"{name} = {count} is more than the model's {self._vocab_size} tokens")
        for name, asked_for in [("stop", params.stop), ("guidance", params.guidance)]:
            if asked_for and self._tokenizer is None:
                raise ValueError(f"{name} = {asked_for!r} needs a tokenizer")
        if params.min_tokens and len(self._sampler.ends(params)) >= self._vocab_size:
            raise ValueError("stop_token_ids leaves no token that min_tokens would allow")
        if params.guidance:
            self._grammars.guide(params.guidance)

    def add(self, request: Request) -> None:
        """Take a request. One that can never fit is answered with an error by the next `step`.

        Raises ValueError as `check` does.
        """
        self.check(request)
        seed = self._seed + self._added if request.params.seed is None else request.params.seed
        request.salt = self._salt(request)
        self._added += 1
        request.sequences = [self._sequence(request, index, seed) for index in range(request.params.n)]
        if request.prompt_length + 1 > self._limit:
            self._reject(request)
            return
        self._requests[request.id] = request
        self._scheduler.add(request.sequences[0])

    def abort(self, request_id: str) -> RequestOutput | None:
        """Drop a request and free its pages now; its output so far. None where there is no such unfinished request."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._end(request, "abort")
        return request.output()

    def step(self) -> list[RequestOutput]:
        """Compute one batch. Returns an output for every request that finished, and for every streamed one that has new
        tokens; each says all that there is so far.

        Where the model fails, the requests of this batch end with an error and all others go on; AssertionError if a
        page was lost over it.
        """
        answered, self._rejected = self._rejected, []
        plan = self._scheduler.schedule()
        if plan:
            try:
                answered += _requests(self._execute(plan))
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a panic in a package written in Rust is no Exception
                _logger.exception("a step failed")
                failed = _requests([chunk.sequence for chunk in plan])
                self._fail(failed, f"{type(error).__name__}: {error}")
                answered += failed
                self._manager.check()
        if not self._scheduler.running:
            self._manager.check_counts()
        return [request.output() for request in answered if request.finished or request.stream]

    def _execute(self, plan: Sequence[Chunk]) -> list[SequenceState]:
        """Run the plan; the sequences that have a new token."""
        step = self._runner.run(plan)
        ready: list[SequenceState] = []
        rows: list[int] = []
        for chunk, chunk_rows in zip(plan, step.rows, strict=True):
            sequence = chunk.sequence
            caught_up = chunk.caught_up
            sequence.computed = chunk.end
            self._manager.commit(sequence.key, sequence.tokens, chunk.end)
            self._keep_prompt_logprobs(chunk, step, chunk_rows)
            if caught_up:
                group = [sequence, *self._fork(sequence)]
                ready += group
                rows += [chunk_rows[-1]] * len(group)
        if ready:
            self._choose(step, rows, ready)
        return ready

    def _keep_prompt_logprobs(self, chunk: Chunk, step: StepLogits, rows: range) -> None:
        request = chunk.sequence.request
        first, count = request.next_prompt_row, request.params.prompt_logprobs
        if first is None or count is None:
            return
        # The last prompt token's row says what follows the prompt.
        of_prompt = rows[: request.prompt_length - 1 - first]
        if of_prompt:
            tokens = request.prompt_ids[first + 1 : first + 1 + len(of_prompt)]
            logits_LV = step.logits_LV[of_prompt.start : of_prompt.stop]
            request.prompt_logprobs += self._sampler.logprobs(logits_LV, tokens, count)

    def _fork(self, first: SequenceState) -> list[SequenceState]:
        """Once the prompt is computed: the request's other sequences that go on from it in this step. Those without
        room wait, to be admitted like any other."""
        request = first.request
        if request.forked:
            return []
        request.forked = True
        running, waiting = [], []
        for sequence in request.sequences[1:]:
            if not (self._scheduler.has_seat and self._manager.fork(first.key, sequence.key)):
                waiting.append(sequence)
                continue
            self._scheduler.add_running(sequence)
            sequence.computed = first.computed
            running.append(sequence)
        for sequence in reversed(waiting):
            self._scheduler.add_first(sequence)
        return running

    def _choose(self, step: StepLogits, rows: list[int], sequences: Sequence[SequenceState]) -> None:
        """Give each sequence its next token, from its row of the step's logits."""
        all_rows = rows == list(range(len(step.logits_LV)))
        logits_LV = (step.logits_LV if all_rows else _some(step.logits_LV, rows)).float()
        allowed = self._allowed(sequences)
        kept = [row for row, one in enumerate(sequences) if not one.finished]
        if len(kept) < len(sequences):
            logits_LV, sequences = _some(logits_LV, kept), [sequences[row] for row in kept]
            rows = [rows[row] for row in kept]
        tokens = self._sampler.sample(logits_LV, sequences, [allowed[row] for row in kept])
        for sequence, token in zip(sequences, tokens, strict=True):
            if token is None:
                self._fail([sequence.request], "the model computed logits that are NaN or infinite")
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            if token is None or sequence.finished:
                continue
            if sequence.params.logprobs is not None:
                (entry,) = self._sampler.logprobs(logits_LV[row : row + 1], [token], sequence.params.logprobs)
                sequence.logprobs.append(entry)
                sequence.cumulative_logprob += entry[token].logprob
            if sequence.params.selection:
                sequence.selections.append(step.selections[rows[row]])
            self._append(sequence, token)

    def _allowed(self, sequences: Sequence[SequenceState]) -> list[Tensor | None]:
        """For each sequence the tokens to choose from, bool [V], or None: all. Ends requests that cannot go on."""
        allowed: list[Tensor | None] = [None] * len(sequences)
        for row, sequence in enumerate(sequences):
            try:
                if sequence.guide:
                    allowed[row] = sequence.guide.allowed()
            except ValueError as error:
                self._fail([sequence.request], str(error))
        return allowed

    def _append(self, sequence: SequenceState, token: int) -> None:
        sequence.tokens.append(token)
        if sequence.guide:
            sequence.guide.follow(sequence.output_ids)
        self._stop(sequence, token)
        if not sequence.finished:
            return
        self._scheduler.remove(sequence)
        if sequence.request.finished:
            del self._requests[sequence.request.id]

    def _stop(self, sequence: SequenceState, token: int) -> None:
        """End the sequence if its latest token does."""
        params, detokenizer = sequence.params, sequence.detokenizer
        may_stop = sequence.output_length > params.min_tokens
        if token in (params.stop_token_ids or ()):
            sequence.finish("stop", token)
        elif token in self._eos_ids and not params.ignore_eos:
            sequence.finish("stop")
        elif detokenizer and (text := detokenizer.append(token, may_stop=may_stop)) is not None:
            sequence.finish("stop", text)
            return
        elif sequence.guide and sequence.guide.complete:
            sequence.finish("stop")
        elif sequence.output_length == params.max_tokens or len(sequence.tokens) == self._limit:
            sequence.finish("length")
        if sequence.finished and detokenizer:
            detokenizer.finish()

    def _sequence(self, request: Request, index: int, seed: int) -> SequenceState:
        detokenizer = None
        if self._tokenizer is not None:
            detokenizer = Detokenizer(self._decode, request.prompt_ids, request.params.stop_strings)
        params, guide = request.params, None
        if params.guidance is not None:
            guide = self._grammars.guide(params.guidance, ignore_eos=params.ignore_eos)
        generator = seeded_generator(seed, index)
        return SequenceState(request, index, list(request.prompt_ids), generator, detokenizer, guide)

    def _salt(self, request: Request) -> tuple[str | None, int | None]:
        """What must be equal for prefixes to be shared: the caller's salt, and with `dynamic` rope the prompt's length,
        on which the keys of its tokens depend."""
        length = None if self._plain_rope is None else max(request.prompt_length, self._plain_rope)
        return request.cache_salt, length

    def _reject(self, request: Request) -> None:
        request.error = (
            f"the prompt has {request.prompt_length} tokens; with one to follow it does not fit in the "
            f"{self._limit} that the model and its cache have room for"
        )
        for sequence in request.sequences:
            sequence.finish("error")
        self._rejected.append(request)

    def _fail(self, requests: Sequence[Request], error: str) -> None:
        for request in requests:
            if not request.finished:
                request.error = error
                self._end(request, "error")

    def _end(self, request: Request, reason: FinishReason) -> None:
        for sequence in request.sequences:
            if not sequence.finished:
                sequence.finish(reason)
                self._scheduler.remove(sequence)
        self._requests.pop(request.id, None)

    def _decode(self, tokens: Sequence[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _decode_token(self, token: int) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _some(logits_LV: Tensor, rows: Sequence[int]) -> Tensor:
    return logits_LV.index_select(0, upload(rows, logits_LV.device))


def _requests(sequences: Sequence[SequenceState]) -> list[Request]:
    """Their requests, each once."""
    return list({sequence.request.id: sequence.request for sequence in sequences}.values())
