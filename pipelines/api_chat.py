"""`POST /v1/chat/completions`: conversations of text and pictures, answered by both.

A picture in an answer stands beside its text, in `images` of a message or of a stream's delta, and `content` stays a
string: the shape that Open WebUI, LiteLLM and OpenRouter speak. Sent back with the assistant's message, it is an
`<image>` mark there: the model goes on from what it predicted then, not from the pixels. `offset` of an image says how
much of the content stood before it; clients that drop it have their images at the content's end.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from nexusgen.messages import MAX_PROMPT_CHARACTERS, plain_text
from nexusgen.schema import IMAGE_MARK, Message
from pipelines.api_errors import RefusedError, documented
from pipelines.api_guard import CHAT_PATH
from pipelines.api_images import (
    GuidanceScale,
    Label,
    Seed,
    Size,
    Steps,
    check_count,
    format_size,
    parse_size,
    pick_seed,
)
from pipelines.api_inputs import PictureReader
from pipelines.api_settings import (
    MAX_CHOICES,
    MAX_GIVEN_IMAGES,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_PICTURE_BYTES,
    ApiSettings,
)
from pipelines.api_stream import DONE, begin_stream, described_stream, encode_event, watched
from pipelines.orders import (
    Backend,
    ChatEvent,
    ChatOrder,
    Drawing,
    Finished,
    Lot,
    Modality,
    ModelInfo,
    PictureSettings,
    Text,
    UnavailableError,
    Usage,
)

MAX_STOPS = 4  # OpenAI's limit
MAX_TOOLS = 128  # OpenAI's limit
MAX_NEW_TOKENS = 1_000_000  # beyond every context

_STRICT = ConfigDict(extra="forbid", strict=True)
_Words = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
_Url = Annotated[str, Field(max_length=MAX_PICTURE_BYTES * 4 // 3 + 256)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_PartLimit = Field(max_length=MAX_PARTS)


class ImageUrl(BaseModel):
    """Where a picture is: a data URI, or an http(s) URL of a host that the server allows."""

    model_config = _STRICT

    url: _Url
    detail: Annotated[
        Literal["auto", "low", "high"] | None, Field(description="changes nothing: pictures are seen in one way")
    ] = None


class TextPart(BaseModel):
    """A piece of text."""

    model_config = _STRICT

    type: Literal["text"]
    text: _Words


class ImagePart(BaseModel):
    """A picture that the user gives."""

    model_config = _STRICT

    type: Literal["image_url"]
    image_url: ImageUrl


class EarlierImage(BaseModel):
    """A picture of an earlier answer, sent back; its data isn't looked at, and may be left out."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["image_url"] = "image_url"
    offset: Annotated[int, Field(ge=0, description="characters of the content that stand before it")] | None = None


class SystemMessage(BaseModel):
    """How the model is to behave; stands first."""

    model_config = _STRICT

    role: Literal["system", "developer"]
    content: _Words | Annotated[list[TextPart], _PartLimit]
    name: Label | None = None


class UserMessage(BaseModel):
    """What the user says and shows."""

    model_config = _STRICT

    role: Literal["user"]
    content: _Words | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], _PartLimit]
    name: Label | None = None


class AssistantMessage(BaseModel):
    """An earlier answer, as it was given."""

    model_config = _STRICT

    role: Literal["assistant"]
    content: _Words | Annotated[list[TextPart], _PartLimit] | None = None
    images: Annotated[list[EarlierImage], Field(max_length=MAX_GIVEN_IMAGES)] | None = None
    name: Label | None = None
    # What OpenAI's clients send back of an answer that had none of them.
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


class StreamOptions(BaseModel):
    """What a stream tells beside the answer."""

    model_config = _STRICT

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextFormat(BaseModel):
    """The only format of text that there is."""

    model_config = _STRICT

    type: Literal["text"]


