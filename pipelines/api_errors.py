"""Errors in the shape that openai clients read, each with the status and the code that tells them what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from nexusgen.errors import InputError, NexusgenError, SampleError, UsageError
from pipelines.orders import OverloadedError, UnavailableError, UnknownModelError

Responses = dict[int | str, dict[str, Any]]


class ErrorDetail(BaseModel):
    """What went wrong, in the fields that OpenAI's clients read."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer that isn't 2xx, except that of `/health`; in a stream, the last event of one that failed."""

    error: ErrorDetail


class RefusedError(Exception):
    """A request that ends with an error answer."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> ErrorResponse:
        """The answer's body."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return ErrorResponse(error=ErrorDetail(message=str(self), type=kind, param=self.param, code=self.code))

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body().model_dump(), status_code=self.status, headers=self.headers)


MEANINGS = {
    400: "a parameter is unknown, missing or out of range, or a picture can't be read",
    401: "no valid key",
    403: "sent by a page of another site",
    404: "no such model or path",
    405: "no such method",
    408: "the body took too long to arrive",
    413: "the body is larger than the limit",
    415: "the body is of another media type",
    429: "the queue is full; come back after `Retry-After` seconds",
    500: "a fault of the server, whose log says more",
    503: "no model can answer now; come back after `Retry-After` seconds",
    504: "the answer took longer than the server's limit",
}
_KINDS = ("constrained-str", "str")
_TAGS = ("system", "developer", "user", "assistant", "text", "image_url")  # what tells kinds of messages, and parts
_RETRY_AFTER = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}


def documented(*statuses: int) -> Responses:
    """The error answers of a route, as FastAPI writes them into its schema."""
    return {
        status: {
            "model": ErrorResponse,
            "description": MEANINGS[status],
            **({"headers": _RETRY_AFTER} if status in (429, 503) else {}),
        }
        for status in statuses
    }


def broken() -> RefusedError:
    """What a client is told about a fault of ours: nothing of it."""
    return RefusedError(500, "The server failed on this request; its log says why.", code="internal_error")


def too_late(limit_s: float) -> RefusedError:
    """The answer of a request that took longer than it may; clients needn't try again by themselves."""
    message = f"The answer took longer than the server's limit of {limit_s:g} s; ask for fewer pictures or steps."
    return RefusedError(504, message, code="timeout", headers={"x-should-retry": "false"})


def refusal_of(error: NexusgenError) -> RefusedError:
    """What a client is told of an error of the backend's; what isn't the client's fault says nothing of itself."""
    match error:
        case OverloadedError():
            # Whole seconds for everybody; openai's clients read the milliseconds first.
            after = {
                "Retry-After": str(max(1, math.ceil(error.retry_after_s))),
                "retry-after-ms": str(max(1, round(1000 * error.retry_after_s))),
            }
            return RefusedError(429, str(error), code="overloaded", headers=after)
        case UnavailableError():
            return RefusedError(503, str(error), code="unavailable", headers={"Retry-After": "1"})
        case UnknownModelError():
            return RefusedError(404, str(error), param="model", code="model_not_found")
        case SampleError():
            return RefusedError(400, f"Invalid image: {error.reason}.", code=error.reason_code)
        case InputError() | UsageError():
            return RefusedError(400, str(error), code="invalid_value")
        case _:
            return broken()


def refusal_of_validation(details: list[Any]) -> RefusedError:
    """The first of pydantic's complaints, by the parameter's name."""
    detail = _deepest(details)
    param = _name(detail["loc"]) or None
    match detail["type"]:
        case "extra_forbidden":
            message, code = f"Unknown parameter: {param!r}.", "unknown_parameter"
        case "missing":
            what = f"Missing required parameter: {param!r}." if param else "The request has no body."
            message, code = what, "missing_required_parameter"
        case "json_invalid":
            return RefusedError(400, "The body is not valid JSON.", code="invalid_json")
        case "string_too_long":
            message = f"Invalid {param!r}: longer than {detail['ctx']['max_length']} characters."
            code = "string_above_max_length"
        case "string_unicode":
            message = f"Invalid {param!r}: it holds half of a surrogate pair, which isn't valid Unicode."
            code = "invalid_value"
        case _ if param is None:
            message, code = "The body must be a JSON object, sent as application/json.", "invalid_type"
        case _:
            message, code = f"Invalid {param!r}: {detail['msg']}.", "invalid_value"
    return RefusedError(400, message, param, code)


def _deepest(details: list[Any]) -> Any:
    """Of a value that may be of several kinds pydantic says what is wrong with it as each: the one that it came
    nearest to."""
    first = details[0]
    place = _parts(first["loc"])
    return max((d for d in details if _parts(d["loc"])[: len(place)] == place), key=lambda d: len(_parts(d["loc"])))


def _parts(location: tuple[int | str, ...]) -> list[int | str]:
    """A place in the body, without the names that pydantic gives to the kinds of a value."""
    parts: list[int | str] = []
    for part in location[1:]:
        is_kind = isinstance(part, str) and ("[" in part or part in _KINDS)
        is_tag = part in _TAGS and bool(parts) and isinstance(parts[-1], int)
        if not (is_kind or is_tag):
            parts.append(part)
    return parts


def _name(location: tuple[int | str, ...]) -> str:
    """`messages[0].content`: a place in the body as OpenAI writes it."""
    text = ""
    for part in _parts(location):
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text[:200]
