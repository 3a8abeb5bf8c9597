"""What the page's tests talk to: a backend that paints what it is told, and a plain door in front of it.

The backend is deterministic, and prompts steer it: `held` waits after the first event until it is released, `busy` is
refused once, `breaks` ends in the middle. The door speaks just as much of the API as the page needs.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from PIL import Image, ImageDraw, ImageOps
from servers import free_port

from nexusgen.images import encode_picture
from nexusgen.schema import IMAGE_MARK, Message
from pipelines import orders

PAGE = Path(orders.__file__).parent / "page"
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
INFO = orders.ModelInfo("nexusgen", "3", "0123456789abcdef", ("ar",), (96, 96), steps=8, loaded_at=1)
INKS = ("#c23b30", "#2f6fb3", "#3f8f4f", "#e0a52c", "#7a4fa3")
POLL_S = 0.02


class PaintBackend:
    """An `orders.Backend` that paints a circle and a square in the seed's colours, and inverts what it edits."""

    def __init__(self, models: Sequence[str] = ("nexusgen",)) -> None:
        self._models = [dataclasses.replace(INFO, id=name) for name in models]
        self.orders: list[Any] = []
        self.release = threading.Event()
        self.num_closed = 0  # streams whose client went away in the middle
        self._refused: set[str] = set()

    async def models(self) -> list[orders.ModelInfo]:
        return self._models

    async def draw(self, order: orders.PictureOrder) -> AsyncIterator[orders.PictureEvent]:
        self.orders.append(order)
        self._refuse_once(order.prompt)
        picture = _edited(order.images[0]) if order.images else painted(order.settings)
        try:
            for number in range(order.num_partial):
                yield orders.PartialPicture(_png(_noisy(picture, order.num_partial - number)), number)
                await self._hold(order.prompt)
        except (asyncio.CancelledError, GeneratorExit):
            self.num_closed += 1
            raise
        if "breaks" in order.prompt:
            raise orders.UnavailableError("The model's replica is gone; try again shortly.")
        yield self._drawing(picture, order.settings)
        yield orders.Finished("stop", INFO)

    async def chat(self, order: orders.ChatOrder) -> AsyncIterator[orders.ChatEvent]:
        self.orders.append(order)
        prompt = order.messages[-1].content
        self._refuse_once(prompt)
        words = f"You said: {prompt.replace('<image>', '').strip()} I saw {len(order.images)} pictures.".split(" ")
        try:
            for word in words if order.modality != "image" else []:
                yield orders.Text(word + " ")
                await self._hold(prompt)
        except (asyncio.CancelledError, GeneratorExit):
            self.num_closed += 1
            raise
        if "breaks" in prompt:
            raise orders.UnavailableError("The model's replica is gone; try again shortly.")
        if order.modality == "image" or (order.modality == "auto" and "draw" in prompt.lower()):
            yield self._drawing(painted(order.picture), order.picture)
        yield orders.Finished("stop", INFO)

    def _refuse_once(self, prompt: str) -> None:
        if "busy" in prompt and prompt not in self._refused:
            self._refused.add(prompt)
            raise orders.OverloadedError("The queue is full; try again shortly.", retry_after_s=1)

    async def _hold(self, prompt: str) -> None:
        while "held" in prompt and not self.release.is_set():
            await asyncio.sleep(POLL_S)

    def _drawing(self, picture: Image.Image, settings: orders.PictureSettings) -> orders.Drawing:
        steps, guidance = settings.steps or INFO.steps, settings.guidance or 1.0
        made = {"model": INFO.id, "version": INFO.version, "fingerprint": INFO.fingerprint, "seed": settings.seed}
        png = encode_picture(picture, {**made, "steps": steps, "guidance_scale": guidance})
        return orders.Drawing(png, INFO, settings.seed, steps, (picture.height, picture.width), guidance)