class ChatRequest(BaseModel):
    """Body of `POST /v1/chat/completions`; OpenAI's clients send null for what they leave open.

    The last fields are taken at the values that ask for nothing, as clients send these. Tools may be offered, as Open
    WebUI does with every message: a model may always answer without one, and this one does.
    """

    model_config = _STRICT

    messages: Annotated[
        list[Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]],
        Field(min_length=1, max_length=MAX_MESSAGES),
    ]
    model: Label | None = None
    modalities: (
        Annotated[
            list[Literal["text", "image"]],
            Field(
                min_length=1,
                max_length=2,
                description='["text"] if left out; ["image"] forces a picture, ["text", "image"] lets the model decide',
            ),
        ]
        | None
    ) = None
    temperature: (
        Annotated[float, Field(ge=0, le=2, allow_inf_nan=False, description="0, the likeliest words, if left out")]
        | None
    ) = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[Seed, Field(description="answer i, text and pictures, is drawn from seed + i")] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    size: Annotated[Size, Field(description="extension: of pictures in the answer, as in /v1/images")] | None = None
    steps: Annotated[Steps, Field(description="extension: of pictures in the answer")] | None = None
    guidance_scale: Annotated[GuidanceScale, Field(description="extension: of pictures in the answer")] | None = None

    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    response_format: TextFormat | None = None
    tools: (
        Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS, description="may be offered; none is ever called")]
        | None
    ) = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: Label | None = None


class SentUrl(BaseModel):
    """A picture as a data URI."""

    url: str


class SentImage(BaseModel):
    """A picture of an answer; all but the first three fields are extensions. An AI model made it, as its own metadata
    says."""

    index: int
    type: Literal["image_url"] = "image_url"
    image_url: SentUrl
    offset: int
    seed: int
    steps: int
    size: str
    guidance_scale: float


class SentMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    images: list[SentImage]


class Choice(BaseModel):
    """One of the n answers."""

    index: int
    message: SentMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class PromptDetails(BaseModel):
    """Tokens of a prompt that are pictures."""

    image_tokens: int


class ChatUsage(BaseModel):
    """Tokens of a request; the prompt counts once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ChatResponse(BaseModel):
    """The answers, and what made them: `version` and `seed` are extensions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    version: str | None
    seed: int
    choices: list[Choice]
    usage: ChatUsage


class Delta(BaseModel):
    """What is new in an answer."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    images: list[SentImage] = []


class ChunkChoice(BaseModel):
    """What is new in one of the n answers."""

    index: int
    delta: Delta
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(BaseModel):
    """One event of a stream; the fingerprint comes with the finish reason, when the maker is known for certain."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str | None = None
    version: str | None = None
    seed: int = 0
    choices: list[ChunkChoice]
    usage: ChatUsage | None = None


def add_chat_routes(router: APIRouter, backend: Backend, settings: ApiSettings) -> None:
    """The endpoint, in front of `backend`."""
    reader = PictureReader(settings.allowed_image_hosts)

    @router.post(
        CHAT_PATH,
        responses={
            200: {
                "model": ChatResponse,
                **described_stream("the answer; with `stream`, server-sent events, and [DONE]", ChatChunk.__name__),
            },
            **documented(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504),
        },
        summary="Answer a conversation",
        response_model=None,
    )
    async def chat(request: Request, body: ChatRequest) -> Response:
        _check(body)
        check_count(body.n, settings)
        messages, urls = conversation(body)
        orders = chat_orders(body, messages, await reader.read_urls(urls))
        source = watched(request, [backend.chat(order) for order in orders], settings.request_timeout_s)
        if body.stream:
            name = body.model if body.model is not None else await _default_model(backend)
            return await begin_stream(request, source, lambda events: _stream(events, body, orders, name))
        try:
            result = await _collect(source, orders)
        finally:
            await source.aclose()
        return Response(result.model_dump_json(), media_type="application/json")


async def _default_model(backend: Backend) -> str:
    loaded = await backend.models()
    if not loaded:
        raise UnavailableError("No model is loaded; try again shortly.")
    return loaded[0].id


def _check(body: ChatRequest) -> None:
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        message = "Both 'max_tokens' and 'max_completion_tokens' are given; send one of them."
        raise RefusedError(400, message, "max_tokens", "invalid_value")
    if body.stream_options is not None and not body.stream:
        message = "Invalid 'stream_options': there is no stream; send stream: true with it."
        raise RefusedError(400, message, "stream_options", "invalid_value")
    if body.messages[-1].role != "user":
        message = "Invalid 'messages': the last message must be the user's."
        raise RefusedError(400, message, "messages", "invalid_value")


