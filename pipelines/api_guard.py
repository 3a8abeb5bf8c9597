"""Who stands before the app: ids, keys, counted bodies, headers, clients that leave, and one line of log per request.

    request -> page of another site? key? media type? -> body, counted -> app, until it is done or the client has left

A request that is refused here never reaches the app. The app's task is cancelled when the client leaves, whether its
answer is a stream or not, and so are the iterators that it waits for.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import sys
import time
import traceback
import uuid
from dataclasses import dataclass, field
from typing import Any, TextIO

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.api_errors import RefusedError, broken, refusal_of
from pipelines.api_metrics import Metrics
from pipelines.api_settings import BODY_TIMEOUT_S, GRACE_S, MAX_JSON_BYTES, MAX_PICTURE_BYTES, ApiSettings
from pipelines.orders import OverloadedError, UnavailableError

CHAT_PATH = "/v1/chat/completions"
GENERATIONS_PATH = "/v1/images/generations"
EDITS_PATH = "/v1/images/edits"

_BODY_LIMITS = {CHAT_PATH: MAX_PICTURE_BYTES, EDITS_PATH: MAX_PICTURE_BYTES}
_MEDIA_TYPES = {
    CHAT_PATH: "application/json",
    GENERATIONS_PATH: "application/json",
    EDITS_PATH: "multipart/form-data",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CLIENT_LEFT = 499  # nginx's number; never sent
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
_VISIT = "nexusgen.visit"

logger = logging.getLogger("nexusgen.requests")


def log_requests(stream: TextIO = sys.stderr) -> None:
    """Have this process write its request log, one JSON object per line."""
    if not logger.handlers:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


@dataclass
class Visit:
    """What is known of one request: for its log line, the metrics, and its time limit."""

    request_id: str
    deadline: float  # of the event loop's clock
    arrived: float = field(default_factory=time.monotonic)
    status: int = 0  # 0: no answer has begun
    is_complete: bool = False  # its last byte was handed to the server
    first_event_s: float | None = None
    error: str | None = None
    num_bytes: int = 0
    model: str | None = None
    num_pictures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def seconds(self) -> float:
        """Since its arrival."""
        return time.monotonic() - self.arrived

    def note_event(self) -> None:
        """The model has said something."""
        if self.first_event_s is None:
            self.first_event_s = self.seconds()


def visit_of(request: Request) -> Visit:
    """The record of a request that came through the guard."""
    visit = request.scope[_VISIT]
    assert isinstance(visit, Visit)
    return visit


class _ClientLeftError(Exception):
    pass


class Guard:
    """ASGI middleware: see the module."""

    def __init__(self, app: ASGIApp, settings: ApiSettings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        visit = Visit(request_id, asyncio.get_running_loop().time() + self._settings.request_timeout_s)
        scope[_VISIT] = visit

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            elif not message.get("more_body", False):
                visit.is_complete = True
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._answer(scope, receive, send_noted, visit)
        finally:
            self._metrics.in_flight.dec()
            self._note(scope, visit)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, visit: Visit) -> None:
        try:
            self._check(scope)
            body = await _read_body(scope, receive, visit)
        except RefusedError as refusal:
            visit.error = refusal.code
            await refusal.response()(scope, receive, send)
            return
        except _ClientLeftError:
            return
        try:
            await self._run(scope, body, receive, send, visit)
        except Exception as error:
            visit.error = "internal_error"
            _log_fault(error, visit)
            if not visit.status:
                await broken().response()(scope, receive, send)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send, visit: Visit) -> None:
        """Run the app until it is done; cancel it when the client leaves, or doesn't read what it is sent."""
        has_left = asyncio.Event()
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if messages:
                return messages.pop()
            await has_left.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            has_left.set()

        answering = asyncio.create_task(self._run_app(scope, replay, send))
        watching = asyncio.create_task(watch())
        try:
            limit_s = self._settings.request_timeout_s + GRACE_S
            await asyncio.wait({answering, watching}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if visit.is_complete:  # servers report a client as gone when its answer is complete
                await asyncio.wait({answering}, timeout=GRACE_S)
        finally:
            for task in (answering, watching):
                task.cancel()
            await asyncio.wait({answering, watching})
        if not answering.cancelled():
            answering.result()

    async def _run_app(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        path, headers = scope["path"], Headers(scope=scope)
        is_post = scope["method"] == "POST"
        if is_post and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise RefusedError(403, "Pages of other sites may not use this API from a browser.", code="cross_site")
        if self._keys and (path.startswith("/v1") or path == "/metrics"):
            self._check_key(headers)
        if is_post and path in _MEDIA_TYPES and self._settings.check_room is not None:
            try:
                self._settings.check_room()
            except (OverloadedError, UnavailableError) as error:
                raise refusal_of(error) from None
        wanted = _MEDIA_TYPES.get(path)
        found = headers.get("content-type", "").partition(";")[0].strip().lower()
        if is_post and wanted is not None and found != wanted:
            raise RefusedError(
                415, f"The body is of type {found[:80] or 'unknown'!r}; send {wanted}.", code="unsupported_media_type"
            )

    def _check_key(self, headers: Headers) -> None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        # Every key is compared, and all of each: the time taken tells nothing.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            what = "Incorrect API key" if key else "No API key"
            raise RefusedError(
                401,
                f"{what}: send the header `Authorization: Bearer KEY` with a key of this server.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _note(self, scope: Scope, visit: Visit) -> None:
        # The template, not the path: it is nobody's text, and there are few of them.
        route = getattr(scope.get("route"), "path_format", "unmatched")
        if route == "unmatched" and scope["path"] in _MEDIA_TYPES:
            route = scope["path"]  # refused before it was routed
        status = visit.status if visit.is_complete else _CLIENT_LEFT
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(visit.seconds())
        if visit.first_event_s is not None:
            self._metrics.first_event.labels(route).observe(visit.first_event_s)
        if visit.num_pictures:
            self._metrics.pictures.labels(route).inc(visit.num_pictures)
        for kind, count in (("prompt", visit.prompt_tokens), ("completion", visit.completion_tokens)):
            self._metrics.tokens.labels(kind).inc(count)
        line = {
            "time": round(time.time(), 3),
            "request_id": visit.request_id,
            "method": scope["method"][:16],
            "route": route,
            "status": status,
            "seconds": round(visit.seconds(), 4),
            "first_event_s": None if visit.first_event_s is None else round(visit.first_event_s, 4),
            "bytes_in": visit.num_bytes,
            "model": visit.model,
            "pictures": visit.num_pictures,
            "prompt_tokens": visit.prompt_tokens,
            "completion_tokens": visit.completion_tokens,
            "error": visit.error,
        }
        logger.info("%s", json.dumps(line))


async def _read_body(scope: Scope, receive: Receive, visit: Visit) -> bytes:
    """The whole body, its bytes counted, as chunked bodies announce no length."""
    limit = _BODY_LIMITS.get(scope["path"], MAX_JSON_BYTES)
    too_large = RefusedError(413, f"The body has more than {limit} bytes, which is the limit.", code="body_too_large")
    announced = Headers(scope=scope).get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    chunks: list[bytes] = []
    more = True
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _ClientLeftError
                chunks.append(message.get("body", b""))
                visit.num_bytes += len(chunks[-1])
                more = message.get("more_body", False)
                if visit.num_bytes > limit:
                    raise too_large
    except TimeoutError:
        raise RefusedError(
            408, f"The body took longer than {BODY_TIMEOUT_S:g} s to arrive.", code="body_timeout"
        ) from None
    return b"".join(chunks)


def _log_fault(error: Exception, visit: Visit) -> None:
    """A fault of ours: its kind and place. Its message may hold a client's words, so it isn't logged."""
    line: dict[str, Any] = {
        "time": round(time.time(), 3),
        "request_id": visit.request_id,
        "fault": type(error).__name__,
        "stack": [
            f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)
        ],
    }
    logger.error("%s", json.dumps(line))


def note_fault(error: Exception, visit: Visit) -> RefusedError:
    """Log a fault that a stream met after its status was sent; gives what the client is told."""
    visit.error = "internal_error"
    _log_fault(error, visit)
    return broken()
