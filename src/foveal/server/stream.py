"""Answers that end when their client goes away: in one piece, or as server-sent events."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from foveal.engine import RequestOutput
from foveal.server.errors import ApiError
from foveal.server.worker import Job

_GONE = 499
"""What the log says of clients that did not wait; nobody gets it."""


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def results(http: HttpRequest, job: Job) -> list[RequestOutput]:
    """The job's outputs. Where the client goes away first the job is given up and ClientGone raised: Starlette itself
    notices that only for streams."""
    work = asyncio.ensure_future(job.results())
    gone = asyncio.ensure_future(_disconnected(http.receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        return work.result()
    finally:
        work.cancel()
        gone.cancel()
        job.close()


def whole(answer: BaseModel) -> Response:
    """An answer in one piece."""
    return Response(answer.model_dump_json(), media_type="application/json")


class EventStream(StreamingResponse):
    """An answer as server-sent events, closed with [DONE]. However it ends, the job is given up."""

    def __init__(self, job: Job, events: AsyncIterator[BaseModel]) -> None:
        # Proxies are not to wait for more before they pass an event on.
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(_lines(events), media_type="text/event-stream", headers=headers)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.close()


async def _lines(events: AsyncIterator[BaseModel]) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield f"data: {event.model_dump_json()}\n\n"
    except ApiError as error:
        # The status is sent already: the error is an event, and no [DONE] follows it.
        yield f"data: {bytes(error.response().body).decode()}\n\n"
        return
    yield "data: [DONE]\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def gone_response() -> Response:
    """For the log only."""
    return JSONResponse(None, _GONE)


def example(schema: type[BaseModel], event: type[BaseModel]) -> dict[str, Any]:
    """`responses[200]` of a route that answers in one piece, or with `stream` as events."""
    text = f"Events, each `data: ` and a {event.__name__} as JSON; the last is `data: [DONE]`."
    return {"model": schema, "content": {"text/event-stream": {"schema": {"type": "string", "description": text}}}}
