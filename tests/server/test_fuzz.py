"""Bodies that no client should send, by the thousand: no 5xx, and nothing left behind."""

import asyncio
import copy
import json
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from foveal import LLM

from .serving import MODEL, Server, serving

_FINE = {200, 400, 404, 413, 429}
_CLIENTS = 16


@pytest.fixture(scope="module")
def server(tiny_folder: str) -> Iterator[Server]:
    """A server with a short context, so that no request takes long."""
    with serving(LLM(tiny_folder, max_num_seqs=16, max_model_len=96), max_num_seqs=16) as server:
        yield server


_SAMPLING: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 4,
    "n": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 1,
    "stop": ["xy", "z"],
    "logit_bias": {"3": 1.5},
    "stream": True,
    "stream_options": {"include_usage": True},
    "top_k": 5,
    "cache_salt": "s",
}
_BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        _SAMPLING | {"prompt": "hello", "logprobs": 2, "echo": True},
        {"model": MODEL, "prompt": [[1, 2, 3], [4]], "max_tokens": 3},
        {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 2, "prompt_logprobs": 1},
    ],
    "/v1/chat/completions": [
        _SAMPLING | {"messages": [{"role": "user", "content": "hello"}], "logprobs": True, "top_logprobs": 2},
        {"model": MODEL, "messages": [{"role": "system", "content": [{"type": "text", "text": "x"}]}], "max_tokens": 3},
    ],
    "/tokenize": [{"prompt": "hello"}, {"messages": [{"role": "user", "content": "hello"}]}],
    "/detokenize": [{"tokens": [1, 2, 3]}],
}
_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "a", "\x00", "\ud800", "é😀", "a" * 5000, [], [[]], [None], [1, "a"], ["a", 1], [-1], [2**40], {}, {"a": {}}),
    *({"type": "text"}, {"include_usage": 3}, [{"role": "tool"}], [{"role": "user", "content": []}], {"0": 1, "x": 2}),
]


