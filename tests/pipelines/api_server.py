"""The API on a real server, in front of a model or of a painter who needs no time."""

from __future__ import annotations

import asyncio
import io
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from PIL import Image

from nexusgen.base_training import GEOMETRY, HIDDEN_SIZE, TRANSFORMER_SIZES
from nexusgen.model.decoder import DecoderConfig, MergerConfig, VisionDecoder, save_decoder
from nexusgen.model.manifest import demo_base, read_manifest
from nexusgen.model.weights import write_manifest
from pipelines import api, orders
from pipelines.api_settings import ApiSettings
from pipelines.pictures import encode_png

INFO = orders.ModelInfo(
    "nexusgen", "3", "0123456789abcdef", ("autoregressive", "generation_decoder", "vae"), (64, 64), 8, loaded_at=1
)


@contextmanager
def serving(backend: orders.Backend, settings: ApiSettings | None = None) -> Iterator[str]:
    """The URL of an API that runs in a thread of this process."""
    config = uvicorn.Config(
        api.create_app(backend, settings), host="127.0.0.1", port=0, log_level="error", lifespan="off", ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def make_editor(folder: Path) -> Path:
    """The demo base with an editing decoder of random weights."""
    shutil.copytree(demo_base(), folder)
    torch.manual_seed(0)
    merger = MergerConfig(
        reference_grid=GEOMETRY.reference_grid,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        mrope_section=(4, 6, 6),
    )
    config = DecoderConfig(
        conditioner="editing",
        embedding_dim=HIDDEN_SIZE,
        context_dim=HIDDEN_SIZE,
        token_grid=GEOMETRY.target_grid,
        token_positions="grid",
        merger=merger,
    )
    save_decoder(VisionDecoder.from_config(config, TRANSFORMER_SIZES), folder / "decoders" / "editing", torch.float32)
    values = read_manifest(folder).model_dump(exclude={"version", "parts", "fingerprints", "fingerprint"})
    write_manifest(folder, **values)
    return folder


def picture(colour: str = "white", size: tuple[int, int] = (120, 90), image_format: str = "PNG") -> bytes:
    """A picture's file of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, image_format)
    return buffer.getvalue()


class Painter:
    """A backend that paints each order's size in one colour, says three words, and fails or waits as told."""

    def __init__(self) -> None:
        self.orders: list[Any] = []
        self.error: Exception | None = None  # raised instead of the first event
        self.error_after: BaseException | None = None  # raised instead of the second
        self.is_lost = False  # ends after its first event, without a reason
        self.pause_s = 0.0  # before every event
        self.is_stuck = False  # never says anything after its first event
        self.num_open = 0
        self.loaded = [INFO]

    async def models(self) -> list[orders.ModelInfo]:
        if isinstance(self.error, orders.UnavailableError):
            raise self.error
        return self.loaded

    async def draw(self, order: orders.PictureOrder) -> AsyncIterator[orders.PictureEvent]:
        events: list[orders.PictureEvent] = [
            orders.PartialPicture(picture("grey", (64, 64)), number) for number in range(order.num_partial)
        ]
        usage = orders.Usage(5, 9, 3 if order.images else 0)
        events += [self._paint(order.settings), orders.Finished("stop", INFO, usage)]
        async for event in self._say(order, events):
            yield event

    async def chat(self, order: orders.ChatOrder) -> AsyncIterator[orders.ChatEvent]:
        events: list[orders.ChatEvent] = [orders.Text("Here"), orders.Text(" it is:")]
        if order.modality != "text":
            events.append(self._paint(order.picture))
        events += [orders.Text(" done"), orders.Finished("stop", INFO, orders.Usage(7, 3, 4 if order.images else 0))]
        async for event in self._say(order, events):
            yield event

    async def _say(self, order: Any, events: list[Any]) -> AsyncIterator[Any]:
        if order.model not in (None, INFO.id):
            raise orders.UnknownModelError(f"The model {order.model!r} does not exist; this server has 'nexusgen'.")
        if self.error is not None:
            raise self.error
        self.orders.append(order)
        self.num_open += 1
        try:
            for number, event in enumerate(events):
                await asyncio.sleep(3600 if self.is_stuck and number else self.pause_s)
                if number and self.is_lost:
                    return
                if number and self.error_after is not None:
                    raise self.error_after
                yield event
        finally:
            self.num_open -= 1

    def _paint(self, settings: orders.PictureSettings) -> orders.Drawing:
        height, width = size = settings.size or INFO.image_size
        steps, guidance = settings.steps or INFO.steps, settings.guidance or 1.0
        image = Image.new("RGB", (width, height), "red")
        png = encode_png(image, INFO, settings.seed, steps, guidance)
        return orders.Drawing(png, INFO, settings.seed, steps, size, guidance)
