"""Which tokens are computed in the next step.

One rule: a sequence knows a number of tokens and some of them are computed; every step hands out a budget of tokens so
that the second number catches up with the first. A new prompt, a chunk of a long one, a next token, and a sequence that
starts again after preemption differ in nothing but these two numbers.
"""

import sys
from collections import deque
from dataclasses import dataclass

from foveal.cache import PAGE_SIZE, CacheManager, most_pages
from foveal.engine.request import SequenceState


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `start + count` of a sequence, to be computed in this step."""

    sequence: SequenceState
    start: int
    count: int

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + self.count

    @property
    def caught_up(self) -> bool:
        """Whether the step computes all tokens that the sequence knows, so that its next can be chosen."""
        return self.end == len(self.sequence.tokens)


class Scheduler:
    """Running sequences come first, in the order of their admission; then waiting ones, first come, first served.

    When the cache is full, the sequence admitted last gives up its pages and goes back to the front of the queue, to
    be computed again (preemption by recomputation), from what the prefix cache still has of it. The oldest running
    sequence is never preempted while others run, and no sequence may need more than the whole cache: so every step
    brings the oldest one forward, and none waits for ever.

    `max_prompt_rows`: most tokens of a step that belong to prompts whose log probabilities are asked for, for each of
    them has a row of logits. `window` and `sinks` are the cache manager's. Raises ValueError for a limit below 1.
    """

    def __init__(
        self,
        manager: CacheManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prompt_rows: int = sys.maxsize,
        window: int | None = None,
        sinks: int = 0,
    ) -> None:
        for name, value in [
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("max_prompt_rows", max_prompt_rows),
        ]:
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self._manager = manager
        self._max_num_seqs = max_num_seqs
        self._budget = max_num_batched_tokens
        self._prompt_rows = max_prompt_rows
        self._window, self._sinks = window, sinks
        self.running: list[SequenceState] = []
        self.waiting: deque[SequenceState] = deque()
        self.preemptions = 0
        """How often a sequence had to give up its pages."""
        self._head_fits = True
        """False: there was no room for the head of the queue; that changes only when a sequence ends."""

    @property
    def longest(self) -> int | None:
        """The most tokens that a sequence can have cached; None: the cache is large enough for any number."""
        pages = self._manager.usage.pages_total
        fits_any = self._window is not None and self._most_pages(sys.maxsize) <= pages
        return None if fits_any else pages * PAGE_SIZE

    def add(self, sequence: SequenceState) -> None:
        """Put a new sequence at the end of the queue."""
        self.waiting.append(sequence)

    def add_first(self, sequence: SequenceState) -> None:
        """Put a sequence at the front of the queue."""
        self.waiting.appendleft(sequence)
        self._head_fits = True

    def add_running(self, fork: SequenceState) -> None:
        """Let a sequence run that already has its pages; there must be a seat."""
        assert self.has_seat
        self.running.append(fork)

    @property
    def has_seat(self) -> bool:
        """Whether one more sequence may run."""
        return len(self.running) < self._max_num_seqs

    def remove(self, sequence: SequenceState) -> None:
        """Take a sequence out, running or waiting or neither, and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._manager.free(sequence.key)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._head_fits = True

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, at most `max_num_batched_tokens` tokens of at most `max_num_seqs` sequences; their
        pages are reserved."""
        plan = _Plan(self._budget, self._prompt_rows)
        self._plan_running(plan)
        self._plan_waiting(plan)
        return plan.chunks

    def _plan_running(self, plan: "_Plan") -> None:
        for place, sequence in enumerate(list(self.running)):
            if place >= len(self.running):
                return  # the last go first: when this one has been preempted, so have all after it
            count = self._count(plan, sequence)
            if count > 0 and self._make_room(sequence, sequence.computed + count):
                plan.add(sequence, count)

    def _count(self, plan: "_Plan", sequence: SequenceState) -> int:
        """How many tokens the step computes of the sequence: what it has room for, up to where the state is wanted."""
        end = self._manager.step_end(sequence.key, sequence.computed + plan.room(sequence))
        return end - sequence.computed

    def _make_room(self, sequence: SequenceState, length: int) -> bool:
        """Reserve pages, taking them from the sequences admitted last; False: this one was itself the last."""
        while not self._manager.reserve(sequence.key, length):
            last = self.running.pop()
            self._manager.free(last.key)
            last.computed = 0
            self.add_first(last)
            self.preemptions += 1
            if last is sequence:
                return False
        return True

    def _plan_waiting(self, plan: "_Plan") -> None:
        if self._window is not None:
            self._head_fits = True  # running sequences give back the pages behind their windows
        while self.waiting and self._head_fits and self.has_seat:
            sequence = self.waiting[0]
            if not plan.room(sequence):
                break
            self._head_fits = self._admit(sequence)
            if not self._head_fits:
                break
            self.running.append(self.waiting.popleft())
            count = self._count(plan, sequence)
            reserved = self._manager.reserve(sequence.key, sequence.computed + count)
            assert reserved, "admitted without room"
            plan.add(sequence, count)

    def _most_pages(self, length: int) -> int:
        """Pages that a sequence of `length` tokens holds at any one time."""
        return most_pages(length, self._budget, self._window, self._sinks)

    def _admit(self, sequence: SequenceState) -> bool:
        """Give the sequence what the prefix cache has of it, if there is room for all its tokens."""
        request = sequence.request
        pages = self._most_pages(len(sequence.tokens))
        cached = self._manager.admit(
            sequence.key, sequence.tokens, request.salt, reusable=request.reusable, pages=pages
        )
        if cached is None:
            return False
        sequence.computed = cached
        if request.cached_tokens is None:
            request.cached_tokens = cached
        return True


class _Plan:
    """The chunks of one step, and what is left of its tokens and of those that have a row of logits each."""

    def __init__(self, tokens: int, prompt_rows: int) -> None:
        self.chunks: list[Chunk] = []
        self._tokens = tokens
        self._prompt_rows = prompt_rows

    def room(self, sequence: SequenceState) -> int:
        """How many of the sequence's missing tokens the step can still take."""
        count = min(sequence.missing, self._tokens)
        return count if sequence.request.next_prompt_row is None else min(count, self._prompt_rows)

    def add(self, sequence: SequenceState, count: int) -> None:
        """The sequence's next `count` tokens are computed in this step."""
        self.chunks.append(Chunk(sequence, sequence.computed, count))
        self._tokens -= count
        if sequence.request.next_prompt_row is not None:
            self._prompt_rows -= count
