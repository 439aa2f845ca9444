"""The scheduler's one rule, without a model."""

import pytest
import torch

from foveal.cache import PAGE_SIZE, CacheManager
from foveal.engine.request import SequenceState
from foveal.engine.scheduler import Chunk, Scheduler

from .fakes import request


def make(pages: int = 100, seats: int = 4, budget: int = 100) -> tuple[Scheduler, CacheManager]:
    manager = CacheManager(pages + 1)
    return Scheduler(manager, max_num_seqs=seats, max_num_batched_tokens=budget), manager


def sequence(name: str, length: int) -> SequenceState:
    one = request(name, length, start=ord(name))
    return SequenceState(one, 0, list(one.prompt_ids), torch.Generator())


def perform(plan: list[Chunk], manager: CacheManager) -> list[tuple[str, int, int]]:
    """Pretend to compute the plan, with one more token for each sequence that has caught up."""
    for chunk in plan:
        caught_up = chunk.caught_up
        chunk.sequence.computed = chunk.end
        manager.commit(chunk.sequence.key, chunk.sequence.tokens, chunk.end)
        if caught_up:
            chunk.sequence.tokens.append(0)
    return [(chunk.sequence.request.id, chunk.start, chunk.count) for chunk in plan]


def test_chunks_running_first_then_first_come_first_served() -> None:
    """Guards against prompts that overtake, decodes that starve behind a long prompt, and a budget that is passed."""
    scheduler, manager = make(budget=100, seats=3)
    for one in (sequence("a", 30), sequence("b", 150), sequence("c", 20), sequence("d", 5)):
        scheduler.add(one)
    steps = [perform(scheduler.schedule(), manager) for _ in range(4)]
    assert steps == [
        [("a", 0, 30), ("b", 0, 70)],
        [("a", 30, 1), ("b", 70, 80), ("c", 0, 19)],
        [("a", 31, 1), ("b", 150, 1), ("c", 19, 1)],
        [("a", 32, 1), ("b", 151, 1), ("c", 20, 1)],
    ]
    scheduler.remove(scheduler.running[1])
    assert perform(scheduler.schedule(), manager)[2] == ("d", 0, 5)


def test_the_last_admitted_gives_way_and_comes_back_first() -> None:
    """Guards against preempting the oldest, against losing a place in the queue, and against computing the preempted
    one's next token before its context."""
    scheduler, manager = make(pages=4, budget=1000, seats=3)
    a, b, c, d = (sequence(name, PAGE_SIZE) for name in "abcd")
    for one in (a, b, c, d):
        scheduler.add(one)
    assert perform(scheduler.schedule(), manager) == [("a", 0, 64), ("b", 0, 64), ("c", 0, 64)]
    assert perform(scheduler.schedule(), manager) == [("a", 64, 1), ("b", 64, 1)]
    assert scheduler.running == [a, b] and list(scheduler.waiting) == [c, d]
    assert c.computed == 0 and scheduler.preemptions == 1
    manager.check()
    assert perform(scheduler.schedule(), manager) == [("a", 65, 1), ("b", 65, 1)]
    scheduler.remove(a)
    (kept, again) = scheduler.schedule()
    assert kept.sequence is b and again.sequence is c and again.end == len(c.tokens) == 65


def test_one_that_does_not_fit_is_asked_again_only_when_pages_come_free() -> None:
    """Guards against a queue that stays blocked, and against looking up a blocked prompt's prefix in every step."""
    scheduler, manager = make(pages=4, budget=1000)
    a, b = sequence("a", 3 * PAGE_SIZE), sequence("b", 2 * PAGE_SIZE)
    scheduler.add(a)
    scheduler.add(b)
    asked = 0
    admit = manager.admit

    def counted(*args: object, **options: bool) -> int:
        nonlocal asked
        asked += 1
        return admit(*args, **options)  # type: ignore[arg-type]

    manager.admit = counted  # type: ignore[method-assign, assignment]
    for _ in range(5):
        assert [name for name, _, _ in perform(scheduler.schedule(), manager)] == ["a"]
    assert asked == 2
    scheduler.remove(a)
    assert perform(scheduler.schedule(), manager) == [("b", 0, 2 * PAGE_SIZE)]


def test_prompt_rows_are_limited_in_all() -> None:
    """Guards against a step whose rows of logits take more memory than they may, for one prompt or for several, and
    against a limit for prompts that want no rows."""
    manager = CacheManager(101)
    scheduler = Scheduler(manager, max_num_seqs=4, max_num_batched_tokens=100, max_prompt_rows=30)
    for name, wanted in (("a", 0), ("b", 0), ("c", None), ("d", 0)):
        one = request(name, 40, start=ord(name), prompt_logprobs=wanted)
        scheduler.add(SequenceState(one, 0, list(one.prompt_ids), torch.Generator()))
    assert perform(scheduler.schedule(), manager) == [("a", 0, 30)]
    assert perform(scheduler.schedule(), manager) == [("a", 30, 10), ("b", 0, 20), ("c", 0, 40)]
    assert scheduler.waiting[0].request.id == "d"


def test_limits_are_checked() -> None:
    """Guards against a scheduler that can never hand out a token."""
    for seats, budget in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="must be at least 1, not 0"):
            make(seats=seats, budget=budget)
    with pytest.raises(ValueError, match="max_prompt_rows"):
        Scheduler(CacheManager(2), max_num_seqs=1, max_num_batched_tokens=1, max_prompt_rows=0)