def plain_door(backend: PaintBackend, keys: Sequence[str] = ()) -> FastAPI:
    """The part of the API that the page uses, without the checks of the real one."""
    app = FastAPI(docs_url=None, redoc_url=None)
    headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "cache-control": "no-cache"}

    @app.get("/")
    async def index() -> Response:
        return await page_file("index.html")

    @app.get("/page/{name}")
    async def page_file(name: str) -> Response:
        if not (PAGE / name).is_file():
            return _error(404, "There is no such file.", "not_found")
        return FileResponse(PAGE / name, headers=headers)

    @app.middleware("http")
    async def check_key(request: Request, go_on: Any) -> Response:
        authorised = request.headers.get("authorization", "").removeprefix("Bearer ") in keys
        if keys and request.url.path.startswith("/v1/") and not authorised:
            return _error(401, "No valid API key was sent.", "invalid_api_key")
        return await go_on(request)

    @app.get("/v1/models")
    async def models() -> Any:
        infos = await backend.models()
        data = [{"id": info.id, "version": info.version, "fingerprint": info.fingerprint} for info in infos]
        return {"object": "list", "data": data}

    @app.post("/v1/images/generations")
    async def generate(request: Request) -> Response:
        return await _answer(_picture_events(backend.draw(_picture_order(await request.json())), "image_generation"))

    @app.post("/v1/images/edits")
    async def edit(request: Request) -> Response:
        head = f"Content-Type: {request.headers['content-type']}\n\n".encode()
        parts = message_from_bytes(head + await request.body(), policy=policy.HTTP).iter_parts()
        fields: dict[str, Any] = {}
        images = []
        for part in parts:
            name, value = part.get_param("name", header="content-disposition"), part.get_payload(decode=True)
            if name == "image[]":
                images.append(value)
            else:
                fields[str(name)] = value.decode()
        return await _answer(_picture_events(backend.draw(_picture_order(fields, tuple(images))), "image_edit"))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(_chat_events(backend.chat(_chat_order(await request.json()))))

    return app


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The app on a port of this machine, in a thread; gives its address."""
    port = free_port()
    config = uvicorn.Config(app, "127.0.0.1", port, log_level="error", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.05)
            assert thread.is_alive(), "the server didn't start"
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def _picture_settings(body: dict[str, Any]) -> orders.PictureSettings:
    size = body.get("size", "auto")
    width, height = (None, None) if size == "auto" else map(int, size.split("x"))
    guidance = body.get("guidance_scale")
    return orders.PictureSettings(
        seed=int(body.get("seed", 1)),
        steps=int(body["steps"]) if "steps" in body else None,
        size=None if width is None else (height, width),
        guidance=None if guidance is None else float(guidance),
    )


def _picture_order(body: dict[str, Any], images: tuple[bytes, ...] = ()) -> orders.PictureOrder:
    assert str(body["stream"]).lower() == "true"
    assert int(body["n"]) == 1
    return orders.PictureOrder(
        body["prompt"], _picture_settings(body), images, int(body["partial_images"]), body.get("model")
    )


def _chat_order(body: dict[str, Any]) -> orders.ChatOrder:
    assert body["stream"] is True
    messages, images = [], []
    for message in body["messages"]:
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        texts = [part["text"] if part["type"] == "text" else IMAGE_MARK for part in parts]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        images += [base64.b64decode(url.partition(";base64,")[2]) for url in urls]
        drawn = [IMAGE_MARK for image in message.get("images", []) if image["type"] == "image_url"]
        messages.append(Message(message["role"], "".join(texts + drawn)))
    modality = {"text": "text", "image": "image", "text,image": "auto"}[",".join(body["modalities"])]
    return orders.ChatOrder(
        tuple(messages),
        tuple(images),
        _picture_settings(body),
        modality,  # type: ignore[arg-type]
        max_tokens=body.get("max_tokens"),
        temperature=body.get("temperature", 0.0),
        model=body.get("model"),
    )


async def _answer(events: AsyncIterator[dict[str, Any]]) -> Response:
    """The events as a stream, or an error answer if there isn't even a first one."""
    try:
        first = await anext(events)
    except orders.OverloadedError as error:
        return _error(429, str(error), "overloaded", {"Retry-After": str(error.retry_after_s)})
    except orders.UnavailableError as error:
        return _error(503, str(error), "unavailable")

    async def lines() -> AsyncIterator[str]:
        yield f"data: {json.dumps(first)}\n\n"
        try:
            async for event in events:
                yield f"data: {json.dumps(event)}\n\n"
        except orders.UnavailableError as error:
            yield f"data: {json.dumps({'error': {'message': str(error), 'code': 'unavailable'}})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


async def _picture_events(events: AsyncIterator[orders.PictureEvent], kind: str) -> AsyncIterator[dict[str, Any]]:
    async for event in events:
        if isinstance(event, orders.PartialPicture):
            b64 = base64.b64encode(event.png).decode()
            yield {"type": f"{kind}.partial_image", "b64_json": b64, "partial_image_index": event.number}
        elif isinstance(event, orders.Drawing):
            yield {"type": f"{kind}.completed", "b64_json": base64.b64encode(event.png).decode()}


async def _chat_events(events: AsyncIterator[orders.ChatEvent]) -> AsyncIterator[dict[str, Any]]:
    yield {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    num_pictures = 0
    async for event in events:
        delta: dict[str, Any] = {}
        if isinstance(event, orders.Text):
            delta = {"content": event.text}
        elif isinstance(event, orders.Drawing):
            url = "data:image/png;base64," + base64.b64encode(event.png).decode()
            delta = {"images": [{"index": num_pictures, "type": "image_url", "image_url": {"url": url}}]}
            num_pictures += 1
        reason = event.reason if isinstance(event, orders.Finished) else None
        yield {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def _error(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> JSONResponse:
    error = {"message": message, "type": "error", "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


def painted(settings: orders.PictureSettings) -> Image.Image:
    height, width = settings.size or INFO.image_size
    image = Image.new("RGB", (width, height), "#f4f1ea")
    draw = ImageDraw.Draw(image)
    ink = [INKS[(settings.seed + shift) % len(INKS)] for shift in (0, 1)]
    side = min(width, height)
    draw.ellipse((0.12 * side, 0.12 * side, 0.52 * side, 0.52 * side), fill=ink[0])
    draw.rectangle((0.55 * side, 0.5 * side, 0.85 * side, 0.85 * side), fill=ink[1])
    return image


def _edited(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        return ImageOps.invert(image.convert("RGB"))


def _noisy(image: Image.Image, much: int) -> Image.Image:
    return Image.blend(image, Image.effect_noise(image.size, 80).convert("RGB"), min(0.9, 0.35 * much))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
