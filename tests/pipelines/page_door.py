"""What the page's tests talk to: the real app in front of a backend that paints what it is told.

The backend is deterministic, and prompts steer it: `held` waits after the first event until it is released, `busy` is
refused once, `breaks` ends in the middle.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from PIL import Image, ImageDraw, ImageOps
from servers import free_port

from nexusgen.images import encode_picture
from pipelines import orders

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
