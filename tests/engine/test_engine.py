"""The step loop on a fake model whose every token depends on its whole context as read back from the cache."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.cache import PAGE_SIZE
from foveal.engine.request import Request
from foveal.nn.batch import Batch
from foveal.nn.watch import Watch

from .fakes import (
    EOS,
    VOCABULARY,
    ByteTokenizer,
    FakeModel,
    FakeOutput,
    FakeStore,
    greedy_tokens,
    make_world,
    request,
)


def expected(one: Request) -> list[int]:
    assert one.params.max_tokens is not None
    return greedy_tokens(one.prompt_ids, one.params.max_tokens)


@pytest.mark.parametrize("budget", [7, 64, 512])
@pytest.mark.parametrize("slots", [0, 9])
def test_a_mixed_batch_gives_each_its_own_tokens(budget: int, slots: int) -> None:
    """Guards against mixing up sequences, positions, pages and states when prompts of many lengths share steps."""
    world = make_world(max_num_batched_tokens=budget, slots=slots)
    requests = [request(str(n), n, start=n) for n in (1, 5, 63, 64, 65, 128, 200)]
    final = world.run(*requests)
    for one in requests:
        assert final[one.id].outputs[0].token_ids == expected(one)
        assert final[one.id].outputs[0].finish_reason == "length"
    assert max(len(batch.ids_T) for batch in world.model.batches) <= budget


@pytest.mark.parametrize("slots", [0, 5])
def test_preemption_changes_no_token(slots: int) -> None:
    """Guards against taking a preempted sequence for one that decodes, and against losing what it had."""
    requests = [request(str(n), 60 + n, start=n, max_tokens=120, temperature=0.8, seed=n) for n in range(4)]
    roomy = make_world(slots=slots)
    tight = make_world(pages=5, slots=slots, prefix_caching=False)
    want = roomy.run(*requests)
    got = tight.run(*[Request(one.id, one.prompt_ids, one.params) for one in requests])
    assert roomy.scheduler.preemptions == 0 and tight.scheduler.preemptions > 0
    assert {name: output.outputs for name, output in got.items()} == {
        name: output.outputs for name, output in want.items()
    }


def test_a_tiny_pool_finishes_everything() -> None:
    """Guards against livelock: in a pool of 3 pages every request ends, the ones that outgrow it by length."""
    world = make_world(pages=3, max_num_batched_tokens=50)
    requests = [request(str(n), 20 * n + 1, start=n, max_tokens=None) for n in range(8)]
    final = world.run(*requests)
    for one in requests:
        output = final[one.id].outputs[0]
        assert output.finish_reason == "length"
        assert len(one.prompt_ids) + len(output.token_ids) == 3 * PAGE_SIZE
        assert output.token_ids == greedy_tokens(one.prompt_ids, len(output.token_ids))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 90), st.integers(1, 3)), min_size=1, max_size=7),
    pages=st.integers(4, 12),
    budget=st.sampled_from([1, 7, 64, 300]),
    seats=st.integers(1, 4),
    caching=st.booleans(),
    snapshots=st.sampled_from([None, 0, 1, 5]),
)
def test_any_load_ends_with_the_right_tokens(
    lengths: list[tuple[int, int, int]], pages: int, budget: int, seats: int, caching: bool, snapshots: int | None
) -> None:
    """Guards against any mix of chunks, preemption, forks and prefix hits, with recurrent states and without, that
    starves or corrupts a sequence."""
    world = make_world(
        pages=pages,
        slots=0 if snapshots is None else 1 + seats + snapshots,
        max_num_batched_tokens=budget,
        max_num_seqs=seats,
        prefix_caching=caching,
    )
    requests = [
        request(str(index), length, start=index % 2, max_tokens=tokens, n=n)
        for index, (length, tokens, n) in enumerate(lengths)
    ]
    final = world.run(*requests)
    for one in requests:
        for output in final[one.id].outputs:
            assert output.token_ids == expected(one)


@pytest.mark.parametrize("length", [PAGE_SIZE, 3 * PAGE_SIZE, 3 * PAGE_SIZE + 1])
@pytest.mark.parametrize("slots", [0, 20])
def test_a_fully_cached_prompt_works(length: int, slots: int) -> None:
    """Guards against a prefix hit that leaves no token to compute logits from."""
    world = make_world(slots=slots)
    first = world.run(request("a", length))["a"]
    second = world.run(request("b", length))["b"]
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == (length - 1) // PAGE_SIZE * PAGE_SIZE
    assert first.outputs == second.outputs


def test_dynamic_rope_shares_prefixes_only_where_keys_are_equal() -> None:
    """Guards against a prefix hit on keys that were turned for a prompt of another length."""
    world = make_world(plain_rope=150)
    hits = [world.run(request("a", length))["a"].num_cached_tokens for length in (140, 150, 200, 200, 210, 145)]
    assert hits == [0, 128, 0, 192, 0, 128]


def test_salts_keep_prefixes_apart() -> None:
    """Guards against one tenant's request finding what another's has computed, with and without `dynamic` rope, and
    with a recurrent state."""
    for plain_rope, slots in ((None, 0), (1000, 0), (None, 20)):
        world = make_world(plain_rope=plain_rope, slots=slots)
        hits = []
        for salt in (None, "a", "a", "b", None):
            one = request("x", 200)
            one.cache_salt = salt
            hits.append(world.run(one)["x"].num_cached_tokens)
        assert hits == [0, 0, 192, 0, 192]


def test_recurrent_prefixes_are_restored() -> None:
    """Guards against chunks that run past where a state is wanted, and against states of another prefix: of a prompt
    that parts from a known one, of one that parts there again, and of a conversation that goes on."""
    world = make_world(slots=20, max_model_len=2000, max_num_batched_tokens=300)
    shared, computed = request("", 700).prompt_ids, []
    for name, prompt in (("a", [*shared, 1]), ("b", [*shared[:400], *[2] * 150]), ("c", [*shared[:400], *[3] * 90])):
        before = sum(len(batch.ids_T) for batch in world.model.batches)
        one = request(name, 1, max_tokens=70)
        one.prompt_ids = prompt
        output = world.run(one)[name]
        assert output.outputs[0].token_ids == expected(one)
        computed.append(sum(len(batch.ids_T) for batch in world.model.batches) - before - 69)
        assert computed[-1] == len(prompt) - output.num_cached_tokens
    assert computed == [701, 550 - 384, 490 - 384]
    turn = request("d", 1, max_tokens=9)
    turn.prompt_ids = [*prompt, *output.outputs[0].token_ids, 5]
    again = world.run(turn)["d"]
    assert again.outputs[0].token_ids == expected(turn) and again.num_cached_tokens == (490 + 69) // 64 * 64


def test_preemption_restores_a_state() -> None:
    """Guards against recomputing what a snapshot holds, and against going on from a state further on than it."""
    requests = [request(str(n), 690 + n, start=n, max_tokens=20) for n in range(2)]
    computed = {}
    for caching in (True, False):
        world = make_world(pages=22, slots=12, prefix_caching=caching)
        final = world.run(*[Request(one.id, one.prompt_ids, one.params) for one in requests])
        assert world.scheduler.preemptions > 0
        assert [final[one.id].outputs[0].token_ids for one in requests] == [expected(one) for one in requests]
        computed[caching] = sum(len(batch.ids_T) for batch in world.model.batches)
    assert computed[False] - computed[True] == 690 // PAGE_SIZE * PAGE_SIZE


@pytest.mark.parametrize("length", [10, 64, 100])
@pytest.mark.parametrize("slots", [0, 9])
def test_n_completions_share_the_prompt(length: int, slots: int) -> None:
    """Guards against computing the prompt n times, and against forks that write into each other's pages."""
    world = make_world(slots=slots)
    one = request("a", length, n=4, temperature=1.0, seed=3, max_tokens=100)
    outputs = world.run(one)["a"].outputs
    assert [output.index for output in outputs] == [0, 1, 2, 3]
    assert len({tuple(output.token_ids) for output in outputs}) == 4
    assert sum(len(batch.ids_T) for batch in world.model.batches) == length + 4 * 99
    # The pages are right: every completion alone, its tokens forced, has the same greedy choice next.
    alone = make_world(max_num_seqs=1, slots=2 if slots else 0)
    assert alone.run(request("a", length, n=4, temperature=1.0, seed=3, max_tokens=100))["a"].outputs == outputs


