"""`POST /v1/images/generations` and `/v1/images/edits`: pictures of texts, and of other pictures.

Picture i of a request is drawn from seed + i, each by an order of its own. `seed`, `steps` and `guidance_scale` are
extensions; parameters that mean nothing here are taken at the values that ask for nothing, and refused at others.
"""

from __future__ import annotations

import asyncio
import base64
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.responses import Response

from nexusgen.messages import MAX_PROMPT_CHARACTERS
from pipelines.api_errors import RefusedError, documented, refusal_of_validation
from pipelines.api_guard import EDITS_PATH, GENERATIONS_PATH
from pipelines.api_inputs import check_picture
from pipelines.api_settings import (
    MAX_CHOICES,
    MAX_GIVEN_IMAGES,
    MAX_GUIDANCE,
    MAX_PIXELS,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    MIB,
    SIZE_MULTIPLE,
    ApiSettings,
)
from pipelines.api_stream import begin_stream, described_stream, encode_event, watched
from pipelines.orders import (
    Backend,
    Drawing,
    Finished,
    Lot,
    PartialPicture,
    PictureEvent,
    PictureOrder,
    PictureSettings,
    Usage,
)
from pipelines.pictures import OutputFormat, encode_drawing, encode_partial

MAX_PARTIAL_PICTURES = 3  # OpenAI's limit
SEEDS = Field(ge=0, le=MAX_SEED - MAX_CHOICES)

Seed = Annotated[int, SEEDS]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
GuidanceScale = Annotated[float, Field(ge=1, le=MAX_GUIDANCE, allow_inf_nan=False)]
Size = Annotated[str, Field(max_length=40, description='"WIDTHxHEIGHT" in pixels, multiples of 16, or "auto"')]
Label = Annotated[str, Field(max_length=512)]

Kind = Literal["image_generation", "image_edit"]

_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)


class PictureParameters(BaseModel):
    """What both endpoints take; OpenAI's clients send null for what they leave open."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)]
    model: Label | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    size: Size | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: OutputFormat | None = None
    output_compression: (
        Annotated[int, Field(ge=0, le=100, description="quality of JPEG and WebP; 100 if left out")] | None
    ) = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL_PICTURES)] | None = None
    seed: Annotated[int, SEEDS, Field(description="extension: picture i is drawn from seed + i")] | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS, description="extension: of denoising")] | None = None
    guidance_scale: (
        Annotated[
            float,
            Field(
                ge=1,
                le=MAX_GUIDANCE,
                allow_inf_nan=False,
                description="extension: of two-pass guidance; 1 is a single pass",
            ),
        ]
        | None
    ) = None


class GenerationRequest(PictureParameters):
    """Body of `POST /v1/images/generations`."""

    style: Literal["vivid"] | None = None


class EditRequest(PictureParameters):
    """Fields of `POST /v1/images/edits` beside its files."""

    input_fidelity: Literal["low"] | None = None


class Picture(BaseModel):
    """One picture of an answer; its metadata repeats how it was made."""

    b64_json: str
    seed: int


class InputDetails(BaseModel):
    """Tokens of a prompt."""

    text_tokens: int
    image_tokens: int


class OutputDetails(BaseModel):
    """Tokens of what was made."""

    text_tokens: int
    image_tokens: int


class PictureUsage(BaseModel):
    """Tokens of a request for pictures."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ImagesResponse(BaseModel):
    """Pictures, and what made them: `model`, `version`, `fingerprint`, `steps`, `guidance_scale` and each `seed` are
    extensions. Every picture was made by an AI model, and says so in its metadata."""

    created: int
    data: list[Picture]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    size: str
    usage: PictureUsage
    model: str
    version: str | None
    fingerprint: str
    steps: int
    guidance_scale: float


class PartialPictureEvent(BaseModel):
    """A picture on the way, in a stream; `image_index` (extension) is which of the n."""

    type: Annotated[str, Field(pattern=r"^image_(generation|edit)\.partial_image$")]
    b64_json: str
    background: Literal["opaque"] = "opaque"
    created_at: int
    output_format: OutputFormat
    partial_image_index: int
    quality: Literal["auto"] = "auto"
    size: str
    image_index: int


class CompletedPictureEvent(BaseModel):
    """A picture, in a stream; the last fields are extensions, as in an answer that isn't one."""

    type: Annotated[str, Field(pattern=r"^image_(generation|edit)\.completed$")]
    b64_json: str
    background: Literal["opaque"] = "opaque"
    created_at: int
    output_format: OutputFormat
    quality: Literal["auto"] = "auto"
    size: str
    usage: PictureUsage
    image_index: int
    seed: int
    model: str
    version: str | None
    fingerprint: str
    steps: int
    guidance_scale: float


STREAM_EVENTS = (PartialPictureEvent, CompletedPictureEvent)
_ANSWER: dict[str, Any] = {
    "model": ImagesResponse,
    **described_stream("the pictures; with `stream`, server-sent events", *(model.__name__ for model in STREAM_EVENTS)),
}
_PICTURE_FILE = {"type": "string", "format": "binary", "description": "a picture's file"}


