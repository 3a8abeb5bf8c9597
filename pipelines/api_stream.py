"""From a backend's iterators to an answer: several joined into one, timed, begun before a status is sent, closed.

Closing matters: a client that leaves must not leave work behind. The guard cancels the request's task; here, whatever
was begun is closed on the way out, whoever was waiting for whom.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nexusgen.errors import NexusgenError
from pipelines.api_errors import RefusedError, refusal_of, too_late
from pipelines.api_guard import Visit, note_fault, visit_of
from pipelines.orders import Drawing, Finished, UnavailableError

EventT = TypeVar("EventT")

Encoder = Callable[[AsyncIterator[EventT]], AsyncGenerator[bytes, None]]

DONE = b"data: [DONE]\n\n"
_END = object()
_MAX_WAITING = 16  # events that a slow client lets pile up


async def watched(
    request: Request, iterators: Sequence[AsyncIterator[EventT]], timeout_s: float
) -> AsyncGenerator[tuple[int, EventT], None]:
    """Events of a request's iterators with the number of theirs, as they come, within the request's time.

    What they say of themselves goes into the request's record.
    Raises: what the iterators raise, and RefusedError (504) when the time is over; all of them are closed then.
    """
    visit = visit_of(request)
    joined = _join(iterators)
    try:
        while True:
            try:
                async with asyncio.timeout_at(visit.deadline) as limit:
                    index, event = await anext(joined)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if limit.expired():
                    raise too_late(timeout_s) from None
                raise
            _note(event, visit)
            yield index, event
    finally:
        await joined.aclose()


async def _join(iterators: Sequence[AsyncIterator[EventT]]) -> AsyncGenerator[tuple[int, EventT], None]:
    queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue(_MAX_WAITING)

    async def pump(index: int, iterator: AsyncIterator[EventT]) -> None:
        event: object = None
        try:
            async for event in iterator:
                await queue.put((index, event))
            # An end without a reason is a worker that was lost, and a client must not take it for a whole answer.
            await queue.put((index, _END if isinstance(event, Finished) else _cut_off()))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            await queue.put((index, _cut_off()))  # not this task was cancelled, but what it waited for
        except Exception as error:
            await queue.put((index, error))
        finally:
            close = getattr(iterator, "aclose", None)
            if close is not None:
                await close()

    pumps = [asyncio.create_task(pump(index, iterator)) for index, iterator in enumerate(iterators)]
    num_open = len(pumps)
    try:
        while num_open:
            index, item = await queue.get()
            if item is _END:
                num_open -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield index, item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.wait(pumps)


def _cut_off() -> UnavailableError:
    return UnavailableError("The answer was cut off in the middle; try again.")


def _note(event: object, visit: Visit) -> None:
    visit.note_event()
    if isinstance(event, Drawing):
        visit.num_pictures += 1
    elif isinstance(event, Finished):
        visit.model = event.model.id
        visit.prompt_tokens += event.usage.prompt_tokens
        visit.completion_tokens += event.usage.completion_tokens


class EventStream(Response):
    """Server-sent events made of `source` by `encode`. A failure in the middle becomes the last event."""

    media_type = "text/event-stream"

    def __init__(
        self, request: Request, source: AsyncGenerator[EventT, None], encode: Encoder[EventT], first: EventT
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._visit = visit_of(request)
        self._source: AsyncGenerator[Any, None] = source
        self._chunks = encode(_prepend(first, source))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all; called by the framework."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(self._guarded()) as chunks:
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._source.aclose()

    async def _guarded(self) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in self._chunks:
                yield chunk
        except (NexusgenError, RefusedError) as error:
            refusal = error if isinstance(error, RefusedError) else refusal_of(error)
            self._visit.error = refusal.code
            yield encode_event(refusal.body())
        except Exception as error:
            yield encode_event(note_fault(error, self._visit).body())


async def begin_stream(request: Request, source: AsyncGenerator[EventT, None], encode: Encoder[EventT]) -> EventStream:
    """The stream, once its first event is there. Raises: what `source` raises before it."""
    return EventStream(request, source, encode, await anext(source))


async def _prepend(first: EventT, rest: AsyncIterator[EventT]) -> AsyncGenerator[EventT, None]:
    yield first
    async for event in rest:
        yield event


def described_stream(description: str, *names: str) -> dict[str, Any]:
    """The answer 200 of a route that may stream, for FastAPI's schema; `names` are the schemas of its events' data."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in (*names, "ErrorResponse")]},
    }
    event = {"type": "object", "properties": {"event": {"type": "string"}, "data": data}, "required": ["data"]}
    return {"description": description, "content": {"text/event-stream": {"schema": event}}}


def encode_event(data: BaseModel, name: str | None = None, exclude_unset: bool = False) -> bytes:
    """One server-sent event."""
    body = data.model_dump_json(exclude_unset=exclude_unset).encode()
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + body + b"\n\n"
