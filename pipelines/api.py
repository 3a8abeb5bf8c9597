"""The HTTP door: an app that speaks OpenAI's images API, apart from whatever computes the pictures.

    POST /v1/images/generations   {"prompt", "n", "size", "response_format", "model", "user", "seed", "steps"}
    GET  /health                  200 when a picture can be made, 503 with the reason when not

`create_app` needs only a `Backend`: Ray Serve handles in `serve.py`, a plain object in tests. Requests are checked
here, by pydantic, and leave as small frozen dataclasses; answers and errors have the shapes that openai clients read.
`seed` and `steps` are extensions: picture i of a request is drawn from seed + i.
"""

from __future__ import annotations

import base64
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nexusgen.errors import InputError, NexusgenError, UsageError
from nexusgen.images import encode_picture

MAX_BODY_BYTES = 1 << 20
MAX_PROMPT_CHARACTERS = 4000
MAX_PICTURES = 10  # OpenAI's limit on n
MAX_STEPS = 200
MAX_SEED = 2**32 - 1
MAX_PIXELS = 1024 * 1024
SIZE_MULTIPLE = 16  # pixels: 8 to a latent's side, two latents to a side of FLUX's patches

_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


@dataclass(frozen=True)
class ModelInfo:
    """What is really loaded: served under `name`; `version` is None for a model that isn't registered."""

    name: str
    version: str | None
    fingerprint: str
    image_size: tuple[int, int]
    steps: int


@dataclass(frozen=True)
class PictureOrder:
    """One picture to draw; size is (height, width) in pixels; None leaves it to the model."""

    prompt: str
    seed: int
    steps: int | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Drawing:
    """One picture drawn: its PNG, and what it was made by and from, as the maker itself says."""

    png: bytes
    model: ModelInfo
    seed: int
    steps: int
    size: tuple[int, int]


class UnavailableError(NexusgenError):
    """The model can't answer now: it is loading, gone or does not reply."""


class OverloadedError(NexusgenError):
    """The queue is full; the client should come back after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class Backend(Protocol):
    """Whoever computes the pictures. Both methods may raise UnavailableError and OverloadedError, `draw` also
    InputError."""

    async def info(self) -> ModelInfo:
        """What is loaded, asked of the thing that would answer."""
        ...

    async def draw(self, orders: Sequence[PictureOrder]) -> list[Drawing]:
        """One drawing per order, in order."""
        ...


class ImagesRequest(BaseModel):
    """Body of `POST /v1/images/generations`; OpenAI's clients send null for what they leave open."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)]
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_PICTURES)] | None = None
    size: str | None = Field(default=None, description='"WIDTHxHEIGHT" in pixels, or "auto"')
    response_format: Literal["b64_json"] | None = None
    user: str | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED - MAX_PICTURES)] | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None


class Picture(BaseModel):
    """One picture of an answer; the PNG's own metadata repeats how it was made."""

    b64_json: str
    seed: int


class ImagesResponse(BaseModel):
    """Answer of `POST /v1/images/generations`; `model`, `fingerprint`, `steps` and each `seed` are extensions."""

    created: int
    data: list[Picture]
    output_format: Literal["png"] = "png"
    size: str
    model: str
    fingerprint: str
    steps: int


class ErrorDetail(BaseModel):
    """What went wrong, in the fields that OpenAI's clients read."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer that isn't 2xx, except that of `/health`."""

    error: ErrorDetail


