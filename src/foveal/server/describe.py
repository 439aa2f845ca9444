"""The OpenAPI schema, where FastAPI by itself would say what is not true: which errors a route answers with, and the
events of streams."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from foveal.server.responses import ChatChunk, ErrorAnswer

_ERRORS = {
    400: "A parameter is wrong or not supported; `param` names it",
    401: "No valid API key",
    404: "Another model",
    408: "The body does not come",
    413: "The body is too large",
    415: "The body is compressed",
    429: "Too many requests wait; see Retry-After",
    500: "The server's own mistake",
    503: "The server is shutting down, or its engine has failed",
}
_BODY = (400, 404, 408, 413, 415, 500)
_COMPUTED = (*_BODY, 429, 503)
_ROUTES = {
    "/v1/completions": _COMPUTED,
    "/v1/chat/completions": _COMPUTED,
    "/v1/models": (),
    "/v1/models/{name}": (404,),
    "/tokenize": _BODY,
    "/detokenize": _BODY,
    "/health": (503,),
    "/ready": (503,),
    "/version": (),
    "/metrics": (),
}
_NOT_OURS = ("HTTPValidationError", "ValidationError")
_PREFIX = "#/components/schemas/"


def describe(app: FastAPI) -> None:
    """Let `app` answer /openapi.json with the truth."""

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _corrected(get_openapi(title=app.title, version=app.version, routes=app.routes))
        return app.openapi_schema

    app.openapi = schema  # type: ignore[method-assign]


def _corrected(schema: dict[str, Any]) -> dict[str, Any]:
    schemas = schema["components"]["schemas"]
    more = models_json_schema(
        [(ErrorAnswer, "serialization"), (ChatChunk, "serialization")], ref_template=_PREFIX + "{model}"
    )
    schemas |= more[1]["$defs"]
    for name in _NOT_OURS:
        schemas.pop(name, None)
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            responses = operation["responses"]
            responses.pop("422", None)  # FastAPI's own shape of errors, which is never sent
            locked = (401,) if operation.get("security") else ()
            for status in sorted((*_ROUTES[path], *locked)):
                responses[str(status)] = _error(status)
    return schema


def _error(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"{_PREFIX}{ErrorAnswer.__name__}"}}}
    return {"description": _ERRORS[status], "content": content}
