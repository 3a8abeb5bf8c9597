"""The HTTP door: an app that speaks OpenAI's API, apart from whatever computes the answers.

    POST /v1/chat/completions                       api_chat.py: conversations of text and pictures
    POST /v1/images/generations, /v1/images/edits   api_images.py
    GET  /v1/models, /v1/models/{id}                what is really loaded
    GET  /health                                    200 when a model can answer, 503 with the reason when not
    GET  /metrics                                   Prometheus
    GET  /, /page/{name}                            a page to try it on
    GET  /docs, /openapi.json

`create_app` needs only a `Backend` (orders.py): Ray Serve handles behind `serve`, a plain object in tests. Requests are
checked here, by pydantic, and leave as small frozen dataclasses; answers and errors have the shapes that openai
clients read. Before all of it stands the guard (api_guard.py).
"""

from __future__ import annotations

import asyncio
import mimetypes
import re
from typing import Literal

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nexusgen import __version__
from nexusgen.errors import NexusgenError
from pipelines.api_chat import ChatChunk, add_chat_routes
from pipelines.api_docs import DOCS_POLICY, docs_page
from pipelines.api_errors import RefusedError, documented, refusal_of, refusal_of_validation
from pipelines.api_guard import Guard, visit_of
from pipelines.api_images import STREAM_EVENTS, add_image_routes
from pipelines.api_metrics import CONTENT_TYPE, Metrics
from pipelines.api_settings import HEALTH_TIMEOUT_S, ApiSettings
from pipelines.orders import Backend, ModelInfo, OverloadedError, UnavailableError, UnknownModelError

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FILE_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


class ModelCard(BaseModel):
    """One loaded model; the fields after `owned_by` are extensions."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["nexusgen"] = "nexusgen"
    version: str | None
    fingerprint: str
    parts: list[str]
    size: str
    steps: int
    refused: str  # the version that was to take its place, and why it can't


class ModelList(BaseModel):
    """What is loaded, the default first."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Healthy(BaseModel):
    """A model can answer: the default one. `refused`: the version that was to take its place, and can't; `/v1/models`
    tells why not, to those with a key."""

    status: Literal["ok"] = "ok"
    model: str
    version: str | None
    fingerprint: str
    refused: str


class Unhealthy(BaseModel):
    """No model can answer."""

    status: Literal["unavailable"] = "unavailable"
    reason: str


