"""Pictures on their way to a client: the formats they are sent in, and what they say about who made them."""

from __future__ import annotations

import io
from typing import Literal

from PIL import Image

from nexusgen.images import encode_picture
from pipelines.orders import Drawing, ModelInfo, PartialPicture

OutputFormat = Literal["png", "jpeg", "webp"]


def encode_png(image: Image.Image, info: ModelInfo, seed: int, steps: int, guidance: float = 1.0) -> bytes:
    """The picture as PNG that says which model made it, from what settings: what a `Drawing` holds."""
    return encode_picture(image, _made(info, seed, steps, guidance))


def encode_drawing(drawing: Drawing, output_format: OutputFormat, quality: int = 100) -> bytes:
    """A drawing in the format that was asked for. JPEG and WebP say in EXIF what PNG says in its text chunks."""
    if output_format == "png":
        return drawing.png
    made = _made(drawing.model, drawing.seed, drawing.steps, drawing.guidance)
    with Image.open(io.BytesIO(drawing.png)) as image:
        return encode_picture(image.convert("RGB"), made, output_format.upper(), quality)


def encode_partial(partial: PartialPicture, output_format: OutputFormat, quality: int = 100) -> bytes:
    """A picture on the way, which says nothing of itself, in the format that was asked for."""
    if output_format == "png":
        return partial.png
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(partial.png)) as image:
        image.convert("RGB").save(buffer, output_format.upper(), quality=quality)
    return buffer.getvalue()


def _made(info: ModelInfo, seed: int, steps: int, guidance: float) -> dict[str, str | int | float | None]:
    return {
        "model": info.id,
        "version": info.version,
        "fingerprint": info.fingerprint,
        "seed": seed,
        "steps": steps,
        "guidance_scale": guidance,
    }
