"""Clients that go away, steps that fail, signals: what the server does when things end early."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import openai
import pytest

from foveal import LLM, SamplingParams
from foveal.server import app
from foveal.server.run import configuration

from .serving import MODEL, Server, serving, wait_until

LONG: dict[str, Any] = {"model": MODEL, "prompt": "a", "max_tokens": 400, "temperature": 0.0}


@pytest.fixture
def own(tiny_folder: str) -> Iterator[Server]:
    """A server that a test may break."""
    with serving(LLM(tiny_folder, max_num_seqs=8)) as server:
        yield server


def connect(url: str) -> socket.socket:
    """A bare connection."""
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)))


def head(path: str, body: bytes) -> bytes:
    """What stands before the body."""
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode()


def running(server: Server) -> int:
    """How many sequences hold pages."""
    return server.service.worker.state.running


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_pages(own: Server, path: str, stream: bool) -> None:
    """Guards against answers computed to their end for nobody, which engines have done to those in one piece."""
    steps = slow_steps(own, 0.02)
    body = LONG | {"stream": stream} | ({"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {})
    if "chat" in path:
        del body["prompt"]
    content = json.dumps(body).encode()
    with connect(own.url) as connection:
        connection.sendall(head(f"/v1/{path}", content) + content)
        wait_until(lambda: running(own) == 1)
    wait_until(lambda: not own.service.worker.unfinished)
    gone_at = len(steps)
    own.settle()
    assert len(steps) - gone_at <= 1, "its pages are free within a step"
    assert len(steps) < 300, "it was computed to its end"


def slow_steps(server: Server, seconds: float) -> list[float]:
    """From now on each step takes this much longer; the list grows by one for each."""
    times: list[float] = []
    step = server.llm.engine.step

    def slow() -> Any:
        times.append(time.monotonic())
        time.sleep(seconds)
        return step()

    server.llm.engine.step = slow  # type: ignore[method-assign]
    return times


def test_the_event_loop_does_not_wait_for_steps(own: Server) -> None:
    """Guards health checks and other clients against long steps."""
    begun, go_on = threading.Event(), threading.Event()
    step = own.llm.engine.step

    def long() -> Any:
        begun.set()
        assert go_on.wait(300)
        return step()

    own.llm.engine.step = long  # type: ignore[method-assign]
    with own.client() as client, ThreadPoolExecutor(1) as thread:
        answer = thread.submit(client.completions.create, **LONG | {"max_tokens": 3})
        try:
            assert begun.wait(300)
            assert httpx.get(f"{own.url}/health", timeout=300).status_code == 200
            assert not answer.done()
        finally:
            go_on.set()
        assert answer.result().choices[0].text


def test_a_long_text_is_tokenized_beside_the_others(own: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards clients with short prompts against one who sends a book."""
    begun, go_on = threading.Event(), threading.Event()
    encode = own.llm.tokenizer.encode

    def slow(text: str, **options: Any) -> Any:
        if len(text) > 100_000:
            begun.set()
            assert go_on.wait(300)
        return encode(text[:100], **options)

    monkeypatch.setattr(type(own.llm.tokenizer), "encode", lambda _, text, **options: slow(text, **options))
    with own.client() as client, ThreadPoolExecutor(2) as threads:
        bodies: list[dict[str, Any]] = [
            {"prompt": "a" * 200_000},
            {"messages": [{"role": "user", "content": "a" * 200_000}]},
        ]
        try:
            waiting = [
                threads.submit(client.completions.create, model=MODEL, max_tokens=1, **bodies[0]),
                threads.submit(client.chat.completions.create, model=MODEL, max_tokens=1, **bodies[1]),
            ]
            assert begun.wait(300)
            assert client.completions.create(**LONG | {"max_tokens": 3}).choices[0].text
            assert not any(one.done() for one in waiting)
        finally:
            go_on.set()
        assert all(one.result().choices for one in waiting)