def add_image_routes(router: APIRouter, backend: Backend, settings: ApiSettings) -> None:
    """Both endpoints, in front of `backend`."""
    errors = documented(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)

    async def answer(request: Request, body: PictureParameters, images: tuple[bytes, ...]) -> Response:
        check_count(body.n, settings)
        orders = picture_orders(body, images)
        source = watched(request, [backend.draw(order) for order in orders], settings.request_timeout_s)
        kind: Kind = "image_edit" if images else "image_generation"
        if body.stream:
            return await begin_stream(request, source, lambda events: _stream(events, body, orders, kind))
        try:
            result = await _collect(source, body, len(orders))
        finally:
            await source.aclose()
        return Response(result.model_dump_json(), media_type="application/json")

    @router.post(
        GENERATIONS_PATH,
        responses={200: _ANSWER, **errors},
        summary="Draw pictures of a text",
        response_model=None,
    )
    async def generate(request: Request, body: GenerationRequest) -> Response:
        return await answer(request, body, ())

    @router.post(
        EDITS_PATH,
        responses={200: _ANSWER, **errors},
        summary="Change pictures as a text says",
        openapi_extra={
            "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _edit_schema()}}}
        },
        response_model=None,
    )
    async def edit(request: Request) -> Response:
        body, images = await _read_form(request)
        return await answer(request, body, images)


def picture_orders(request: PictureParameters, images: tuple[bytes, ...] = ()) -> list[PictureOrder]:
    """The pictures that a request asks for; without a seed, at a random one. Raises: RefusedError (400)."""
    if not request.prompt.strip():
        raise RefusedError(400, "The prompt is blank; describe a picture.", "prompt", "invalid_value")
    if request.partial_images and not request.stream:
        message = "Invalid 'partial_images': they come in a stream; send stream: true with them."
        raise RefusedError(400, message, "partial_images", "invalid_value")
    if request.output_compression not in (None, 100) and request.output_format in (None, "png"):
        message = "Invalid 'output_compression': PNG is lossless; send output_format jpeg or webp with it."
        raise RefusedError(400, message, "output_compression", "invalid_value")
    seed = pick_seed(request.seed)
    size = parse_size(request.size)
    lot = Lot()
    return [
        PictureOrder(
            request.prompt,
            PictureSettings(seed + index, request.steps, size, request.guidance_scale),
            images,
            request.partial_images or 0,
            request.model,
            lot,
        )
        for index in range(request.n or 1)
    ]


def check_count(n: int | None, settings: ApiSettings) -> None:
    """Raises: RefusedError (400) if so many answers never have room at one time; a 429 would have clients come back."""
    if n is not None and n > settings.max_orders:
        message = f"Invalid 'n': {n}, but this server works on {settings.max_orders} answers at most at one time."
        raise RefusedError(400, message, "n", "invalid_value")


def pick_seed(seed: int | None) -> int:
    """The seed given, or a random one that leaves room for as many after it as a request may have answers."""
    return secrets.randbelow(MAX_SEED - MAX_CHOICES) if seed is None else seed


def parse_size(size: str | None) -> tuple[int, int] | None:
    """(height, width) of `WIDTHxHEIGHT`; None leaves it to the model. Raises: RefusedError (400)."""
    if size is None or size == "auto":
        return None
    found = _SIZE.fullmatch(size)
    if found is None:
        message = f'Invalid size {size[:40]!r}: expected "WIDTHxHEIGHT", such as "96x96", or "auto".'
        raise RefusedError(400, message, param="size", code="invalid_value")
    width, height = int(found[1]), int(found[2])
    if width % SIZE_MULTIPLE or height % SIZE_MULTIPLE or width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        message = (
            f"Invalid size {size!r}: width and height must be multiples of {SIZE_MULTIPLE}, at most {MAX_SIDE} each "
            f"and at most {MAX_PIXELS} pixels in all."
        )
        raise RefusedError(400, message, param="size", code="invalid_value")
    return height, width


def format_size(size: tuple[int, int]) -> str:
    """(height, width) as clients write it."""
    return f"{size[1]}x{size[0]}"


async def _collect(
    events: AsyncIterator[tuple[int, PictureEvent]], body: PictureParameters, num_pictures: int
) -> ImagesResponse:
    drawings: dict[int, Drawing] = {}
    usages: list[Usage] = []
    async for index, event in events:
        if isinstance(event, Drawing):
            drawings[index] = event
        elif isinstance(event, Finished):
            usages.append(event.usage)
    output_format, quality = body.output_format or "png", _quality(body)
    first = drawings[0]
    pictures = [drawings[index] for index in range(num_pictures)]
    return ImagesResponse(
        created=int(time.time()),
        data=[Picture(b64_json=await _encode(d, output_format, quality), seed=d.seed) for d in pictures],
        output_format=output_format,
        size=format_size(first.size),
        usage=_usage(usages),
        model=first.model.id,
        version=first.model.version,
        fingerprint=first.model.fingerprint,
        steps=first.steps,
        guidance_scale=first.guidance,
    )


