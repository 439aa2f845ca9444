"""The engine in a thread of its own.

The event loop never waits for a step: it leaves commands in a queue that the thread empties before every step, and the
thread hands outputs back to the loop. The engine is touched by its thread alone; jobs belong to the loop alone.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from foveal.cache import CacheUsage
from foveal.engine import Engine, Request, RequestOutput
from foveal.server.errors import ApiError, internal_error

_logger = logging.getLogger(__name__)

_Command = Callable[[], None]
_RETRY_SECONDS = 1


@dataclass(frozen=True)
class EngineState:
    """What the engine was doing after its latest step."""

    running: int
    waiting: int
    preemptions: int
    usage: CacheUsage


class Observer(Protocol):
    """Who wants to know how long requests take; called in the engine's thread."""

    def first_token(self, seconds: float) -> None:
        """A request has its first token, so long after it was handed in."""

    def finished(self, output: RequestOutput, seconds: float, decode_seconds: float) -> None:
        """A request has ended, so long after it was handed in and after its first token."""


@dataclass
class _Timing:
    start: float
    first: float | None = None


@dataclass(eq=False)
class Job:
    """Some requests of one client, until all are finished or `close` gives them up. Belongs to the event loop."""

    worker: "Worker"
    requests: Sequence[Request]
    stream: bool
    _open: set[str] = field(init=False)
    _news: dict[str, RequestOutput] = field(default_factory=dict)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _error: ApiError | None = None

    def __post_init__(self) -> None:
        self._open = {request.id for request in self.requests}

    async def updates(self) -> AsyncIterator[RequestOutput]:
        """The requests' latest outputs as they come: each says all so far, so that a slow reader skips some.

        Without `stream` only the finished ones come. Raises ApiError where the engine failed.
        """
        while self._open or self._news:
            await self._arrived.wait()
            self._arrived.clear()
            news, self._news = self._news, {}
            for output in news.values():
                if output.error is not None:
                    raise _error_of(output.error)
                yield output
            if self._error is not None:
                raise self._error

    async def results(self) -> list[RequestOutput]:
        """The finished outputs, in the order of the requests. Raises ApiError where the engine failed."""
        final = {output.request_id: output async for output in self.updates() if output.finished}
        return [final[request.id] for request in self.requests]

    def close(self) -> None:
        """Give up what is not finished: its pages are free before the next step. Closing twice does no harm."""
        for request_id in list(self._open):
            self.worker.abort(request_id)
        self._open.clear()

    def take(self, output: RequestOutput) -> None:
        """One of the requests has an output."""
        self._news[output.request_id] = output
        if output.finished:
            self._open.discard(output.request_id)
        self._arrived.set()

    def fail(self, error: ApiError) -> None:
        """No output will come."""
        self._error = error
        self._open.clear()
        self._arrived.set()


def _error_of(message: str) -> ApiError:
    """A form that no text can have is the client's mistake, although it is found out late."""
    return ApiError(400, message, code="guidance_failed") if message.startswith("guidance") else internal_error()


class Worker:
    """Runs `engine` in a thread and gives its requests a way in and out.

    At most `max_sequences` completions may be unfinished at a time; what is beyond them is refused. `on_death` is
    called in the event loop where the engine itself has failed, after which nothing can be computed any more.
    """

    def __init__(self, engine: Engine, *, max_sequences: int, observer: Observer) -> None:
        self.on_death: Callable[[], None] = lambda: None
        self.failed = False
        """Whether the engine itself is broken."""
        self.state = EngineState(0, 0, 0, engine.usage)
        """Replaced after every step."""
        self._engine = engine
        self._max_sequences = max_sequences
        self._observer = observer
        self._commands = queue.SimpleQueue[_Command | None]()
        self._timings: dict[str, _Timing] = {}
        self._thread = threading.Thread(target=self._run, name="foveal-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._jobs: dict[str, tuple[Job, int]] = {}
        """By request, with how many completions it has."""
        self._draining = False

    # In the event loop.

    def start(self) -> None:
        """Begin to work for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests can be computed."""
        return self._thread.is_alive() and not self.failed

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self.alive and not self._draining

    @property
    def unfinished(self) -> int:
        """Completions that run or wait."""
        return sum(count for _, count in self._jobs.values())

    def submit(self, requests: Sequence[Request], *, stream: bool) -> Job:
        """Hand in requests whose ids are new. The caller must `close` the job.

        Raises ApiError: 400 for what the engine refuses, 429 where too many requests wait, 503 while draining.
        """
        if not self.ready:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=_RETRY_SECONDS)
        asked = sum(request.params.n for request in requests)
        if asked > self._max_sequences:
            param = "n" if requests[0].params.n > 1 else "prompt"
            raise ApiError(
                400, f"{param}: {asked} completions in one request; at most {self._max_sequences} fit", param=param
            )
        if asked + self.unfinished > self._max_sequences:
            raise ApiError(429, "too many requests are waiting", code="queue_full", retry_after=_RETRY_SECONDS)
        job = Job(self, requests, stream)
        for request in requests:
            request.stream = True  # for the times; the job gets only what it wants
            self._jobs[request.id] = job, request.params.n
            self._commands.put(partial(self._add, request))
        return job

    def abort(self, request_id: str) -> None:
        """End a request; nobody waits for it any more."""
        self._jobs.pop(request_id, None)
        self._commands.put(partial(self._abort, request_id))

    def drain(self) -> None:
        """Refuse new requests from now on; those that are here are finished."""
        self._draining = True

    def stop(self) -> None:
        """End the thread after its present step, and wait for that."""
        self._commands.put(None)
        self._thread.join()

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            if output.request_id not in self._jobs:
                continue
            job, _ = self._jobs[output.request_id]
            if output.finished:
                del self._jobs[output.request_id]
            if output.finished or job.stream:
                job.take(output)

    def _die(self) -> None:
        self.failed = True
        for job, _ in self._jobs.values():
            job.fail(internal_error())
        self._jobs.clear()
        self.on_death()

    # In the engine's thread.

    def _run(self) -> None:
        try:
            while self._obey():
                if self._engine.has_work:
                    self._step()
        except BaseException:
            # A step that fails is the engine's to handle. Here its own accounts are wrong: no result can be trusted.
            _logger.exception("the engine failed")
            self._in_loop(self._die)

    def _obey(self) -> bool:
        """Carry out all commands, waiting for one where there is nothing else to do; False: stop."""
        wait = not self._engine.has_work
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _add(self, request: Request) -> None:
        self._timings[request.id] = _Timing(time.monotonic())
        self._engine.add(request)

    def _abort(self, request_id: str) -> None:
        output = self._engine.abort(request_id)
        if output is not None:
            self._observe(output)
        self._note_state()

    def _step(self) -> None:
        outputs = self._engine.step()
        for output in outputs:
            self._observe(output)
        self._note_state()
        if outputs:
            self._in_loop(partial(self._deliver, outputs))

    def _note_state(self) -> None:
        engine = self._engine
        self.state = EngineState(engine.running, engine.waiting, engine.preemptions, engine.usage)

    def _observe(self, output: RequestOutput) -> None:
        now = time.monotonic()
        timing = self._timings[output.request_id]
        if timing.first is None and any(choice.token_ids for choice in output.outputs):
            timing.first = now
            self._observer.first_token(now - timing.start)
        if output.finished:
            del self._timings[output.request_id]
            first = now if timing.first is None else timing.first
            self._observer.finished(output, now - timing.start, now - first)

    def _in_loop(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(call)