def test_a_step_that_raises_fails_only_its_requests(own: Server) -> None:
    """Guards against one bad batch that takes the server with it, and against errors that tell the client our code."""
    runner = own.llm.engine._runner
    run = runner.run
    expected = own.client().completions.create(**LONG | {"max_tokens": 9}).choices[0].text

    def failing(plan: Any) -> Any:
        if any(chunk.sequence.tokens[0] == 7 for chunk in plan):
            raise RuntimeError("secret detail")
        return run(plan)

    runner.run = failing  # type: ignore[method-assign]
    with own.client() as client:
        with pytest.raises(openai.InternalServerError) as failed:
            client.completions.create(**LONG | {"prompt": [7, 8]})
        assert "secret" not in failed.value.response.text
        with pytest.raises(openai.APIError, match="its log says why"):
            list(client.completions.create(**LONG | {"prompt": [7, 8]}, stream=True))
        own.settle()
        assert client.completions.create(**LONG | {"max_tokens": 9}).choices[0].text == expected
    assert httpx.get(f"{own.url}/health").status_code == 200


class Panic(BaseException):
    """What packages written in Rust raise for their own bugs."""


def test_a_panic_is_an_answer(own: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a request that ends without OpenAI's shape where a tokenizer breaks."""

    def broken(*_: Any, **__: Any) -> Any:
        raise Panic("secret detail")

    with monkeypatch.context() as patch, own.client() as client:
        patch.setattr(type(own.llm.tokenizer), "encode", broken)
        with pytest.raises(openai.InternalServerError) as failed:
            client.completions.create(**LONG)
    assert failed.value.code == "internal_error" and "secret" not in failed.value.response.text
    assert own.client().completions.create(**LONG | {"max_tokens": 2}).choices[0].text


@pytest.mark.parametrize("failure", [AssertionError, Panic])
def test_a_broken_engine_is_not_hidden(own: Server, failure: type[BaseException]) -> None:
    """Guards against clients that wait for ever once the engine's own accounts are wrong."""

    def broken() -> Any:
        raise failure("a page is lost")

    with own.client() as client:
        slow_steps(own, 0.05)
        stream = client.completions.create(**LONG, stream=True)
        next(stream)
        own.llm.engine.step = broken  # type: ignore[method-assign]
        with pytest.raises(openai.APIError):
            list(stream)
        with pytest.raises(openai.InternalServerError):
            client.completions.create(**LONG)
    assert httpx.get(f"{own.url}/health").status_code == 503
    assert httpx.get(f"{own.url}/ready").status_code == 503


def test_a_prompt_that_fits_the_model_but_not_the_cache(tiny_folder: str) -> None:
    """Guards against an assertion, or silence, where a prompt is larger than all pages."""
    llm = LLM(tiny_folder, max_num_seqs=4, kv_cache_memory=3 * 64 * 2 * 32 * 4)
    with serving(llm) as server, server.client() as client:
        assert server.service.max_model_len == 2 * 64
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model=MODEL, prompt="a" * 200, max_tokens=1)
        assert refused.value.code == "context_length_exceeded"
        answers = [None] * 6

        def ask(place: int) -> None:
            answers[place] = client.completions.create(**LONG | {"max_tokens": 100}).choices[0].text  # type: ignore[call-overload]

        threads = [threading.Thread(target=ask, args=[place]) for place in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        want = LLM(tiny_folder).generate("a", SamplingParams(temperature=0.0, max_tokens=100))[0].outputs[0].text
        assert answers == [want] * 6
        server.settle()
        assert server.service.worker.state.preemptions > 0, "the cache was not tight"


def test_metrics(own: Server) -> None:
    """Guards the figures that operators watch."""
    with own.client() as client:
        for _ in range(2):
            client.completions.create(**LONG | {"prompt": "a" * 130, "max_tokens": 10})
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**LONG | {"n": 0})
    own.settle()
    text = httpx.get(f"{own.url}/metrics").text
    for line in (
        "foveal_time_to_first_token_seconds_count 2.0",
        "foveal_time_per_output_token_seconds_count 2.0",
        "foveal_prompt_tokens_total 260.0",
        "foveal_generation_tokens_total 20.0",
        'foveal_requests_total{reason="length"} 2.0',
        'foveal_http_responses_total{route="/v1/completions",status="200"} 2.0',
        'foveal_errors_total{status="400"} 1.0',
        "foveal_prefix_query_tokens_total 260.0",
        "foveal_prefix_hit_tokens_total 128.0",
        "foveal_preemptions_total 0.0",
        "foveal_running_sequences 0.0",
        "foveal_waiting_sequences 0.0",
        "foveal_cache_usage_ratio 0.0",
    ):
        assert line in text.splitlines()