async def _stream(
    events: AsyncIterator[tuple[int, PictureEvent]],
    body: PictureParameters,
    orders: Sequence[PictureOrder],
    kind: Kind,
) -> AsyncGenerator[bytes, None]:
    output_format, quality = body.output_format or "png", _quality(body)
    size = parse_size(body.size)
    drawings: dict[int, Drawing] = {}
    async for index, event in events:
        match event:
            case PartialPicture():
                partial = PartialPictureEvent(
                    type=f"{kind}.partial_image",
                    b64_json=await _encode(event, output_format, quality),
                    created_at=int(time.time()),
                    output_format=output_format,
                    partial_image_index=event.number,
                    size=format_size(size) if size else "auto",
                    image_index=index,
                )
                yield encode_event(partial, partial.type)
            case Drawing():
                drawings[index] = event  # its event tells what it took, which comes last
            case Finished():
                drawing = drawings.pop(index)
                completed = CompletedPictureEvent(
                    type=f"{kind}.completed",
                    b64_json=await _encode(drawing, output_format, quality),
                    created_at=int(time.time()),
                    output_format=output_format,
                    size=format_size(drawing.size),
                    usage=_usage([event.usage]),
                    image_index=index,
                    seed=drawing.seed,
                    model=drawing.model.id,
                    version=drawing.model.version,
                    fingerprint=drawing.model.fingerprint,
                    steps=drawing.steps,
                    guidance_scale=drawing.guidance,
                )
                yield encode_event(completed, completed.type)


def _quality(body: PictureParameters) -> int:
    return 100 if body.output_compression is None else body.output_compression


def _usage(usages: Sequence[Usage]) -> PictureUsage:
    prompt = sum(usage.prompt_tokens for usage in usages)
    of_images = sum(usage.prompt_image_tokens for usage in usages)
    made = sum(usage.completion_tokens for usage in usages)
    return PictureUsage(
        input_tokens=prompt,
        input_tokens_details=InputDetails(text_tokens=prompt - of_images, image_tokens=of_images),
        output_tokens=made,
        output_tokens_details=OutputDetails(text_tokens=0, image_tokens=made),
        total_tokens=prompt + made,
    )


async def _encode(picture: Drawing | PartialPicture, output_format: OutputFormat, quality: int) -> str:
    data = picture.png
    if output_format != "png":  # takes time: apart from the event loop
        if isinstance(picture, Drawing):
            data = await asyncio.to_thread(encode_drawing, picture, output_format, quality)
        else:
            data = await asyncio.to_thread(encode_partial, picture, output_format, quality)
    return base64.b64encode(data).decode()


async def _read_form(request: Request) -> tuple[EditRequest, tuple[bytes, ...]]:
    """The fields and the pictures of an edit. Raises: RefusedError (400), HTTPException for a body that is no form."""
    fields: dict[str, str] = {}
    files: list[bytes] = []
    num_fields = len(EditRequest.model_fields)
    async with request.form(max_files=MAX_GIVEN_IMAGES, max_fields=num_fields + 1, max_part_size=MIB) as form:
        for name, value in form.multi_items():
            if name in ("image", "image[]"):
                if not isinstance(value, UploadFile):
                    message = f"Invalid {name!r}: send a picture as a file, with a filename."
                    raise RefusedError(400, message, "image", "invalid_type")
                files.append(await value.read())
            elif name == "mask":
                raise RefusedError(
                    400, "Masks are not supported: say in the prompt what to change.", "mask", "unsupported_parameter"
                )
            elif isinstance(value, UploadFile) and name in EditRequest.model_fields:
                raise RefusedError(400, f"Invalid {name[:80]!r}: expected text, not a file.", name, "invalid_type")
            elif name in fields:
                raise RefusedError(400, f"Invalid {name[:80]!r}: given twice.", name[:80], "invalid_value")
            elif value != "" or name not in EditRequest.model_fields or name == "prompt":
                fields[name] = str(value) if isinstance(value, str) else ""  # an empty field is a null
    try:
        body = EditRequest.model_validate_strings(fields)
    except ValidationError as error:
        details = [{**detail, "loc": ("body", *detail["loc"])} for detail in error.errors(include_url=False)]
        raise refusal_of_validation(details) from None
    if not files:
        message = "Missing required parameter: 'image'; send one or several files as image or image[]."
        raise RefusedError(400, message, "image", "missing_required_parameter")
    for picture in files:
        await check_picture(picture, "image")
    return body, tuple(files)


def _edit_schema() -> dict[str, Any]:
    schema = EditRequest.model_json_schema()
    schema["properties"] = {
        "image": _PICTURE_FILE,
        "image[]": {"type": "array", "items": _PICTURE_FILE, "maxItems": MAX_GIVEN_IMAGES},
        **schema["properties"],
    }
    schema["anyOf"] = [{"required": ["image"]}, {"required": ["image[]"]}]
    return schema