class RefusedError(Exception):
    """A request that ends with an error answer."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers


def create_app(backend: Backend, model_name: str) -> FastAPI:
    """The API in front of `backend`, whose model requests call `model_name`."""
    # FastAPI's own pages load scripts from other hosts, so they stay off.
    app = FastAPI(title="nexusgen", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    app.add_exception_handler(RefusedError, _answer_refused)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_broken)
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in (400, 404, 413, 429, 500, 503)
    }

    @app.post("/v1/images/generations", responses=errors)
    async def generate(body: ImagesRequest) -> ImagesResponse:
        try:
            drawings = await backend.draw(picture_orders(body, model_name))
        except UnavailableError as error:
            raise RefusedError(503, str(error), code="unavailable", headers={"Retry-After": "1"}) from error
        except OverloadedError as error:
            retry = {"Retry-After": str(error.retry_after_s)}
            raise RefusedError(429, str(error), code="overloaded", headers=retry) from error
        except (InputError, UsageError) as error:
            raise RefusedError(400, str(error)) from error
        first = drawings[0]
        return ImagesResponse(
            created=int(time.time()),
            data=[Picture(b64_json=base64.b64encode(d.png).decode(), seed=d.seed) for d in drawings],
            size=f"{first.size[1]}x{first.size[0]}",
            model=first.model.name,
            fingerprint=first.model.fingerprint,
            steps=first.steps,
        )

    @app.get("/health", responses={503: {"description": "no model can answer"}})
    async def health() -> JSONResponse:
        try:
            info = await backend.info()
        except (UnavailableError, OverloadedError) as error:
            return JSONResponse({"status": "unavailable", "reason": str(error)}, status_code=503)
        return JSONResponse(
            {"status": "ok", "model": info.name, "version": info.version, "fingerprint": info.fingerprint}
        )

    return app


def picture_orders(request: ImagesRequest, model_name: str) -> list[PictureOrder]:
    """The pictures that a request asks for; without a seed, at a random one.

    Raises: RefusedError (400, or 404 for another model's name).
    """
    if request.model is not None and request.model != model_name:
        message = f"The model {request.model!r} does not exist; this server has {model_name!r}."
        raise RefusedError(404, message, param="model", code="model_not_found")
    if not request.prompt.strip():
        raise RefusedError(400, "The prompt is blank; describe a picture.", param="prompt", code="invalid_value")
    try:
        request.prompt.encode("utf-8")
    except UnicodeEncodeError:
        message = "The prompt holds half of a surrogate pair, which is no character; send valid Unicode."
        raise RefusedError(400, message, param="prompt", code="invalid_value") from None
    seed = secrets.randbelow(MAX_SEED - MAX_PICTURES) if request.seed is None else request.seed
    size = _parse_size(request.size)
    return [PictureOrder(request.prompt, seed + i, request.steps, size) for i in range(request.n or 1)]


def encode_png(image: Image.Image, info: ModelInfo, seed: int, steps: int) -> bytes:
    """The picture as PNG that says which model made it, from what settings."""
    made = {"model": info.name, "version": info.version, "fingerprint": info.fingerprint, "seed": seed, "steps": steps}
    return encode_picture(image, made)


class BodyLimit:
    """Middleware that counts the bytes of a request's body, as chunked bodies announce no length.

    The body is read before the app runs, so that one answer, 413, covers announced and unannounced excess.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app on the body if it is small enough."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        chunks: list[bytes] = []
        num_bytes = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunks.append(message.get("body", b""))
            num_bytes += len(chunks[-1])
            more = message.get("more_body", False)
            if num_bytes > self.max_bytes:
                text = f"The body has more than {self.max_bytes} bytes, which is the limit."
                await _error_response(413, text, code="body_too_large")(scope, receive, send)
                return
        body: Message | None = {"type": "http.request", "body": b"".join(chunks), "more_body": False}

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message, body = body, None
            return message

        await self.app(scope, replay, send)


def _parse_size(size: str | None) -> tuple[int, int] | None:
    if size is None or size == "auto":
        return None
    found = _SIZE.fullmatch(size)
    if found is None:
        message = f'Invalid size {size[:40]!r}: expected "WIDTHxHEIGHT", such as "96x96", or "auto".'
        raise RefusedError(400, message, param="size", code="invalid_value")
    width, height = int(found[1]), int(found[2])
    if width % SIZE_MULTIPLE or height % SIZE_MULTIPLE or width * height > MAX_PIXELS:
        message = (
            f"Invalid size {size!r}: width and height must be multiples of {SIZE_MULTIPLE}, "
            f"with at most {MAX_PIXELS} pixels in all."
        )
        raise RefusedError(400, message, param="size", code="invalid_value")
    return height, width


def _error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    kind = {429: "rate_limit_error"}.get(status, "server_error" if status >= 500 else "invalid_request_error")
    error = ErrorDetail(message=message, type=kind, param=param, code=code)
    return JSONResponse(ErrorResponse(error=error).model_dump(), status_code=status, headers=headers)


async def _answer_refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RefusedError)
    return _error_response(error.status, str(error), error.param, error.code, error.headers)


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    detail = error.errors()[0]
    path = [str(part) for part in detail["loc"][1:]]
    param = ".".join(path) or None
    match detail["type"]:
        case "extra_forbidden":
            message, code = f"Unknown parameter: {param!r}.", "unknown_parameter"
        case "missing":
            what = f"Missing required parameter: {param!r}." if param else "The request has no body."
            message, code = what, "missing_required_parameter"
        case "json_invalid":
            return _error_response(400, "The body is not valid JSON.", code="invalid_json")
        case "string_too_long":
            message = f"Invalid {param!r}: longer than {detail['ctx']['max_length']} characters."
            code = "string_above_max_length"
        case _ if param is None:
            message, code = "The body must be a JSON object, sent as application/json.", "invalid_type"
        case _:
            message, code = f"Invalid {param!r}: {detail['msg']}.", "invalid_value"
    return _error_response(400, message, param, code)


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}."
    return _error_response(error.status_code, message, headers=dict(error.headers or {}))


async def _answer_broken(request: Request, error: Exception) -> JSONResponse:
    return _error_response(500, "The server failed on this request; its log says why.", code="internal_error")