def test_n_without_room_to_fork_computes_separately() -> None:
    """Guards against dropping completions when the pool or the seats do not allow a fork."""
    for world in (make_world(pages=2), make_world(max_num_seqs=2), make_world(slots=3, max_num_seqs=2)):
        outputs = world.run(request("a", 70, n=5, temperature=1.0, seed=3))["a"].outputs
        assert outputs == make_world().run(request("a", 70, n=5, temperature=1.0, seed=3))["a"].outputs


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch() -> None:
    """Guards against draws that depend on the batch, and against unseeded requests that all draw alike."""
    alone = make_world(seed=1).run(request("x", 30, temperature=1.0, seed=5))["x"]
    others = [request(str(n), 30 + n, temperature=0.7, top_p=0.9) for n in range(4)]
    among = make_world(seed=2).run(*others, request("x", 30, temperature=1.0, seed=5))["x"]
    assert alone.outputs == among.outputs
    same = [request(str(n), 30, temperature=1.0) for n in range(2)]
    first, second = make_world().run(*same).values()
    assert first.outputs[0].token_ids != second.outputs[0].token_ids


def test_a_prompt_that_cannot_fit_answers_with_an_error_for_itself() -> None:
    """Guards against an assertion, or no answer at all, when a prompt is larger than the model or the pool."""
    for world, most in ((make_world(max_model_len=100), 100), (make_world(pages=2), 2 * PAGE_SIZE)):
        final = world.run(request("long", most), request("fits", most - 1))
        assert final["long"].finished and final["long"].outputs[0].finish_reason == "error"
        assert str(most) in (final["long"].error or "")
        assert final["fits"].error is None and len(final["fits"].outputs[0].token_ids) == 1