def create_app(backend: Backend, settings: ApiSettings | None = None) -> FastAPI:
    """The API in front of `backend`. Raises: ValueError for settings that can't be read."""
    settings = settings if settings is not None else ApiSettings()
    metrics = Metrics()
    # FastAPI's own pages load scripts from other hosts, so they stay off.
    app = FastAPI(
        title="nexusgen",
        version=__version__,
        description="Text and pictures in and out, as OpenAI's clients speak. Pictures are made by an AI model.",
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    app.add_exception_handler(RefusedError, _answer_error)
    app.add_exception_handler(NexusgenError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    router = APIRouter()
    add_chat_routes(router, backend, settings)
    add_image_routes(router, backend, settings)
    _add_model_routes(router, backend)
    _add_metrics_route(router, metrics, settings)
    _add_pages(app, router, settings)
    app.include_router(router)
    _document(app)
    return app


def _document(app: FastAPI) -> None:
    """Complete the schema: FastAPI adds a 422 that is never sent, and doesn't know the events of streams."""
    schema = app.openapi()
    for methods in schema["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
    schemas = schema["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    events = [(model, "serialization") for model in (ChatChunk, *STREAM_EVENTS)]
    _, of_events = models_json_schema(events, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas |= of_events["$defs"]


def _add_model_routes(router: APIRouter, backend: Backend) -> None:
    errors = (401, 408, 413, 429, 500, 503)

    @router.get("/v1/models", responses=documented(*errors), summary="What is loaded")
    async def models() -> ModelList:
        return ModelList(data=[_card(info) for info in await _loaded(backend)])

    @router.get("/v1/models/{model_id:path}", responses=documented(400, 404, *errors), summary="One of them")
    async def model(model_id: str) -> ModelCard:
        loaded = await _loaded(backend)
        for info in loaded:
            if info.id == model_id:
                return _card(info)
        names = ", ".join(repr(info.id) for info in loaded)
        raise UnknownModelError(f"The model {model_id[:100]!r} does not exist; this server has {names}.")

    @router.get(
        "/health",
        responses={503: {"model": Unhealthy, "description": "no model can answer"}, **documented(408, 413, 500)},
        summary="Whether a model can answer",
    )
    async def health() -> Healthy:
        try:
            loaded = await _loaded(backend)
        except (UnavailableError, OverloadedError) as error:
            unhealthy = Unhealthy(reason=str(error))
            return JSONResponse(unhealthy.model_dump(), 503, {"Retry-After": "1"})  # type: ignore[return-value]
        first = loaded[0]
        return Healthy(
            model=first.id,
            version=first.version,
            fingerprint=first.fingerprint,
            refused=first.refused.partition(": ")[0],
        )


async def _loaded(backend: Backend) -> list[ModelInfo]:
    """Raises: UnavailableError if there is no model, or the backend doesn't say so in time."""
    try:
        async with asyncio.timeout(HEALTH_TIMEOUT_S) as limit:
            loaded = await backend.models()
    except TimeoutError:
        if not limit.expired():
            raise
        raise UnavailableError(f"The model did not reply within {HEALTH_TIMEOUT_S:g} s.") from None
    if not loaded:
        raise UnavailableError("No model is loaded; try again shortly.")
    return loaded


def _card(info: ModelInfo) -> ModelCard:
    return ModelCard(
        id=info.id,
        created=info.loaded_at,
        version=info.version,
        fingerprint=info.fingerprint,
        parts=list(info.parts),
        size=f"{info.image_size[1]}x{info.image_size[0]}",
        steps=info.steps,
        refused=info.refused,
    )


def _add_metrics_route(router: APIRouter, metrics: Metrics, settings: ApiSettings) -> None:
    @router.get(
        "/metrics",
        responses={
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format"},
            **documented(401, 408, 413, 500),
        },
        response_class=PlainTextResponse,
        summary="Counts and times",
    )
    async def show() -> Response:
        text = metrics.text().decode()
        if settings.more_metrics is not None:
            text += await settings.more_metrics()
        return Response(text, media_type=CONTENT_TYPE)


def _add_pages(app: FastAPI, router: APIRouter, settings: ApiSettings) -> None:
    folder = settings.page_folder

    @router.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()), headers={"content-security-policy": DOCS_POLICY})

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        return await serve_file("index.html")

    @router.get("/page/{name}", include_in_schema=False)
    async def serve_file(name: str) -> Response:
        path = folder / name
        # One plain name: nothing that climbs out of the folder, nothing hidden.
        if not _FILE_NAME.fullmatch(name) or path.is_symlink() or not path.is_file():
            raise HTTPException(404)
        media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
        data = await asyncio.to_thread(path.read_bytes)
        headers = {"content-security-policy": _PAGE_POLICY, "cache-control": "no-cache"}
        return Response(data, media_type=media_type, headers=headers)


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    """The one handler of errors, ours, the backend's and the framework's."""
    match error:
        case RefusedError():
            refusal = error
        case NexusgenError():
            refusal = refusal_of(error)
            if refusal.status == 500:
                raise error  # a fault of ours: the guard logs it and answers
        case RequestValidationError():
            refusal = refusal_of_validation(list(error.errors()))
        case HTTPException():
            codes = {404: "not_found", 405: "method_not_allowed"}
            message = f"{request.method} {request.url.path[:200]}: {error.detail}."
            refusal = RefusedError(error.status_code, message, None, codes.get(error.status_code), error.headers)
        case _:
            raise error
    visit_of(request).error = refusal.code
    return refusal.response()