def mutated(draw: random.Random) -> tuple[str, bytes]:
    """A route, and a body that was right before something happened to it."""
    path = draw.choice(list(_BODIES))
    body = json.loads(json.dumps(draw.choice(_BODIES[path])))
    for _ in range(draw.randrange(3)):
        _change_a_value(body, draw)
    data = json.dumps(body, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    spoil = draw.choice([_keep, _keep, _keep, _cut, _flip, _insert, _deepen, _repeat])
    return path, spoil(data, draw)


def _change_a_value(body: dict[str, Any], draw: random.Random) -> None:
    here: Any = body
    while True:
        key = draw.choice(list(here) if isinstance(here, dict) else range(len(here)))
        if not (isinstance(here[key], dict | list) and here[key] and draw.random() < 0.6):
            break
        here = here[key]
    kind = draw.randrange(4)
    if kind == 0 and isinstance(here, dict):
        del here[key]
    elif kind == 1 and isinstance(here, dict):
        here[draw.choice(["suffix", "tools", "functions", "", "\ud800", "x" * 300])] = copy.deepcopy(
            draw.choice(_VALUES)
        )
    else:
        here[key] = copy.deepcopy(draw.choice(_VALUES))
    if not body:
        body["model"] = MODEL


def _keep(data: bytes, draw: random.Random) -> bytes:
    return data


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def _flip(data: bytes, draw: random.Random) -> bytes:
    spoiled = bytearray(data)
    for _ in range(draw.randrange(1, 4)):
        spoiled[draw.randrange(len(spoiled))] = draw.randrange(256)
    return bytes(spoiled)


def _insert(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    piece = draw.choice(
        [b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\x00", b"NaN", b"-Infinity", b"1" * 5000, b"\\u0000", b"//"]
    )
    return data[:place] + piece + data[place:]


def _deepen(data: bytes, draw: random.Random) -> bytes:
    depth = draw.choice([50, 500, 50_000])
    opening, closing = draw.choice([(b"[", b"]"), (b'{"a":', b"}")])
    return data[:-1] + b', "deep": ' + opening * depth + b"1" + closing * depth + b"}"


def _repeat(data: bytes, draw: random.Random) -> bytes:
    return data[:-1] + b', "prompt": "' + b"x" * draw.choice([10, 10_000, 1_000_000]) + b'"}'


async def _send_all(server: Server, bodies: list[tuple[str, bytes]]) -> Counter[int]:
    """The statuses that came back; a status that must not be fails with the body that brought it."""
    statuses = Counter[int]()
    waiting = iter(bodies)

    async def client(http: httpx.AsyncClient) -> None:
        for path, body in waiting:
            answer = await http.post(path, content=body, headers={"content-type": "application/json"})
            assert answer.status_code in _FINE, (path, body[:2000], answer.text)
            if answer.status_code != 200:
                assert set(answer.json()) == {"error"}, answer.text
            # A stream has its status before the engine has answered.
            assert "internal_error" not in answer.text, (path, body[:2000], answer.text)
            statuses[answer.status_code] += 1

    async with httpx.AsyncClient(base_url=server.url, timeout=600) as http:
        await asyncio.gather(*[client(http) for _ in range(_CLIENTS)])
    return statuses


def _fuzz(server: Server, count: int) -> None:
    draw = random.Random(0)
    statuses = asyncio.run(_send_all(server, [mutated(draw) for _ in range(count)]))
    assert sum(statuses.values()) == count
    assert statuses[200] > count // 20 and statuses[400] > count // 3, statuses
    _nothing_is_left(server)


def _nothing_is_left(server: Server) -> None:
    server.settle()
    worker, engine = server.service.worker, server.llm.engine
    assert not worker._jobs and not worker._timings and not engine._requests
    assert worker.alive


def test_fuzzed_bodies(server: Server) -> None:
    """Guards against a 500, a hang or a leak for any body."""
    _fuzz(server, 600)


@pytest.mark.slow
def test_ten_thousand_fuzzed_bodies(server: Server) -> None:
    """The same, for longer."""
    _fuzz(server, 10_000)


def _raw(*pieces: bytes) -> Callable[[socket.socket], None]:
    def send(connection: socket.socket) -> None:
        for piece in pieces:
            connection.sendall(piece)

    return send


def test_broken_http(server: Server) -> None:
    """Guards against requests that are no HTTP, or end in the middle: the server lives, and nothing is left."""
    host, port = server.url.removeprefix("http://").split(":")
    post = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    lines = [
        [b"\x16\x03\x01" * 100],
        [b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n\r\n"],
        [post + b"content-length: 1000\r\n\r\n{"],
        [post + b"content-length: -5\r\n\r\n{}"],
        [post + b"content-length: " + b"9" * 30 + b"\r\n\r\n{}"],
        [post + b"content-length: abc\r\n\r\n{}"],
        [post + b"transfer-encoding: chunked\r\n\r\n", b"zz\r\n{"],
        [post + b"transfer-encoding: chunked\r\n\r\n", b"5\r\n{", b"\r\n"],
        [b"POST /v1/completions HTTP/9.9\r\n\r\n"],
    ]
    for pieces in lines:
        with socket.create_connection((host, int(port))) as connection:
            _raw(*pieces)(connection)
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(300)
            answer = connection.recv(1000)
            assert not answer.startswith(b"HTTP/1.1 5"), (pieces, answer)
    _nothing_is_left(server)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_the_schema_has_what_is_sent_and_nothing_else(server: Server) -> None:
    """Guards against errors in FastAPI's own shape, which never come, and events of streams that are not described."""
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert "422" not in json.dumps(schema["paths"]) and "ValidationError" not in json.dumps(schema)
    schemas = schema["components"]["schemas"]
    chunk = schemas["ChatChunk"]["properties"]["choices"]["items"]["$ref"].rpartition("/")[2]
    assert "ChoiceLook" in json.dumps(schemas[chunk]) and "FovealOptions" in json.dumps(schemas["ChatRequest"])
    assert "429" in schema["paths"]["/v1/completions"]["post"]["responses"]
    assert set(schema["paths"]["/v1/models"]["get"]["responses"]) == {"200"}


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_the_server_is_what_its_schema_says(server: Server, mode: schemathesis.GenerationMode) -> None:
    """Guards the OpenAPI description, with data that fits it and data that does not: no 500, no status, type or shape
    of an answer that is not described, and nothing accepted that the schema forbids."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is schemathesis.GenerationMode.NEGATIVE and not operation.body:
            continue  # there is nothing to get wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(excluded_checks=[schemathesis.checks.positive_data_acceptance])

        check()
    _nothing_is_left(server)
