"""What happens around every request: its id and log line, the key, the size of its body. Plain ASGI: nothing is
buffered, and a client's disconnect gets through."""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Collection, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foveal.server.errors import ApiError, internal_error
from foveal.server.metrics import Metrics

_logger = logging.getLogger("foveal.server")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestLog:
    """Gives every request an id (the client's X-Request-Id, if it is a sane one), returns it as a header, and writes
    one line at the end. An error that nobody caught becomes a 500, with its traceback in the log only."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["log"] = {}
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except Exception:
            _logger.exception("request failed", extra={"fields": {"request": request_id}})
            if not status:
                await internal_error().response()(scope, receive, send_on)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.answered(route, status)
            fields = {
                "request": request_id,
                "method": scope["method"],
                "route": route,
                "status": status,
                "seconds": round(time.monotonic() - start, 4),
                **state["log"],
            }
            _logger.info("request", extra={"fields": fields})


class Keys:
    """401 for every route but the public ones, unless the request has one of the keys as `Authorization: Bearer`.

    Which key it was is the request's tenant: tenants do not share cached prefixes.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], public: Collection[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._public = frozenset(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or not self._digests or scope["path"] in self._public:
            await self._app(scope, receive, send)
            return
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # Every key is compared, in the same time whatever was given.
        matches = [hmac.compare_digest(_digest(given.strip().encode("latin-1")), digest) for digest in self._digests]
        if kind.lower() != "bearer" or not any(matches):
            error = ApiError(401, "this server needs an API key: Authorization: Bearer KEY", code="invalid_api_key")
            error.headers = {"www-authenticate": "Bearer"}
            await error.response()(scope, receive, send)
            return
        scope["state"]["tenant"] = matches.index(True)
        await self._app(scope, receive, send)


class HeadAsGet:
    """HEAD is answered as GET would be, whose body the server then leaves out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        inside = {**scope, "method": "GET"}
        try:
            await self._app(inside, receive, send)
        finally:
            scope["route"] = inside.get("route")  # for the log


class BodyLimit:
    """413 for a body of more than `most` bytes, as soon as that is known; 408 for one that has not come after
    `seconds`, for a shutdown waits for it; 415 for one that is compressed."""

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self._app = app
        self._most = most
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if headers.get("content-encoding", "identity").lower() != "identity":
            error = ApiError(415, "content-encoding: a body must not be compressed", code="unsupported_encoding")
            await error.response()(scope, receive, send)
            return
        too_large = ApiError(413, f"the body has more than {self._most} bytes", code="body_too_large")
        announced = headers.get("content-length", "0")
        if not announced.isdecimal() or int(announced[:20]) > self._most:
            await too_large.response()(scope, receive, send)
            return
        received, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self._seconds

        async def receive_on() -> Message:
            nonlocal received, complete
            if complete:  # from here on it is the client's going away that is waited for
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                slow = ApiError(408, f"the body has not come in {self._seconds:g} seconds", code="body_too_slow")
                slow.headers = {"connection": "close"}
                raise slow from None
            complete = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > self._most:
                raise too_large
            return message

        await self._app(scope, receive_on, send)


class JsonLines(logging.Formatter):
    """A log line is a JSON object: time (seconds since 1970), level, event, and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        line: dict[str, Any] = {"time": round(record.created, 3), "level": record.levelname.lower()}
        line |= {"logger": record.name, "event": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
