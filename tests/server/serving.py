"""A server on a real socket, in a thread of this process, whose engine the test can look into."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import uvicorn

from foveal import LLM
from foveal.server.run import configuration, listen
from foveal.server.service import Service, Settings

MODEL = "tiny"
_PATIENCE = 300.0
"""Seconds after which a test gives up: for what hangs, not for what a busy machine delays."""


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    url: str
    service: Service
    llm: LLM
    http: uvicorn.Server

    def drain(self) -> None:
        """As the first signal does."""
        self.http.should_exit = True

    @property
    def answering(self) -> int:
        """How many HTTP requests have begun and are not answered."""
        return len(self.http.server_state.tasks)

    def client(self, **settings: Any) -> openai.OpenAI:
        """OpenAI's own client."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": _PATIENCE} | settings
        )

    def async_client(self, **settings: Any) -> openai.AsyncOpenAI:
        """The same for asyncio."""
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": _PATIENCE} | settings
        )

    def settle(self) -> None:
        """Wait until no request is left; then every page must have been given back."""
        wait_until(lambda: not self.service.worker.unfinished and not self.llm.engine.has_work)
        manager = self.llm.engine._manager
        manager.check()
        usage = manager.usage
        assert usage.pages_in_use == 0
        assert usage.pages_free + usage.pages_cached == usage.pages_total


def wait_until(true: Callable[[], bool]) -> None:
    """Fails where it does not come true."""
    end = time.monotonic() + _PATIENCE
    while not true():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.005)


@contextmanager
def every_token_seen(server: Server) -> Iterator[None]:
    """Steps wait until their outputs so far have been taken by whoever streams them; else a slow reader skips some."""
    worker, step = server.service.worker, server.llm.engine.step

    async def taken() -> None:
        while any(job._news for job, _ in worker._jobs.values()):
            await asyncio.sleep(0.001)

    def patient() -> Any:
        assert worker._loop is not None
        asyncio.run_coroutine_threadsafe(taken(), worker._loop).result(_PATIENCE)
        return step()

    server.llm.engine.step = patient  # type: ignore[method-assign]
    try:
        yield
    finally:
        server.llm.engine.step = step  # type: ignore[method-assign]


@contextmanager
def serving(llm: LLM, **settings: Any) -> Iterator[Server]:
    """Serve `llm` until the block ends."""
    service = Service(llm, Settings(**{"model_name": MODEL} | settings))
    socket = listen("127.0.0.1", 0)
    server = uvicorn.Server(configuration(service))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[socket])), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Server(f"http://127.0.0.1:{socket.getsockname()[1]}", service, llm, server)
    finally:
        server.should_exit = True
        thread.join(_PATIENCE)
        assert not thread.is_alive(), "the server does not end"
