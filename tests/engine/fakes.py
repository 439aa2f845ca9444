"""Doubles: a model whose cache can be read back, and a byte tokenizer."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from foveal.cache import PAGE_SIZE, CacheManager
from foveal.engine.engine import Engine
from foveal.engine.outputs import RequestOutput
from foveal.engine.params import SamplingParams
from foveal.engine.request import Request
from foveal.engine.runner import Runner
from foveal.engine.scheduler import Scheduler
from foveal.nn.batch import Batch
from foveal.nn.watch import Watch

VOCABULARY = 260
EOS = 259
_MODULUS = 2**31 - 1


class FakeStore:
    """Pages hold token ids, slots a running hash and the number of tokens in it."""

    def __init__(self, pages: int, slots: int = 0) -> None:
        self.pages = [[-1] * PAGE_SIZE for _ in range(pages)]
        self.slots = [(-1, -1)] * slots

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, destination in pairs:
            self.pages[destination] = list(self.pages[source])

    def copy_slots(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, destination in pairs:
            self.slots[destination] = self.slots[source]


@dataclass(frozen=True)
class FakeOutput:
    logits_LV: Tensor
    collected: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class FakeModel:
    """Logits are a function of all tokens of the context, as read from the cache: any mistake in pages, slots, chunks
    or forks gives other tokens. `scripted` answers by the number of tokens in the context instead."""

    scripted: dict[int, int] = field(default_factory=dict)
    fail_on: int | None = None
    """Raises when this token is in a batch."""
    failure: type[BaseException] = RuntimeError
    broken: dict[int, float] = field(default_factory=dict)
    """After these tokens every logit is this."""
    window: int = sys.maxsize
    """Tokens that a query sees, itself included."""
    batches: list[Batch] = field(default_factory=list)
    watched: bool = False
    """Whether a step was."""

    def step(self, batch: Batch, cache: FakeStore, watch: Watch | None = None) -> FakeOutput:
        self.batches.append(batch)
        self.watched |= watch is not None
        ids = batch.ids_T.tolist()
        if self.fail_on in ids:
            raise self.failure("the model broke")
        rows = []
        for sequence, (first, last) in enumerate(pairwise(batch.q_offsets)):
            rows += self._sequence(batch, cache, sequence, ids[first:last])
        logits_TV = torch.stack(rows)
        return FakeOutput(logits_TV if batch.wanted_L is None else logits_TV[batch.wanted_L])

    def _sequence(self, batch: Batch, cache: FakeStore, sequence: int, ids: list[int]) -> list[Tensor]:
        assert batch.table_SB is not None
        table = batch.table_SB[sequence].tolist()
        start = batch.k_lengths[sequence] - len(ids)
        state = self._state_in(batch, cache, sequence, start)
        rows = []
        for position, token in enumerate(ids, start):
            assert int(batch.positions_T[batch.q_offsets[sequence] + position - start]) == position
            assert table[position // PAGE_SIZE] != 0, "a token written to the null page"
            cache.pages[table[position // PAGE_SIZE]][position % PAGE_SIZE] = token
            seen = range(max(0, position + 1 - self.window), position + 1)
            context = [cache.pages[table[place // PAGE_SIZE]][place % PAGE_SIZE] for place in seen]
            state = (_extend(state[0], token), position + 1)
            rows.append(self.logits(context))
        if batch.slots is not None:
            assert state == context_state(context), "the state is not that of the context"
            cache.slots[batch.slots.slots_out[sequence]] = state
        return rows

    def _state_in(self, batch: Batch, cache: FakeStore, sequence: int, start: int) -> tuple[int, int]:
        if batch.slots is None:
            return (0, start)
        assert batch.slots.fresh[sequence] == (start == 0)
        return (0, 0) if batch.slots.fresh[sequence] else cache.slots[batch.slots.slots_in[sequence]]

    def logits(self, context: list[int]) -> Tensor:
        if len(context) in self.scripted:
            return 10.0 * torch.nn.functional.one_hot(torch.tensor(self.scripted[len(context)]), VOCABULARY).float()
        if context[-1] in self.broken:
            return torch.full((VOCABULARY,), self.broken[context[-1]])
        generator = torch.Generator().manual_seed(context_state(context)[0])
        logits_V = torch.randn(VOCABULARY, generator=generator)
        logits_V[EOS] = -100.0
        return logits_V


def context_state(context: Sequence[int]) -> tuple[int, int]:
    """What a recurrent layer would know after these tokens."""
    state = 0
    for token in context:
        state = _extend(state, token)
    return state, len(context)


def _extend(state: int, token: int) -> int:
    return (state * 1000003 + token + 1) % _MODULUS


class ByteTokenizer:
    """Token n < 256 is the byte n; 256 is "stop" as one token, EOS is special."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, clean_up_tokenization_spaces: bool = False
    ) -> str:
        words = {EOS: b"" if skip_special_tokens else b"<eos>", 256: b"stop", 257: b"<257>", 258: b"<258>"}
        data = b"".join(words[token] if token > 255 else bytes([token]) for token in token_ids)
        return data.decode(errors="replace")

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize and add_generation_prompt
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"


@dataclass
class World:
    """An engine on fakes, and what it is made of."""

    engine: Engine
    scheduler: Scheduler
    manager: CacheManager
    model: FakeModel
    store: FakeStore

    def run(self, *requests: Request) -> dict[str, RequestOutput]:
        """Add the requests and step until the engine has nothing to do."""
        for request in requests:
            self.engine.add(request)
        final: dict[str, RequestOutput] = {}
        for _ in range(10_000):
            if not self.engine.has_work:
                break
            final |= {output.request_id: output for output in self.engine.step() if output.finished}
        assert not self.engine.has_work, "the engine does not come to an end"
        self.check_idle()
        return final

    def check_idle(self) -> None:
        """Everything was given back."""
        self.manager.check()
        assert self.engine.usage.pages_in_use == 0
        assert not self.scheduler.running and not self.scheduler.waiting


def make_world(
    *,
    pages: int = 200,
    slots: int = 0,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 512,
    max_model_len: int = 1000,
    model: FakeModel | None = None,
    tokenizer: ByteTokenizer | None = None,
    prefix_caching: bool = True,
    window: int | None = None,
    seed: int = 0,
    plain_rope: int | None = None,
) -> World:
    """An engine whose pool holds `pages` pages besides the null page."""
    model = model or FakeModel()
    store = FakeStore(pages + 1, slots)
    manager = CacheManager(pages + 1, slots, prefix_caching=prefix_caching, window=window)
    scheduler = Scheduler(
        manager, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, window=window
    )
    engine = Engine(
        Runner(model, store, manager),
        manager,
        scheduler,
        vocab_size=VOCABULARY,
        max_model_len=max_model_len,
        eos_ids=[EOS],
        tokenizer=tokenizer,
        seed=seed,
        plain_rope=plain_rope,
    )
    return World(engine, scheduler, manager, model, store)


def request(name: str, length: int, *, start: int = 1, **params: Any) -> Request:
    """A greedy request with a prompt of `length` tokens that depends on `start`."""
    ids = [(start * 7 + place * place) % 256 for place in range(length)]
    settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8, **params}
    return Request(name, ids, SamplingParams(**settings))


def greedy_tokens(prompt: Sequence[int], count: int, model: FakeModel | None = None) -> list[int]:
    """What the fake model continues a prompt with, computed without engine or cache."""
    context = list(prompt)
    for _ in range(count):
        model = model or FakeModel()
        context.append(int(model.logits(context[-model.window :]).argmax()))
    return context[len(prompt) :]
