"""What happens around every request: its id and log line, the key, the size of its body. Plain ASGI: nothing is
buffered, and a client's disconnect gets through."""

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


class BodyLimit:
    """413 for a body of more than `most` bytes, as soon as that is known."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = ApiError(413, f"the body has more than {self._most} bytes", code="body_too_large")
        announced = Headers(scope=scope).get("content-length", "0")
        if not announced.isdecimal() or int(announced[:20]) > self._most:
            await error.response()(scope, receive, send)
            return
        received = 0

        async def receive_on() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._most:
                raise error
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
