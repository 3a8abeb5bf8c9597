"""A model behind a lock, in this process: the API's plainest backend, and the one that `serve` has to beat.

One thread computes, one request after another, step by step, so that a client that leaves stops its work at the next
step. Tests run the API in front of it; `serve.py` measures against it.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from nexusgen import defaults
from nexusgen.errors import InputError, SampleError
from nexusgen.flow_matching import euler_step, inference_sigmas, initial_noise
from nexusgen.images import decode_image, from_pixels, input_size
from nexusgen.model.autoencoder import decode_latents, latent_shape
from nexusgen.model.weights import Model, load_model
from nexusgen.prompts import encode_prompt
from nexusgen.replies import MAX_NEW_TOKENS, SamplingParams
from nexusgen.sampling import check_prompt, check_size, encode_references, respond
from nexusgen.schema import IMAGE_MARK, Message
from pipelines.orders import (
    ChatEvent,
    ChatOrder,
    Drawing,
    Finished,
    ModelInfo,
    OverloadedError,
    PartialPicture,
    PictureEvent,
    PictureOrder,
    PictureSettings,
    Text,
    UnknownModelError,
    Usage,
    picture_to_edit,
)
from pipelines.pictures import encode_png

EventT = TypeVar("EventT")


class LocalBackend:
    """A `Backend` around one model. More than `max_waiting` requests at the lock are refused."""

    def __init__(self, folder: Path, name: str = "nexusgen", max_waiting: int = 1000) -> None:
        self._model = load_model(folder)
        manifest = self._model.manifest
        self.info = ModelInfo(
            id=name,
            version=None,
            fingerprint=manifest.fingerprint,
            parts=tuple(manifest.parts),
            image_size=manifest.image_size,
            steps=manifest.num_inference_steps,
            loaded_at=int(time.time()),
        )
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._lock = asyncio.Lock()
        self._max_waiting = max_waiting
        self.num_waiting = 0
        self.num_running = 0

    async def models(self) -> list[ModelInfo]:
        """The one model."""
        return [self.info]

    def draw(self, order: PictureOrder) -> AsyncIterator[PictureEvent]:
        """See `Backend`."""
        return self._run(order.model, lambda: draw_picture(self._model, self.info, order))

    def chat(self, order: ChatOrder) -> AsyncIterator[ChatEvent]:
        """See `Backend`."""
        return self._run(order.model, lambda: chat(self._model, self.info, order))

    async def _run(self, name: str | None, begin: Callable[[], Iterator[EventT | None]]) -> AsyncIterator[EventT]:
        if name not in (None, self.info.id):
            raise UnknownModelError(f"The model {name!r} does not exist; this server has {self.info.id!r}.")
        if self._lock.locked() and self.num_waiting >= self._max_waiting:
            raise OverloadedError(f"{self.num_waiting} requests wait already; try again shortly.")
        loop = asyncio.get_running_loop()
        self.num_waiting += 1
        try:
            await self._lock.acquire()
        finally:
            self.num_waiting -= 1
        self.num_running += 1
        try:
            steps = begin()
            is_over = object()
            while (event := await loop.run_in_executor(self._thread, _next, steps, is_over)) is not is_over:
                if event is not None:
                    yield event
        finally:
            self.num_running -= 1
            self._lock.release()


def _next(steps: Iterator[Any], is_over: object) -> Any:
    try:
        return next(steps, is_over)
    except SampleError as error:
        raise InputError(f"the picture can't be used: {error.reason}") from None


def draw_picture(model: Model, info: ModelInfo, order: PictureOrder) -> Iterator[PictureEvent | None]:
    """The events of a picture; None between them, where the work may be stopped."""
    check_prompt(order.prompt)
    check_size(order.settings.size or info.image_size)
    if order.images and model.editing_decoder is None:
        raise InputError(f"the model {info.id} has no editing decoder; it draws from texts alone")
    images = [decode_image(data) for data in order.images]
    content = f"{IMAGE_MARK} " * len(images) + order.prompt.replace(IMAGE_MARK, " ")
    messages = (Message("user", content),)
    embeddings = None
    for piece in respond(model, messages, images, SamplingParams(needs_image=True)):
        yield None
        if piece.image is not None:
            embeddings = piece.image
            break
    assert embeddings is not None
    reference = images[0] if images else None
    yield from _draw(model, info, embeddings, order.settings, reference, order.num_partial)
    prompt_tokens, image_tokens = count_tokens(model, messages, images)
    yield Finished("stop", info, Usage(prompt_tokens, model.manifest.geometry.num_target_tokens, image_tokens))


def chat(model: Model, info: ModelInfo, order: ChatOrder) -> Iterator[ChatEvent | None]:
    """The events of a reply; None between them, where the work may be stopped."""
    images = [decode_image(data) for data in order.images]
    given = picture_to_edit(order)
    reference = decode_image(given) if given is not None and model.editing_decoder is not None else None
    params = SamplingParams(
        max_new_tokens=order.max_tokens or MAX_NEW_TOKENS,
        temperature=order.temperature,
        top_p=order.top_p,
        seed=order.seed,
        stop=order.stop,
        needs_image=order.modality == "image",
        may_draw=order.modality != "text",
    )
    for piece in respond(model, order.messages, images, params):
        yield Text(piece.text) if piece.text else None
        if piece.image is not None and order.modality != "text":
            yield from _draw(model, info, piece.image, order.picture, reference)
        if piece.reply is not None:
            prompt_tokens, image_tokens = count_tokens(model, order.messages, images)
            usage = Usage(prompt_tokens, len(piece.reply.token_ids), image_tokens)
            yield Finished("length" if piece.reply.finish_reason == "length" else "stop", info, usage)


def count_tokens(model: Model, messages: Sequence[Message], images: Sequence[Image.Image]) -> tuple[int, int]:
    """Tokens of a conversation, and those of the images that the user gives."""
    geometry = model.manifest.geometry
    sizes = iter([input_size((image.height, image.width), geometry) for image in images])
    grids = []
    num_given = 0
    for message in messages:
        for _ in range(message.content.count(IMAGE_MARK)):
            if message.role == "assistant":
                grids.append(geometry.target_grid)
            else:
                height, width = next(sizes)
                grids.append((height // geometry.factor, width // geometry.factor))
                num_given += grids[-1][0] * grids[-1][1]
    assert model.tokenizer is not None
    return len(encode_prompt(model.tokenizer, messages, grids).input_ids), num_given


@torch.no_grad()
def _draw(
    model: Model,
    info: ModelInfo,
    embedding: Tensor,
    settings: PictureSettings,
    reference: Image.Image | None,
    num_partial: int = 0,
) -> Iterator[PartialPicture | Drawing | None]:
    """`sampling.decode_embeddings` for one picture, step by step."""
    decoder = model.generation_decoder if reference is None else model.editing_decoder
    assert decoder is not None
    assert model.autoencoder is not None
    assert model.scheduler is not None
    assert model.pooled_prompt is not None
    size, num_steps = settings.size or info.image_size, settings.steps or info.steps
    usual = model.manifest.true_cfg_scale if reference is None else defaults.EDITING_TRUE_CFG_SCALE
    guidance = settings.guidance if settings.guidance is not None else usual
    if guidance != 1 and model.negative_context is None:
        raise InputError(f"the model {info.id} has no two-pass guidance; leave guidance_scale out")
    kept = encode_references(model, [reference]) if reference is not None else None
    context = decoder.context(embedding[None], kept)
    velocity = decoder.velocity_function(
        context, model.pooled_prompt, model.negative_context, guidance, has_reference=kept is not None
    )
    sigmas = inference_sigmas(model.scheduler, num_steps)
    latents = initial_noise([settings.seed], latent_shape(model.autoencoder, size))
    shown = {round((number + 1) * num_steps / (num_partial + 1)): number for number in range(num_partial)}
    for step in range(num_steps):
        yield None
        here, there = sigmas[step].expand(1), sigmas[step + 1].expand(1)
        flow = velocity(latents, here * model.scheduler.config.num_train_timesteps)
        if step in shown:
            picture = _picture(model, euler_step(latents, flow, here, torch.zeros(1)))  # straight on to its end
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            yield PartialPicture(buffer.getvalue(), shown[step])
        latents = euler_step(latents, flow, here, there)
    png = encode_png(_picture(model, latents), info, settings.seed, num_steps, guidance)
    yield Drawing(png, info, settings.seed, num_steps, size, guidance)


def _picture(model: Model, latents: Tensor) -> Image.Image:
    assert model.autoencoder is not None
    return from_pixels(decode_latents(model.autoencoder, latents))[0]