def test_abort_frees_pages_at_once() -> None:
    """Guards against a client that goes away and leaves its pages behind, running, waiting or half prefilled."""
    world = make_world(max_num_seqs=2, max_num_batched_tokens=100)
    for name in ("a", "b", "c"):
        world.engine.add(request(name, 150, start=ord(name), n=2, max_tokens=50))
    for _ in range(3):
        world.engine.step()
    for name in ("c", "a", "b"):
        output = world.engine.abort(name)
        assert output is not None and output.finished
        assert {one.finish_reason for one in output.outputs} == {"abort"}
    assert not world.engine.has_work and world.engine.abort("a") is None
    world.check_idle()


class Panic(BaseException):
    """What packages written in Rust raise for their own bugs."""


@pytest.mark.parametrize("failure", [RuntimeError, Panic])
def test_a_failing_step_fails_only_its_requests(failure: type[BaseException]) -> None:
    """Guards against a model error that kills the engine or leaks pages."""
    world = make_world(model=FakeModel(fail_on=258, failure=failure), max_num_seqs=1)
    bad = Request("bad", [1, 2, 258], request("x", 1, n=2).params)
    final = world.run(bad, request("good", 20))
    assert final["bad"].error == f"{failure.__name__}: the model broke"
    assert [one.finish_reason for one in final["bad"].outputs] == ["error", "error"]
    assert final["good"].error is None and final["good"].outputs[0].token_ids == expected(request("good", 20))


def test_a_copy_that_fails_is_made_up_for() -> None:
    """A snapshot that is known to the index but was never written: whoever goes on from it writes nonsense."""
    world = make_world(slots=6)
    copy, failures = world.store.copy_slots, [MemoryError("no room to copy")]

    def failing(pairs: list[tuple[int, int]]) -> None:
        if failures:
            raise failures.pop()
        copy(pairs)

    world.store.copy_slots = failing  # type: ignore[method-assign]
    first = world.run(request("a", 200))["a"]
    assert first.error is not None and "no room to copy" in first.error
    expected = make_world(slots=6).run(request("b", 200))["b"]
    assert world.run(request("b", 200))["b"].outputs[0].token_ids == expected.outputs[0].token_ids


