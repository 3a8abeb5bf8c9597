"""What the HTTP door and whoever computes say to each other: orders in, events out. Plain data, without Ray or FastAPI.

The door (`api.py`) checks a request and makes orders of it; a `Backend` answers each with a stream of events: behind
Ray Serve that of `ingress.py`, in tests a plain object around a loaded model.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from nexusgen.errors import NexusgenError
from nexusgen.schema import IMAGE_MARK, Message

Modality = Literal["auto", "text", "image"]  # what an answer must hold; auto: the model decides


class UnavailableError(NexusgenError):
    """The model can't answer now: it is loading, gone or does not reply."""


class OverloadedError(NexusgenError):
    """The queue is full; the client should come back after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class UnknownModelError(NexusgenError):
    """No model of the name that was asked for is loaded."""


@dataclass(frozen=True)
class ModelInfo:
    """What is really loaded. `id` is what requests call it; `version` is None for a model that isn't registered."""

    id: str
    version: str | None
    fingerprint: str
    parts: tuple[str, ...]  # of the model folder: an editing decoder may be absent
    image_size: tuple[int, int]  # (height, width) in pixels that it draws by default
    steps: int  # that it draws in by default
    loaded_at: int  # seconds since 1970
    refused: str = ""  # the version that its alias points to instead, and why that can't be served


@dataclass(eq=False)
class Lot:
    """What decides which version answers: one for all orders of a request, so that all its answers are of one version.

    `number`, from 0 up to 1, is drawn: below the canary's share the request goes to the canary. The backend keeps in
    `picked` what it has picked for the first of the orders, and whether something of an answer has gone out since.
    """

    number: float = field(default_factory=random.random)
    picked: Any = None
    has_begun: bool = False


@dataclass(frozen=True)
class PictureSettings:
    """How a picture is drawn; None leaves it to the model. `size` is (height, width) in pixels."""

    seed: int
    steps: int | None = None
    size: tuple[int, int] | None = None
    guidance: float | None = None  # true_cfg_scale: 1 is one pass a step, more is two


@dataclass(frozen=True)
class PictureOrder:
    """One picture to draw from a text or, with `images`, an edit of these (compressed files; the first is kept to)."""

    prompt: str
    settings: PictureSettings
    images: tuple[bytes, ...] = ()
    num_partial: int = 0  # pictures to show of the way there
    model: str | None = None  # id; None: the default
    lot: Lot = field(default_factory=Lot, compare=False)  # one with the other orders of the request


@dataclass(frozen=True)
class ChatOrder:
    """One reply to a conversation. `images` are those that the user gives, one for each `<image>` of the user's."""

    messages: tuple[Message, ...]
    images: tuple[bytes, ...]
    picture: PictureSettings  # of the pictures that the reply may hold
    modality: Modality = "text"
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0  # of the text
    model: str | None = None
    lot: Lot = field(default_factory=Lot, compare=False)  # one with the other orders of the request


@dataclass(frozen=True)
class Text:
    """Some more text of a reply."""

    text: str


@dataclass(frozen=True)
class PartialPicture:
    """What a picture looks like on the way: PNG, its number from 0 on."""

    png: bytes
    number: int


@dataclass(frozen=True)
class Drawing:
    """One picture drawn: its PNG, and what it was made by and from, as the maker itself says."""

    png: bytes
    model: ModelInfo
    seed: int
    steps: int
    size: tuple[int, int]
    guidance: float = 1.0


@dataclass(frozen=True)
class Usage:
    """Tokens of a request, those of images included; `prompt_image_tokens` are those of the images given."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_image_tokens: int = 0


@dataclass(frozen=True)
class Finished:
    """The end of a reply: `stop` or `length`."""

    reason: Literal["stop", "length"]
    model: ModelInfo
    usage: Usage = field(default_factory=Usage)


def picture_to_edit(order: ChatOrder) -> bytes | None:
    """What a picture in the reply is an edit of: the first one that the user gives in the last message, if any.

    Pictures given earlier are part of the conversation, but a reply that draws doesn't keep to them.
    """
    num_given = [message.content.count(IMAGE_MARK) for message in order.messages if message.role == "user"]
    return order.images[sum(num_given[:-1])] if num_given and num_given[-1] else None


PictureEvent = PartialPicture | Drawing | Finished
ChatEvent = Text | Drawing | Finished


class Backend(Protocol):
    """Whoever computes.

    The iterators raise UnavailableError, OverloadedError, UnknownModelError, or InputError for what can't be drawn or
    read; the first two before their first event or in the middle. A full queue and an unknown model are told at once,
    not when the work begins, as a stream that has begun has no status left to say it with. Closing an iterator, or
    cancelling who waits for its next event, stops the work behind it.
    """

    async def models(self) -> list[ModelInfo]:
        """What is loaded, the default first, asked of what would answer. Raises: UnavailableError."""
        ...

    def draw(self, order: PictureOrder) -> AsyncIterator[PictureEvent]:
        """Partial pictures, the drawing, and last `Finished` with the tokens that it took."""
        ...

    def chat(self, order: ChatOrder) -> AsyncIterator[ChatEvent]:
        """A reply piece by piece, `Finished` last."""
        ...
