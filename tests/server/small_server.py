"""A server of a few lines for the page: real engine output in the shape of the chat endpoint's stream, one request at a
time."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from foveal import LLM, SamplingParams
from foveal.server import web
from foveal.server.look import LookSource


def small_app(llm: LLM, key: str | None = None) -> FastAPI:
    """`key`: what /v1 asks for."""
    app = FastAPI()
    app.include_router(web.router)
    tokenizer = llm.tokenizer

    def token_bytes(token: int) -> bytes:
        return str(tokenizer.decode([token], skip_special_tokens=False)).encode()

    source = LookSource(llm.layer_sights, token_bytes, tokenizer.all_special_ids, llm.cache_bytes)

    def refused(http: Request) -> Response | None:
        if key is None or http.headers.get("authorization") == f"Bearer {key}":
            return None
        return JSONResponse({"error": {"message": "no valid API key"}}, 401)

    @app.get("/v1/models")
    def models(http: Request) -> Response:
        return refused(http) or JSONResponse({"data": [{"id": "tiny"}]})

    @app.post("/v1/chat/completions")
    def chat(http: Request, body: dict[str, Any]) -> Response:
        if body["max_tokens"] > 4000:
            return JSONResponse({"error": {"message": "max_tokens is too large"}}, 400)
        return refused(http) or StreamingResponse(events(body), media_type="text/event-stream")

    def events(body: dict[str, Any]) -> Iterator[str]:
        looking = body.get("foveal", {}).get("selection", False)
        params = SamplingParams(
            max_tokens=body["max_tokens"], temperature=body["temperature"], seed=1, selection=looking, ignore_eos=True
        )
        looks, told, text = source.choice(), 0, ""
        for output in llm.stream(llm.chat_prompt(body["messages"]), params):
            (one,) = output.outputs
            choice: dict[str, Any] = {"index": 0, "delta": {"content": one.text[len(text) :]}}
            choice["finish_reason"] = one.finish_reason
            event: dict[str, Any] = {"choices": [choice]}
            if looking:
                assert one.selection is not None
                if not told:
                    event["foveal"] = source.request(output.prompt_token_ids).model_dump()
                choice["foveal"] = looks.add(one.token_ids[told:], one.selection[told:]).model_dump()
            told, text = len(one.token_ids), one.text
            yield f"data: {json.dumps(event)}\n\n"
        yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': told}})}\n\ndata: [DONE]\n\n"

    return app


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The app's address, while it is served from a thread."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        for _ in range(200):
            if server.started:
                break
            time.sleep(0.05)
        assert server.started, "the server does not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