def test_a_body_that_does_not_come(tiny_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a drain that one half-sent request holds up for ever."""
    monkeypatch.setattr(app, "_BODY_SECONDS", 1.0)
    with serving(LLM(tiny_folder, max_num_seqs=8)) as server, connect(server.url) as connection:
        connection.sendall(head("/v1/completions", b"x" * 100) + b"{")
        wait_until(lambda: server.answering == 1)
        server.drain()  # the block ends where the server has
        answer = b"".join(iter(lambda: connection.recv(1000), b""))
    assert b" 408 " in answer and b"in 1 seconds" in answer


def test_idle_connections_outlive_their_clients(own: Server) -> None:
    """Guards against a connection that is closed just as a client takes it up again."""
    expiry = openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry
    assert expiry is not None and configuration(own.service).timeout_keep_alive > expiry


@contextmanager
def process(folder: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`foveal serve` in a process of its own, and its address."""
    code = "from foveal.cli.main import main; main()"
    command = [sys.executable, "-c", code, "serve", folder, "--served-model-name", MODEL, "--port", "0", *options]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as server:
        assert server.stderr is not None
        line = server.stderr.readline()
        found = json.loads(line) if line.startswith("{") else pytest.fail(line + server.stderr.read())
        try:
            yield server, found["url"].rstrip("/")
        finally:
            server.kill()


def test_the_first_sigterm_drains(tiny_folder: str) -> None:
    """Guards against answers cut off by a restart, and against a server that never ends."""
    with (
        process(tiny_folder) as (server, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        stream = client.completions.create(**LONG, stream=True)
        text = next(stream).choices[0].text
        server.send_signal(signal.SIGTERM)
        text += "".join(event.choices[0].text for event in stream)
        assert len(text) >= 390
        assert server.wait(300) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        assert server.stderr is not None
        assert [json.loads(line)["event"] for line in server.stderr][-2:] == ["draining", "request"]


def test_the_second_sigterm_stops(tiny_folder: str) -> None:
    """Guards against a drain that nobody can end: here a client does not read its stream."""
    with process(tiny_folder) as (server, url):
        body = json.dumps(LONG | {"n": 60, "logprobs": 20, "stream": True}).encode()
        with connect(url) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.sendall(head("/v1/completions", body) + body)
            assert b"200" in connection.recv(100)
            server.send_signal(signal.SIGTERM)
            assert server.stderr is not None
            assert any('"draining"' in line for line in server.stderr)
            time.sleep(0.5)
            assert server.poll() is None, "it does not drain"
            server.send_signal(signal.SIGTERM)
            assert server.wait(300) == 1


def test_killed_and_started_again(tiny_folder: str) -> None:
    """Guards against clients that hang after kill -9, and against a port that stays taken."""
    with (
        process(tiny_folder) as (server, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        expected = client.completions.create(**LONG).choices[0].text
        stream = client.completions.create(**LONG, stream=True)
        next(stream)
        server.kill()
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            list(stream)
        port = url.rpartition(":")[2]
        with process(tiny_folder, "--port", port):
            assert client.completions.create(**LONG).choices[0].text == expected