def conversation(body: ChatRequest) -> tuple[tuple[Message, ...], list[tuple[str, str]]]:
    """The messages as the model reads them, and the (URL, parameter) of the pictures that the user's marks stand for.

    Text in which `<image>` is written is no mark. Raises: RefusedError (400).
    """
    mark_gap = " " if _modality(body) == "image" else "\n"  # what follows a picture in edits, and in questions
    system: list[str] = []
    messages: list[Message] = []
    urls: list[tuple[str, str]] = []
    for number, said in enumerate(body.messages):
        place = f"messages[{number}]"
        match said:
            case SystemMessage():
                if messages:
                    text = f"Invalid '{place}': messages of system or developer may only stand first."
                    raise RefusedError(400, text, place, "invalid_value")
                system.append(plain_text(_text_of(said.content)))
            case AssistantMessage():
                messages.append(Message("assistant", _with_images(_text_of(said.content), said.images or [])))
            case UserMessage():
                content, found = _join_parts(said.content, mark_gap, place)
                messages.append(Message("user", content))
                urls += found
    if not messages[-1].content.strip():
        raise RefusedError(400, "Invalid 'messages': the last message is empty.", "messages", "invalid_value")
    if len(urls) > MAX_GIVEN_IMAGES:
        text = f"Invalid 'messages': {len(urls)} pictures are given; at most {MAX_GIVEN_IMAGES} are accepted."
        raise RefusedError(400, text, "messages", "too_many_images")
    num_characters = sum(map(len, system)) + sum(len(message.content) for message in messages)
    if num_characters > MAX_PROMPT_CHARACTERS:
        text = f"Invalid 'messages': {num_characters} characters; at most {MAX_PROMPT_CHARACTERS} are accepted."
        raise RefusedError(400, text, "messages", "string_above_max_length")
    first = [Message("system", "\n\n".join(system))] if system else []
    return (*first, *messages), urls


def chat_orders(body: ChatRequest, messages: Sequence[Message], images: tuple[bytes, ...]) -> list[ChatOrder]:
    """The answers that a request asks for, answer i at seed + i. Raises: RefusedError (400)."""
    seed = pick_seed(body.seed)
    size = parse_size(body.size)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    lot = Lot()
    return [
        ChatOrder(
            messages=tuple(messages),
            images=images,
            picture=PictureSettings(seed + index, body.steps, size, body.guidance_scale),
            modality=_modality(body),
            max_tokens=body.max_completion_tokens or body.max_tokens,
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            stop=stop,
            seed=seed + index,
            model=body.model,
            lot=lot,
        )
        for index in range(body.n or 1)
    ]


def _modality(body: ChatRequest) -> Modality:
    wanted = set(body.modalities or ["text"])
    return "auto" if len(wanted) == 2 else "image" if wanted == {"image"} else "text"


def _text_of(content: str | list[TextPart] | None) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content or [])


def _join_parts(
    content: str | list[TextPart | ImagePart], mark_gap: str, place: str
) -> tuple[str, list[tuple[str, str]]]:
    """A user's parts as one text with marks: pieces of text on lines of their own, marks set off by `mark_gap`.

    Texts are joined before written marks are taken out of them, as two halves of one may stand in two parts.
    """
    if isinstance(content, str):
        return plain_text(content), []
    pieces: list[str | None] = []  # None is a mark
    urls: list[tuple[str, str]] = []
    for number, part in enumerate(content):
        if isinstance(part, ImagePart):
            urls.append((part.image_url.url, f"{place}.content[{number}].image_url"))
            pieces.append(None)
        elif pieces and pieces[-1] is not None:
            pieces[-1] += f"\n{part.text}"
        else:
            pieces.append(part.text)
    return mark_gap.join(IMAGE_MARK if piece is None else plain_text(piece) for piece in pieces), urls


