"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_LONGEST_MESSAGE = 500
_ENGINE_NAMES = {
    "prompt_token_ids": "prompt",
    "json_schema": "response_format",
    "regex": "structured_outputs",
    "grammar": "structured_outputs",
}
_WORDS = {
    "False": "false",
    "bool": "boolean",
    "dict": "object",
    "float": "number",
    "int": "integer",
    "list": "array",
    "model": "object",
    "model_attributes": "object",
}
"""JSON's words for Python's."""
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "overloaded_error"}


class ApiError(HTTPException):
    """An answer that says what is wrong. `param` names the parameter at fault; `retry_after` is in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(status, message, {} if retry_after is None else {"retry-after": str(retry_after)})
        self.param = param
        self.code = code

    def content(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = _KINDS.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.content(), self.status_code, self.headers)


def internal_error() -> ApiError:
    """For our own bugs: what went wrong stands in the log and not in the answer."""
    return ApiError(500, "the server failed while answering this request; its log says why", code="internal_error")


def bad_value(
    error: Exception,
    known: Sequence[str],
    otherwise: str | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
) -> ApiError:
    """The engine's refusal as a 400. Its messages begin with the name of what is wrong: a parameter that is among
    `known` or a part of it (`tools[0].type`), or what the engine calls one; else it is that of `otherwise`. `names`:
    what this endpoint calls parameters of another."""
    message = ascii(str(error))[1:-1][:_LONGEST_MESSAGE]
    found = re.match(r"(\w*)([\w.\[\]]*)", message)
    head, part = found.groups() if found else ("", "")
    name = _ENGINE_NAMES.get(head, head)
    name = names.get(name, name)
    if name in known:
        return ApiError(400, message, param=name + part if name == head else name)
    return ApiError(400, f"{otherwise}: {message}" if otherwise else message, param=otherwise)


def install(app: FastAPI) -> None:
    """Answer every error of `app` in this shape."""

    @app.exception_handler(RequestValidationError)
    async def _validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return _first_of(error.errors(), error.body).response()

    @app.exception_handler(HTTPException)
    async def _http(http: Request, error: HTTPException) -> JSONResponse:
        if not isinstance(error, ApiError):  # Starlette's own
            headers, error = error.headers, ApiError(error.status_code, _words_of(error, http))
            error.headers = headers
        return error.response()


def _words_of(error: HTTPException, http: Request) -> str:
    what = ascii(f"{http.method} {http.url.path}")[1:-1][:200]
    known = {404: f"there is no {what} here", 405: f"{what} is not allowed here"}
    return known.get(error.status_code, str(error.detail))


def _first_of(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """One error, of a value with several possible types that whose type came closest: never what was sent, only where
    it is and what is wrong with it."""
    error = max(errors, key=lambda one: _closeness(one, body))
    if error["type"] == "json_invalid":
        return ApiError(400, "the body is no valid JSON")
    param = _path(error, body) or None
    if error["type"] == "none_required":
        return ApiError(400, f"{param} is not supported", param=param, code="unsupported_parameter")
    if error["type"] == "extra_forbidden":
        return ApiError(
            400, f"{param} is no parameter that this server supports", param=param, code="unknown_parameter"
        )
    if error["type"] == "value_error":  # of a check that concerns several parameters; it names the one at fault first
        reason = str(error["ctx"]["error"])
        place = f"{param}." if param else ""
        return ApiError(400, place + reason, param=place + reason.split()[0], code="invalid_value")
    if param is None:
        return ApiError(400, "the body must be a JSON object, sent as application/json")
    if error["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_parameter")
    return ApiError(400, f"{param}: {_reason(error, errors, body)}", param=param, code="invalid_value")


def _closeness(error: Mapping[str, Any], body: Any) -> tuple[int, int, bool]:
    """How far into the value its check came, and whether its type at least was right."""
    places = re.findall(r"\[(\d+)\]", _path(error, body))
    return len(places), int(places[-1]) if places else 0, not _of_type(error)


def _of_type(error: Mapping[str, Any]) -> bool:
    return str(error["type"]).endswith("_type")


def _reason(error: Mapping[str, Any], errors: Sequence[Mapping[str, Any]], body: Any) -> str:
    """What is wrong, in JSON's words; where no type fits, all that would."""
    if error["type"] == "literal_error":
        return f"only {_WORDS.get(error['ctx']['expected'], error['ctx']['expected'])} is supported"
    if not _of_type(error):
        return str(error["msg"])
    path = _path(error, body)
    kinds = [one["type"].removesuffix("_type") for one in errors if _of_type(one) and _path(one, body) == path]
    return f"must be of the type {' or '.join(dict.fromkeys(_WORDS.get(kind, kind) for kind in kinds))}"


def _path(error: Mapping[str, Any], body: Any) -> str:
    """`messages[0].content`: the error's place in the body, without pydantic's names of the types it tried."""
    path, here = "", body
    for part in error["loc"][1:]:
        if isinstance(here, Mapping) and isinstance(part, str) and (part in here or error["type"] == "missing"):
            # The last part of a missing one is no key; the names of types before it are no keys either.
            if part not in here and part != error["loc"][-1]:
                continue
            path += f".{part}" if path else part
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            path += f"[{part}]"
            here = here[part]
    return path.encode("utf-8", "backslashreplace").decode()[:200]