@pytest.mark.parametrize("logit", [float("nan"), float("inf"), float("-inf")])
def test_broken_logits_fail_their_request_alone(logit: float) -> None:
    """Guards against tokens drawn from NaN, and against one bad sequence taking its batch with it."""
    world = make_world(model=FakeModel(broken={258: logit}))
    final = world.run(Request("bad", [5, 258], request("x", 1, n=3).params), request("good", 20))
    assert "NaN" in (final["bad"].error or "") and final["bad"].outputs[2].finish_reason == "error"
    assert final["good"].outputs[0].token_ids == expected(request("good", 20))


@pytest.mark.parametrize("budget", [7, 512])
@pytest.mark.parametrize("pages", [5, 200])
def test_prompt_logprobs_are_of_every_row_of_the_prompt(budget: int, pages: int) -> None:
    """Guards against a prefix hit, a chunk border or a preemption that skips rows whose log probabilities are
    wanted."""
    world = make_world(max_num_batched_tokens=budget, pages=pages)
    world.run(request("warm", 130))
    asked = request("a", 130, prompt_logprobs=2, logprobs=1, n=2)
    final = world.run(request("other", 100, start=9, max_tokens=100), asked)["a"]
    assert final.num_cached_tokens == 0 and final.prompt_logprobs is not None
    assert len(final.prompt_logprobs) == 130 and final.prompt_logprobs[0] is None
    for position, entry in enumerate(final.prompt_logprobs[1:]):
        want_V = FakeModel().logits(asked.prompt_ids[: position + 1]).log_softmax(-1)
        assert entry is not None and asked.prompt_ids[position + 1] in entry
        assert list(entry)[:2] == want_V.topk(2).indices.tolist()
        for token, logprob in entry.items():
            assert logprob.logprob == pytest.approx(float(want_V[token]), abs=1e-5)
            assert logprob.rank == int((want_V > want_V[token]).sum()) + 1
    output = final.outputs[0]
    assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
    chosen = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
    assert output.cumulative_logprob == pytest.approx(sum(chosen))


def test_prompt_logprobs_leave_nothing_in_the_prefix_cache() -> None:
    """Guards against pages that no prompt can ever hit, and that evict those that can be."""
    world = make_world(pages=20)
    world.run(request("a", 3 * PAGE_SIZE))
    world.run(request("b", 6 * PAGE_SIZE, start=5, prompt_logprobs=0, n=2))
    assert world.engine.usage.pages_cached == 3
    assert world.run(request("c", 3 * PAGE_SIZE + 1))["c"].num_cached_tokens == 3 * PAGE_SIZE


class Silent(FakeModel):
    """Always the same token, at once."""

    def step(self, batch: Batch, cache: FakeStore, watch: Watch | None = None) -> FakeOutput:
        assert batch.wanted_L is not None
        return FakeOutput(torch.zeros(len(batch.wanted_L), VOCABULARY))


def test_waste_is_small_while_all_run() -> None:
    """Guards against pages that the scheduler reserves before they are needed: 200 requests of 1 to 2048 tokens."""
    randomness = random.Random(0)
    lengths = [randomness.randint(1, 2048) for _ in range(200)]
    world = make_world(
        pages=200 * 2048 // PAGE_SIZE,
        max_num_seqs=200,
        max_num_batched_tokens=200 * 2048,
        max_model_len=2048,
        model=Silent(),
    )
    for name, length in enumerate(lengths):
        answer = min(16, max(1, length - 1))
        world.engine.add(request(str(name), max(1, length - answer), start=name, max_tokens=answer))
    held, places = 0, 0
    while world.engine.has_work:
        world.engine.step()
        held += world.engine.usage.tokens_held
        places += world.engine.usage.pages_in_use * PAGE_SIZE
    assert world.engine.preemptions == 0 and len(lengths) * 16 * 500 < held < places
    assert 1 - held / places < 0.04
    world.check_idle()


def test_a_lost_page_is_noticed() -> None:
    """Guards against an engine that goes on while its cache leaks."""
    world = make_world()
    world.engine.add(request("a", 3, max_tokens=1))
    world.manager._pool.take(1)
    with pytest.raises(AssertionError, match="in use by nobody"):
        world.engine.step()


