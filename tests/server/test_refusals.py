"""What the server refuses, how it says so, and what it never says."""

import gzip
import json
import logging
import re
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params

from foveal import LLM
from foveal.server.requests import ChatRequest, CompletionRequest

from .serving import MODEL, Server, serving

KEY, OTHER_KEY = "sk-first-secret", "sk-second-secret"


@pytest.fixture(scope="module")
def locked(tiny_folder: str) -> Any:
    """A server with two keys, few seats and a short queue."""
    llm = LLM(tiny_folder, max_num_seqs=2)
    with serving(llm, api_keys=(KEY, OTHER_KEY), max_num_seqs=2, max_queued_requests=1) as server:
        yield server


def post(server: Server, path: str, body: Any, **headers: str) -> httpx.Response:
    """A JSON body, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | headers
    return httpx.post(f"{server.url}{path}", content=content, headers=headers, timeout=300)


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error, which has OpenAI's shape and nothing else."""
    assert answer.status_code == status, answer.text[:2000]
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text and "pydantic" not in answer.text
    return dict(body["error"])


COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "a", "max_tokens": 2}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        ("completions", {"suffix": "x"}, "suffix"),
        ("completions", {"best_of": 3}, "best_of"),
        ("completions", {"nonsense": 1}, "nonsense"),
        ("completions", {"temperature": "1"}, "temperature"),
        ("completions", {"temperature": -1}, "temperature"),
        ("completions", {"temperature": True}, "temperature"),
        ("completions", {"n": 0}, "n"),
        ("completions", {"top_p": 0}, "top_p"),
        ("completions", {"max_tokens": 0}, "max_tokens"),
        ("completions", {"max_tokens": 2.5}, "max_tokens"),
        ("completions", {"max_tokens": 512}, "max_tokens"),
        ("completions", {"min_tokens": 3}, "min_tokens"),
        ("completions", {"logprobs": 21}, "logprobs"),
        ("completions", {"logit_bias": {"a": 1}}, "logit_bias.a"),
        ("completions", {"logit_bias": {"9999": 1}}, "logit_bias"),
        ("completions", {"logit_bias": {"1": 1, "01": 2}}, "logit_bias.01"),
        ("completions", {"repetition_penalty": 1e-300}, "repetition_penalty"),
        ("completions", {"min_tokens": 1, "stop_token_ids": list(range(256)), "ignore_eos": True}, "stop_token_ids"),
        ("completions", {"logit_bias": {"1": 101}}, "logit_bias.1"),
        ("completions", {"stop": ["ok", ""]}, "stop[1]"),
        ("completions", {"stop": ["x"] * 17}, "stop"),
        ("completions", {"stop_token_ids": [10**6]}, "stop_token_ids"),
        ("completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("completions", {"seed": 2**63}, "seed"),
        ("completions", {"cache_salt": ""}, "cache_salt"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": ["a", ""]}, "prompt"),
        ("completions", {"prompt": ["a"] * 400}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [[]]}, "prompt[0]"),
        ("completions", {"prompt": [1, "a"]}, "prompt[1]"),
        ("completions", {"prompt": [[1], []]}, "prompt[1]"),
        ("completions", {"prompt": [256]}, "prompt"),
        ("completions", {"prompt": "a" * 512}, "prompt"),
        ("completions", {"prompt": None}, "prompt"),
        ("chat/completions", {"audio": {"voice": "x"}}, "audio"),
        ("chat/completions", {"store": True}, "store"),
        ("chat/completions", {"top_logprobs": 3}, "top_logprobs"),
        ("chat/completions", {"max_completion_tokens": 3}, "max_tokens"),
        ("chat/completions", {"max_completion_tokens": 600, "max_tokens": None}, "max_completion_tokens"),
        ("chat/completions", {"min_tokens": 600, "max_tokens": None}, "min_tokens"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a" * 600}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a", "name": "Ann"}]}, "messages[0].name"),
        (
            "chat/completions",
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
                    },
                    {"role": "tool", "tool_call_id": "1", "name": "f", "content": "x"},
                ]
            },
            "messages[0].tool_calls",
        ),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "narrator", "content": "x"}]}, "messages[0].role"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        ("chat/completions", {"messages": [{"role": "user", "content": "x", "tone": 1}]}, "messages[0].tone"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(tiny: Server, path: str, change: dict[str, Any], param: str) -> None:
    """Guards against parameters that are accepted and ignored, and against errors that do not say which one it is."""
    error = error_of(post(tiny, f"/v1/{path}", (CHAT if path.startswith("chat") else COMPLETION) | change), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param and param.split("[")[0] in error["message"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": [1.5]}, "prompt[0]: must be of the type string or integer or array"),
        ({"prompt": []}, "prompt: List should have at least 1 item"),
        ({"prompt": ["a", 1]}, "prompt[1]: must be of the type string"),
        ({"stop": ["x"] * 17}, "stop: List should have at most 16 items"),
        ({"temperature": "1"}, "temperature: must be of the type number"),
        ({"suffix": "x"}, "suffix is not supported"),
        ({"best_of": 2}, "best_of: only 1 is supported"),
    ],
)
def test_messages_say_what_is_wrong(tiny: Server, change: dict[str, Any], words: str) -> None:
    """Guards against messages about a type that the client has not meant."""
    assert error_of(post(tiny, "/v1/completions", COMPLETION | change), 400)["message"].startswith(words)


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("completions", COMPLETION, CompletionRequest),
        ("chat/completions", CHAT, ChatRequest),
        ("completions", COMPLETION, completion_create_params.CompletionCreateParamsBase),
        ("chat/completions", CHAT, chat_params.CompletionCreateParamsBase),
    ],
)
def test_null_is_always_the_default(tiny: Server, path: str, body: dict[str, Any], kind: type) -> None:
    """Guards clients that write all their fields; and a parameter of OpenAI's that the server has never heard of."""
    fields = getattr(kind, "model_fields", None) or kind.__annotations__
    names = set(fields) - {"model", "messages", "prompt"}
    answer = post(tiny, f"/v1/{path}", dict.fromkeys(names) | body)
    assert answer.status_code == 200, answer.text