def _with_images(content: str, images: Sequence[EarlierImage]) -> str:
    """An earlier answer, with marks where its images stood."""
    places = sorted(len(content) if image.offset is None else min(image.offset, len(content)) for image in images)
    cuts = [0, *places, len(content)]
    return IMAGE_MARK.join(plain_text(content[start:end]) for start, end in pairwise(cuts))


@dataclass
class _Answer:
    """One of the n answers, as far as it has come."""

    text: str = ""
    images: list[SentImage] = field(default_factory=list)
    finished: Finished | None = None

    def add(self, drawing: Drawing) -> SentImage:
        image = SentImage(
            index=len(self.images),
            image_url=SentUrl(url=f"data:image/png;base64,{base64.b64encode(drawing.png).decode()}"),
            offset=len(self.text),
            seed=drawing.seed,
            steps=drawing.steps,
            size=format_size(drawing.size),
            guidance_scale=drawing.guidance,
        )
        self.images.append(image)
        return image


async def _collect(events: AsyncIterator[tuple[int, ChatEvent]], orders: Sequence[ChatOrder]) -> ChatResponse:
    answers = [_Answer() for _ in orders]
    async for index, event in events:
        match event:
            case Text():
                answers[index].text += event.text
            case Drawing():
                answers[index].add(event)
            case Finished():
                answers[index].finished = event
    made = [answer.finished for answer in answers if answer.finished is not None]
    model = made[0].model
    return ChatResponse(
        id=_new_id(),
        created=int(time.time()),
        model=model.id,
        system_fingerprint=model.fingerprint,
        version=model.version,
        seed=orders[0].seed,
        choices=[
            Choice(
                index=index,
                message=SentMessage(content=answer.text, images=answer.images),
                finish_reason=finished.reason,
            )
            for index, (answer, finished) in enumerate(zip(answers, made, strict=True))
        ],
        usage=_usage([finished.usage for finished in made]),
    )


async def _stream(
    events: AsyncIterator[tuple[int, ChatEvent]], body: ChatRequest, orders: Sequence[ChatOrder], name: str
) -> AsyncGenerator[bytes, None]:
    has_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    answers = [_Answer() for _ in orders]
    usages: list[Usage] = []
    head = {"id": _new_id(), "object": "chat.completion.chunk", "created": int(time.time())}
    maker: ModelInfo | None = None

    def chunk(choices: list[ChunkChoice], usage: ChatUsage | None = None) -> bytes:
        said: dict[str, Any] = {**head, "model": name, "system_fingerprint": None, "choices": choices}
        said["seed"] = orders[0].seed
        if maker is not None:
            said |= {"model": maker.id, "system_fingerprint": maker.fingerprint, "version": maker.version}
        if has_usage:
            said["usage"] = usage
        return encode_event(ChatChunk(**said), exclude_unset=True)

    for index in range(len(orders)):
        yield chunk([ChunkChoice(index=index, delta=Delta(role="assistant", content=""), finish_reason=None)])
    async for index, event in events:
        match event:
            case Text():
                answers[index].text += event.text
                yield chunk([ChunkChoice(index=index, delta=Delta(content=event.text), finish_reason=None)])
            case Drawing():
                image = answers[index].add(event)
                sent = {**image.model_dump(), "type": "image_url"}
                delta = Delta(images=[SentImage(**sent)])
                yield chunk([ChunkChoice(index=index, delta=delta, finish_reason=None)])
            case Finished():
                maker = event.model
                usages.append(event.usage)
                yield chunk([ChunkChoice(index=index, delta=Delta(), finish_reason=event.reason)])
    if has_usage:
        yield chunk([], _usage(usages))
    yield DONE


def _usage(usages: Sequence[Usage]) -> ChatUsage:
    prompt = max(usage.prompt_tokens for usage in usages)
    made = sum(usage.completion_tokens for usage in usages)
    return ChatUsage(
        prompt_tokens=prompt,
        completion_tokens=made,
        total_tokens=prompt + made,
        prompt_tokens_details=PromptDetails(image_tokens=max(usage.prompt_image_tokens for usage in usages)),
    )


def _new_id() -> str:
    return f"chatcmpl-{secrets.token_hex(12)}"
