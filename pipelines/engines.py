"""The engines of `nexusgen` as a replica runs them: orders in, events out. torch is imported when one is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nexusgen.errors import InputError, SampleError
from nexusgen.schema import IMAGE_MARK, Message
from pipelines.engine_loop import EngineEvent
from pipelines.orders import ChatOrder, PictureOrder, PictureSettings, Text, Usage, picture_to_edit

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from nexusgen.model.decoder import ConditionerKind
    from nexusgen.model.weights import Model
    from nexusgen.reply_engine import ReplyEngine
    from nexusgen.writing import Prompt, SamplingParams


@dataclass(frozen=True)
class Predicted:
    """What the language model wants drawn: embeddings [tokens, hidden], and those of the picture that is edited."""

    embeddings: np.ndarray  # float32, which holds bfloat16 exactly
    reference: np.ndarray | None = None


@dataclass(frozen=True)
class Replied:
    """The end of a reply."""

    reason: str
    usage: Usage


@dataclass(frozen=True)
class ReplyRequest:
    """An order to the language model, its pictures decoded, for one of the versions on it."""

    order: ChatOrder | PictureOrder
    images: tuple[Image.Image, ...]
    variant: str | None  # the adapter's name; None: the model itself
    can_edit: bool  # the version has a decoder that wants the embeddings of what is edited


class ReplyWork:
    """The language model: chat orders become texts and predictions, picture orders one prediction.

    Several versions may be on it, as adapters; `variants` is to be changed on the thread that steps alone.
    """

    def __init__(self, model: Model, num_slots: int, max_length: int, deterministic: bool) -> None:
        from nexusgen.variants import Variants

        assert model.autoregressive is not None
        self.variants = Variants(model.autoregressive)
        context = int(model.autoregressive.text_config.max_position_embeddings)
        self._model = model
        self._num_slots, self._max_length, self._deterministic = num_slots, min(max_length, context), deterministic
        self._engine = self._make_engine()
        self._jobs: dict[int, _ReplyJob] = {}

    @property
    def has_room(self) -> bool:
        return self._engine.num_free > 0

    @property
    def num_in_step(self) -> int:
        return len(self._jobs)

    def join(self, request: ReplyRequest) -> int:
        order, images = request.order, request.images
        prompt, params = self._prompt(order, images)
        usage = Usage(len(prompt.conversation.input_ids), 0, len(prompt.input_embeddings))
        job = _ReplyJob(order, usage, self._reference(order, images) if request.can_edit else None)
        ticket = self._engine.join(prompt, params, request.variant)
        self._jobs[ticket] = job
        return ticket

    def step(self) -> Sequence[EngineEvent]:
        events: list[EngineEvent] = []
        for piece in self._engine.step():
            job = self._jobs.get(piece.row)
            if job is not None:
                events += self._events(piece, job)
        return events

    def leave(self, ticket: int) -> None:
        if self._jobs.pop(ticket, None) is not None:
            self._engine.leave(ticket)

    def recover(self) -> Sequence[int]:
        lost = list(self._jobs)
        self._jobs.clear()
        self._engine = self._make_engine()  # what is left of the old one can't be trusted
        return lost

    def _make_engine(self) -> ReplyEngine:
        from nexusgen.reply_engine import ReplyEngine

        model = self._model
        assert model.autoregressive is not None
        assert model.tokenizer is not None
        return ReplyEngine(
            model.autoregressive,
            model.tokenizer,
            self._num_slots,
            self._max_length,
            deterministic=self._deterministic,
            variants=self.variants,
        )

    def weights(self) -> Iterator[Tensor]:
        """All tensors of weights in memory."""
        return self.variants.tensors()

    def _events(self, piece: Any, job: _ReplyJob) -> list[EngineEvent]:
        ticket, order = piece.row, job.order
        if piece.image is not None:
            made = Predicted(piece.image.float().cpu().numpy(), job.reference)
            if isinstance(order, PictureOrder):  # nothing is wanted after it
                self.leave(ticket)
                usage = replace(job.usage, completion_tokens=len(piece.image))
                return [EngineEvent(ticket, made), EngineEvent(ticket, Replied("stop", usage), is_last=True)]
            return [EngineEvent(ticket, made)]
        if piece.reply is not None:
            del self._jobs[ticket]
            usage = replace(job.usage, completion_tokens=len(piece.reply.token_ids))
            return [EngineEvent(ticket, Replied(piece.reply.finish_reason, usage), is_last=True)]
        return [] if isinstance(order, PictureOrder) else [EngineEvent(ticket, Text(piece.text))]

    def _prompt(self, order: ChatOrder | PictureOrder, images: Sequence[Image.Image]) -> tuple[Prompt, SamplingParams]:
        from nexusgen.sampling import check_instruction, check_prompt, drawing_params, read_conversation
        from nexusgen.writing import SamplingParams

        if isinstance(order, PictureOrder):
            (check_instruction if images else check_prompt)(order.prompt)
            content = f"{IMAGE_MARK} " * len(images) + order.prompt.replace(IMAGE_MARK, " ")
            prompt = read_conversation(self._model, [Message("user", content)], images)
            return prompt, drawing_params(self._model.manifest.geometry)
        params = SamplingParams(
            temperature=order.temperature,
            top_p=order.top_p,
            seed=order.seed,
            stop=order.stop,
            needs_image=order.modality == "image",
            may_draw=order.modality != "text",
            **({} if order.max_tokens is None else {"max_new_tokens": order.max_tokens}),
        )
        return read_conversation(self._model, order.messages, images), params

    def _reference(self, order: ChatOrder | PictureOrder, images: Sequence[Image.Image]) -> np.ndarray | None:
        """What an editing decoder keeps to: the first picture of an edit, or of the last message of a conversation."""
        if isinstance(order, PictureOrder):
            kept = images[0] if images else None
        else:
            data = picture_to_edit(order) if order.modality != "text" else None
            kept = images[order.images.index(data)] if data is not None else None
        if kept is None:
            return None
        from nexusgen.sampling import encode_references

        return encode_references(self._model, [kept])[0].float().cpu().numpy()


@dataclass(frozen=True)
class _ReplyJob:
    order: ChatOrder | PictureOrder
    usage: Usage  # of the prompt
    reference: np.ndarray | None


@dataclass(frozen=True)
class DrawRequest:
    """What a decoder draws."""

    predicted: Predicted
    settings: PictureSettings
    num_partial: int = 0


class DrawWork:
    """A decoder: predictions become pictures (PIL), of which partial ones have a number."""

    def __init__(self, model: Model, kind: ConditionerKind, max_batch: int, deterministic: bool) -> None:
        from nexusgen.denoising import DenoisingEngine

        self._model = model
        self._engine = DenoisingEngine(model, kind, max_batch, deterministic=deterministic)

    def weights(self) -> Iterator[Tensor]:
        """All tensors of weights in memory."""
        for part in (self._model.generation_decoder, self._model.editing_decoder, self._model.autoencoder):
            if part is not None:
                yield from part.state_dict().values()

    has_room = True  # the engine has its own order of what waits: pictures of all sizes take turns

    @property
    def num_in_step(self) -> int:
        return len(self._engine.next_tickets)

    def join(self, request: DrawRequest) -> int:
        import torch

        from nexusgen.denoising import DenoisingRequest

        settings, reference = request.settings, request.predicted.reference
        device = self._model.device
        return self._engine.join(
            DenoisingRequest(
                embeddings=torch.from_numpy(request.predicted.embeddings).to(device, self._model.dtype),
                seed=settings.seed,
                steps=settings.steps,
                size=settings.size,
                true_cfg_scale=settings.guidance,
                reference=None if reference is None else torch.from_numpy(reference).to(device, self._model.dtype),
                num_partial=request.num_partial,
            )
        )

    def step(self) -> Sequence[EngineEvent]:
        numbers = [(event, getattr(event, "number", None)) for event in self._engine.step()]
        return [EngineEvent(event.ticket, (event.image, number), is_last=number is None) for event, number in numbers]

    def leave(self, ticket: int) -> None:
        self._engine.leave(ticket)

    def recover(self) -> Sequence[int]:
        lost = self._engine.next_tickets
        for ticket in lost:
            self._engine.leave(ticket)
        return lost


def decode_order(order: ChatOrder | PictureOrder, variant: str | None, can_edit: bool) -> ReplyRequest:
    """An order with its pictures decoded, as `ReplyRequest` has it. Raises: InputError for one that can't be used."""
    from nexusgen.images import decode_image

    images = []
    for number, data in enumerate(order.images, start=1):
        try:
            images.append(decode_image(data))
        except SampleError as error:
            raise InputError(f"image {number} can't be used: {error.reason}") from None
    return ReplyRequest(order, tuple(images), variant, can_edit)