def test_a_length_of_null_is_openais_default(tiny: Server) -> None:
    """Guards against a completion that fills the whole context because a client wrote null."""
    answer = post(tiny, "/v1/completions", COMPLETION | {"max_tokens": None})
    assert answer.json()["usage"]["completion_tokens"] == 16


def test_neutral_values_are_no_mistake(tiny: Server) -> None:
    """Guards against refusing what asks for nothing: the defaults that clients send along."""
    assert post(tiny, "/v1/completions", COMPLETION | {"best_of": 1}).status_code == 200
    neutral = {"store": False, "service_tier": "auto", "modalities": ["text"], "tool_choice": "none"}
    assert post(tiny, "/v1/chat/completions", CHAT | neutral).status_code == 200


UNSUPPORTED: dict[str, Any] = {
    "audio": {"voice": "x", "format": "wav"},
    "function_call": "auto",
    "functions": [],
    "metadata": {"a": "b"},
    "modalities": ["audio"],
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_key": "x",
    "reasoning_effort": "low",
    "safety_identifier": "x",
    "service_tier": "flex",
    "store": True,
    "verbosity": "low",
    "web_search_options": {},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_openai_has_and_this_server_has_not(tiny: Server, name: str) -> None:
    """Guards against parameters of the official client that do nothing here."""
    error = error_of(post(tiny, "/v1/chat/completions", CHAT | {name: UNSUPPORTED[name]}), 400)
    assert error["param"].startswith(name) and "support" in error["message"]


def test_compressed_bodies(tiny: Server) -> None:
    """Guards against an error that does not say what is wrong with the body."""
    body = gzip.compress(json.dumps(COMPLETION).encode())
    error = error_of(post(tiny, "/v1/completions", body, **{"content-encoding": "gzip"}), 415)
    assert error["message"].startswith("content-encoding")


def test_only_what_was_asked_for_is_sent(tiny: Server) -> None:
    """Guards clients that know OpenAI's fields alone, and the size of streams."""
    for path, body in (("completions", COMPLETION), ("chat/completions", CHAT)):
        for stream in (False, True):
            text = post(tiny, f"/v1/{path}", body | {"stream": stream}).text
            assert "foveal" not in text and "prompt_logprobs" not in text and "reasoning_content" not in text
            assert '"finish_reason":"length"' in text and '"logprobs":null' in text


def test_other_methods_and_routes(tiny: Server) -> None:
    """Guards monitors, which send HEAD, and an error that names the route which is not there."""
    for path in ("/health", "/", "/v1/models"):
        head, get = httpx.head(f"{tiny.url}{path}"), httpx.get(f"{tiny.url}{path}")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == get.headers["content-length"]
    assert "GET /v1/completions" in error_of(httpx.get(f"{tiny.url}/v1/completions"), 405)["message"]
    assert "POST /v1/embeddings" in error_of(post(tiny, "/v1/embeddings", {}), 404)["message"]


BROKEN: list[bytes] = [
    b"",
    b"{",
    b"\xff\xfe",
    b'{"model": "\xc3("}',
    b"null",
    b"[]",
    b'"text"',
    b"NaN",
    b"[" * 100_000,
    b'{"model": ' * 50_000,
    b"1" * 10_000,
    json.dumps(COMPLETION | {"prompt": "\ud800"}).encode(),
    json.dumps(COMPLETION | {"temperature": float("nan")}).encode(),
    json.dumps(COMPLETION | {"\ud800": 1}).encode(),
    json.dumps(COMPLETION | {"seed": 10**400}).encode(),
    json.dumps(CHAT | {"messages": [{"role": "user", "content": "\ud83d"}]}).encode(),
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_bodies_that_are_no_request(tiny: Server, path: str) -> None:
    """Guards against a 500 for bodies that no client should send."""
    for body in BROKEN:
        error_of(post(tiny, path, body), 400)


def test_only_json_is_taken(tiny: Server) -> None:
    """Guards against other sites' forms: a browser sends text/plain anywhere without asking first."""
    error_of(post(tiny, "/v1/completions", COMPLETION, **{"content-type": "text/plain"}), 400)


def test_a_large_body_is_not_read(tiny: Server) -> None:
    """Guards the server's memory, with a length that is announced and with one that is not."""
    large = b" " * (tiny.service.max_body_bytes + 1)
    error_of(post(tiny, "/v1/completions", large), 413)
    pieces = (large[:100_000] for _ in range(len(large) // 100_000 + 1))
    answer = httpx.post(f"{tiny.url}/v1/completions", content=pieces, headers={"content-type": "application/json"})
    error_of(answer, 413)


def test_unknown_places(tiny: Server) -> None:
    """Guards the shape of errors that no endpoint makes: another model, no such route, no such method."""
    for model in ("gpt-9", "", "\udfff"):
        assert error_of(post(tiny, "/v1/completions", COMPLETION | {"model": model}), 404)["param"] == "model"
    error_of(post(tiny, "/v1/embeddings", {}), 404)
    error_of(httpx.get(f"{tiny.url}/v1/completions"), 405)


def test_without_a_template_chat_is_refused(tiny: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a 500 from models that are no chat models, and from templates that refuse a conversation."""
    monkeypatch.setattr(tiny.service._tokenizer, "chat_template", None)
    assert error_of(post(tiny, "/v1/chat/completions", CHAT), 400)["param"] == "messages"
    monkeypatch.setattr(tiny.service._tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    assert "roles must alternate" in error_of(post(tiny, "/v1/chat/completions", CHAT), 400)["message"]


def test_keys(locked: Server) -> None:
    """Guards the locked routes, by every key, and the open ones; and that a body is not read before the key."""
    for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": "Bearer"}):
        answer = post(locked, "/v1/completions", b"{", **given)
        assert error_of(answer, 401)["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/models", "/tokenize", "/nowhere"):
        error_of(httpx.get(f"{locked.url}{path}"), 401)
    for key in (KEY, OTHER_KEY):
        assert locked.client(api_key=key).models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.AuthenticationError):
        locked.client(api_key="sk-third").models.list()
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert httpx.get(f"{locked.url}{path}").status_code == 200


def test_keys_do_not_share_prefixes(locked: Server) -> None:
    """Guards against one tenant learning from the time of an answer what another has asked."""
    cached = []
    for key in (KEY, KEY, OTHER_KEY):
        with locked.client(api_key=key) as client:
            usage = client.completions.create(model=MODEL, prompt="b" * 200, max_tokens=1).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, 192, 0]


def test_a_full_queue(locked: Server) -> None:
    """Guards against requests that pile up, and against one that can never be taken."""
    client = locked.client(api_key=KEY)
    streams = [client.completions.create(model=MODEL, prompt="a", max_tokens=400, stream=True) for _ in range(3)]
    with pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(model=MODEL, prompt="a", max_tokens=2)
    assert int(refused.value.response.headers["retry-after"]) >= 1
    for stream in streams:
        stream.close()
    locked.settle()
    assert client.completions.create(model=MODEL, prompt="a", max_tokens=2).choices[0].text
    with pytest.raises(openai.BadRequestError) as too_many:
        client.completions.create(model=MODEL, prompt="a", n=4)
    assert too_many.value.param == "n"


def test_logs_have_neither_keys_nor_prompts(locked: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Guards the log: a line a request, with its id, and nothing of what was said."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="foveal")
    secret = "the-secret-prompt"
    body = COMPLETION | {"prompt": secret, "user": "u-1"}
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": "my-id.1"}
    assert post(locked, f"/v1/completions?q={secret}", body, **headers).headers["x-request-id"] == "my-id.1"
    answer = post(locked, "/v1/completions", body | {secret: secret, "model": 3}, **headers | {"x-request-id": "a b"})
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
    post(locked, "/v1/completions", body, authorization=f"Bearer {KEY}x")
    logged = [vars(record) for record in caplog.records if record.name.startswith(("foveal", "uvicorn"))]
    assert secret not in str(logged) and KEY not in str(logged)
    fields = [entry["fields"] for entry in logged if "fields" in entry]
    assert [entry["status"] for entry in fields] == [200, 400, 401]
    assert (
        fields[0]["request"] == "my-id.1" and fields[0]["user"] == "u-1" and fields[0]["prompt_tokens"] == len(secret)
    )