def test_stops() -> None:
    """Guards against a finish_reason that is always "length", and stop conditions that are ignored or half applied."""
    script = {3: ord("a"), 4: ord("b"), 5: EOS, 6: ord("c"), 7: 256, 8: ord("d")}
    cases = [
        ({}, "ab", [97, 98, EOS], "stop", None),
        ({"ignore_eos": True, "max_tokens": 4}, "abc", [97, 98, EOS, 99], "length", None),
        ({"ignore_eos": True, "stop_token_ids": [256]}, "abc", [97, 98, EOS, 99, 256], "stop", 256),
        ({"ignore_eos": True, "stop": ["zz", "bcst"]}, "a", [97, 98, EOS, 99, 256], "stop", "bcst"),
        ({"ignore_eos": True, "stop": "b", "min_tokens": 2, "max_tokens": 3}, "ab", [97, 98, EOS], "length", None),
        ({"max_tokens": 1}, "a", [97], "length", None),
    ]
    for params, text, tokens, reason, stop_reason in cases:
        world = make_world(model=FakeModel(scripted=script), tokenizer=ByteTokenizer())
        output = world.run(request("a", 3, **params))["a"].outputs[0]
        assert (output.text, output.token_ids) == (text, tokens), params
        assert (output.finish_reason, output.stop_reason) == (reason, stop_reason), params


def test_min_tokens_keeps_the_end_away() -> None:
    """Guards against `min_tokens` that only hides the end instead of choosing another token."""
    world = make_world(model=FakeModel(scripted=dict.fromkeys(range(3, 20), EOS)))
    output = world.run(request("a", 3, min_tokens=4))["a"].outputs[0]
    assert EOS not in output.token_ids[:4] and output.token_ids[4:] == [EOS]


def test_a_stream_only_grows() -> None:
    """Guards against a stream that shows half a character, or the beginning of a stop string that then has to go."""
    text = "hi 🦊 there st"
    script = dict(enumerate([*text.encode(), 256], 3))
    world = make_world(model=FakeModel(scripted=script), tokenizer=ByteTokenizer())
    one = request("a", 3, max_tokens=None, stop=["e stst", " ststop"])
    one.stream = True
    world.engine.add(one)
    seen = [""]
    while world.engine.has_work:
        for output in world.engine.step():
            assert output.outputs[0].text.startswith(seen[-1]) and "\ufffd" not in output.outputs[0].text
            seen.append(output.outputs[0].text)
    assert "hi 🦊" in seen and seen[-1] == "hi 🦊 ther" and len(seen) == len(text.encode()) + 2
    assert output.outputs[0].stop_reason == "e stst"


def test_what_makes_no_sense_is_refused() -> None:
    """Guards against requests that would fail deep in the model, or lack a part in silence."""
    world = make_world()
    bad = [
        Request("a", [], request("x", 1).params),
        Request("a", [VOCABULARY], request("x", 1).params),
        Request("a", [-1], request("x", 1).params),
        request("a", 3, logit_bias={VOCABULARY: 1.0}),
        request("a", 3, stop_token_ids=[1, 999]),
        request("a", 3, logprobs=VOCABULARY + 1),
        request("a", 3, stop="x"),
        request("a", 3, min_tokens=1, stop_token_ids=list(range(VOCABULARY))),
    ]
    for one in bad:
        with pytest.raises(ValueError):
            world.engine.add(one)
    world.engine.add(request("a", 3))
    with pytest.raises(ValueError, match="'a'"):
        world.engine.add(request("a", 3))


def test_a_window_needs_fewer_pages_than_the_prompt() -> None:
    """Guards against refusing a prompt that is longer than the pool while its window fits, and against running out of
    pages on the way."""
    model = FakeModel(window=70)
    world = make_world(pages=4, window=70, max_num_batched_tokens=30, model=model)
    one, two = request("a", 600), request("b", 400, start=3)
    final = world.run(one, two)
    assert final["a"].outputs[0].token_ids == greedy_tokens(one.prompt_ids, 8, model)
    assert final["b"].outputs[0].token_ids == greedy_tokens(two.prompt_ids, 8, model)
    small = make_world(pages=2, window=70, max_num_batched_tokens=30)
    assert "128" in (small.run(request("a", 600))["a"].error or "")
