"""The door's backend in front of Serve handles: which version answers, how many are let in, what Serve's errors mean.

An order goes to the language model, and what that predicts goes on to a decoder, both of the same version. What is let
in is bounded here, at the door: behind it everything finds a place, so nothing is refused after it has begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from pipelines.engines import DrawRequest, Predicted, Replied
from pipelines.orders import (
    ChatEvent,
    ChatOrder,
    Finished,
    Lot,
    ModelInfo,
    OverloadedError,
    PictureEvent,
    PictureOrder,
    Text,
    UnavailableError,
    UnknownModelError,
)
from pipelines.replicas import Held, NotHeldError
from pipelines.serve_metrics import replica_metrics
from pipelines.versions import Served

REFRESH_S = 1.0  # how old what is known of the versions may be
ASK_TIMEOUT_S = 5.0
RETRY_S = 0.2  # between two looks for a version that is being swapped
MISROUTED_S = 10.0  # so long a call looks for one of the replicas that have its version, while others don't
logger = logging.getLogger("nexusgen.serve")
REFUSED_S = 1.0
RECENT = 64  # orders from whose rate of completion the waiting time is told


class Admission:
    """How many orders are inside; more than the limit are refused, with the time after which to come back."""

    def __init__(self, limit: int) -> None:
        self.num_inside = 0
        self.is_closed = False  # the server is about to end
        self._limit = limit
        self._ends: deque[float] = deque(maxlen=RECENT)
        self._refusals: deque[float] = deque()

    def check(self) -> None:
        """Raises: OverloadedError if there is no room, UnavailableError if the door is closed."""
        if self.is_closed:
            raise UnavailableError("The server is about to end; try another one.")
        if self.num_inside >= self._limit:
            now = time.monotonic()
            self._refusals.append(now)
            raise OverloadedError(
                f"{self.num_inside} requests are waiting or being worked on, which is the limit; try again shortly",
                self._retry_after_s(now),
            )

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Count an order while the body runs. Raises: OverloadedError."""
        self.check()
        if not self.num_inside:
            self._ends.clear()  # idle time says nothing of speed
        self.num_inside += 1
        try:
            yield
        finally:
            self.num_inside -= 1
            self._ends.append(time.monotonic())

    def _retry_after_s(self, now: float) -> float:
        """After so many seconds, at the rate of the last orders, there will have been room for half of those inside and
        for all that were refused in the last `REFUSED_S`, who come again, too; a little more or less, lest all of them
        come at once."""
        while self._refusals and now - self._refusals[0] > REFUSED_S:
            self._refusals.popleft()
        if len(self._ends) < 2:
            return 1.0
        rate = len(self._ends) / max(now - self._ends[0], 1e-3)
        seconds = (self.num_inside / 2 + len(self._refusals)) / rate
        return min(60.0, max(0.2, seconds * random.uniform(0.75, 1.25)))


class HandleBackend:
    """A `Backend` at the other end of Serve handles."""

    def __init__(
        self,
        versions: DeploymentHandle[Any],
        ar: DeploymentHandle[Any],
        decoders: dict[str, DeploymentHandle[Any]],
        max_inside: int,
        patience_s: float,
    ) -> None:
        """`decoders` by part: generation_decoder and editing_decoder. So long a request waits for a version that is
        being swapped in place."""
        self._patience_s = patience_s
        self.admission = Admission(max_inside)
        self._versions, self._ar, self._decoders = versions, ar, decoders
        self._served: Served | None = None
        self._served_at = -math.inf
        self._num_asked = self._answered = 0  # questions for what is served, and the last one that was answered
        self._refreshing: asyncio.Task[None] | None = None
        self._uses: Counter[str] = Counter()  # requests inside, by the version that they began with

    async def models(self) -> list[ModelInfo]:
        """What is served, the default first, if replicas of the language model and of a decoder reply.

        Raises: UnavailableError.
        """
        served = await self._look()
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                await asyncio.gather(self._ar.stats.remote(), self._decoders["generation_decoder"].stats.remote())
        except (TimeoutError, RayError, RayServeException):
            raise UnavailableError("The model's replicas do not reply; try again shortly.") from None
        return [held.info for held in served.models]

    async def drain(self, patience_s: float) -> int:
        """Let nobody in any more, and wait for those inside; gives how many are still there in the end."""
        self.admission.is_closed = True
        deadline = time.monotonic() + patience_s
        while self.admission.num_inside and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return self.admission.num_inside

    async def metrics(self) -> str:
        """What all replicas have done, for Prometheus; of those that don't reply, nothing."""
        handles = {"ar": self._ar, **self._decoders}
        answers = await asyncio.gather(*map(self._stats, handles.values()))
        return replica_metrics(self.admission.num_inside, dict(zip(handles, answers, strict=True)))

    async def _stats(self, handle: DeploymentHandle[Any]) -> list[dict[str, Any]]:
        with contextlib.suppress(TimeoutError, RayError, RayServeException):
            async with asyncio.timeout(ASK_TIMEOUT_S):
                answers = await handle.broadcast("stats").results_async(return_exceptions=True)
                return [answer for answer in answers if not isinstance(answer, BaseException)]
        return []

    async def draw(self, order: PictureOrder) -> AsyncGenerator[PictureEvent, None]:
        """Partial pictures, the drawing, `Finished`."""
        with self.admission.admitted():
            async with contextlib.aclosing(self._retried(order, self._draw)) as events:
                async for event in events:
                    yield event

    async def chat(self, order: ChatOrder) -> AsyncGenerator[ChatEvent, None]:
        """Texts and drawings, `Finished` last."""
        with self.admission.admitted():
            async with contextlib.aclosing(self._retried(order, self._chat)) as events:
                async for event in events:
                    yield event

    async def _retried(
        self, order: Any, answer: Callable[[Any, Held], AsyncGenerator[Any, None]]
    ) -> AsyncGenerator[Any, None]:
        """An answer by the version of its request; begun anew if that is being swapped, as long as nothing of the
        request's answers has gone out: they are of one version."""
        give_up, lot, has_begun = math.inf, order.lot, False
        while True:
            held = await self._pick(order.model, lot)
            try:
                with self._using(held.info.fingerprint):
                    async with contextlib.aclosing(answer(order, held)) as events:
                        async for event in events:
                            if lot.picked is not held:
                                raise NotHeldError("another answer to the request found its version gone")
                            has_begun = lot.has_begun = True
                            yield event
                return
            except NotHeldError as error:
                give_up = min(give_up, time.monotonic() + self._patience_s)
                await asyncio.sleep(RETRY_S)
                served = await self._look(anew=True)
                must_change = lot.picked is held and held.info.fingerprint not in served.fingerprints
                if has_begun or (must_change and lot.has_begun) or time.monotonic() > give_up:
                    raise UnavailableError("The version of the model was taken down meanwhile; try again.") from error
                if must_change:
                    lot.picked = None

    @contextlib.contextmanager
    def _using(self, fingerprint: str) -> Iterator[None]:
        self._uses[fingerprint] += 1
        try:
            yield
        finally:
            self._uses[fingerprint] -= 1

    def in_use(self) -> set[str]:
        """Fingerprints of the versions that requests inside began with."""
        return {fingerprint for fingerprint, count in self._uses.items() if count}

    async def _draw(self, order: PictureOrder, held: Held) -> AsyncGenerator[PictureEvent, None]:
        part = "editing_decoder" if order.images else "generation_decoder"
        if part not in held.info.parts:
            raise UnknownModelError(
                f"The model {held.info.id!r} of version {held.info.version} has no {part}; it can't "
                f"{'edit' if order.images else 'draw'} pictures."
            )
        predicted, replied = await self._ask(self._ar, "predict", held, order)
        request = DrawRequest(predicted, order.settings, order.num_partial)
        if order.num_partial:
            async for event in self._stream(self._decoders[part], "draw", held, request):
                yield event
        else:
            yield await self._ask(self._decoders[part], "draw_at_once", held, request)
        yield Finished("stop", held.info, replied.usage)

    async def _chat(self, order: ChatOrder, held: Held) -> AsyncGenerator[ChatEvent, None]:
        num_drawn = 0
        async for event in self._stream(self._ar, "reply", held, order):
            if isinstance(event, Text):
                yield event
            elif isinstance(event, Predicted):
                part = "editing_decoder" if event.reference is not None else "generation_decoder"
                settings = replace(order.picture, seed=order.picture.seed + num_drawn)
                num_drawn += 1
                request = DrawRequest(event, settings)
                yield await self._ask(self._decoders[part], "draw_at_once", held, request)
            elif isinstance(event, Replied):
                yield Finished("length" if event.reason == "length" else "stop", held.info, event.usage)

    async def _pick(self, model: str | None, lot: Lot) -> Held:
        """The version for a request; of the default's, the canary takes its share. Raises: UnknownModelError."""
        served = await self._look()
        if lot.picked is None:
            lot.picked = _choose(served, model, lot.number)
        held: Held = lot.picked
        return held

    async def _look(self, *, anew: bool = False) -> Served:
        """What is served, at most a little old unless it is wanted anew. Raises: UnavailableError."""
        age_s = time.monotonic() - self._served_at
        if self._served is None or anew or age_s > 5 * REFRESH_S:
            await self.refresh()
        elif age_s > REFRESH_S and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = asyncio.create_task(self.refresh())  # requests don't wait for it
        if self._served is None:
            raise UnavailableError("The model is not loaded yet; try again shortly.")
        return self._served

    async def refresh(self) -> None:
        """Learn what is served now."""
        self._num_asked += 1
        number = self._num_asked
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                served = await self._versions.served.remote()
            if number > self._answered:  # not late, after the answer to a later question
                self._served, self._answered = served, number
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("what is served isn't known anew: %s: %s", type(error).__name__, error)
        self._served_at = time.monotonic()

    async def _ask(self, handle: DeploymentHandle[Any], method: str, held: Held, order: Any) -> Any:
        """One answer of a replica. Whoever cancels this stops the work there."""
        give_up = time.monotonic() + MISROUTED_S
        while True:
            among = self._among(held)
            answer = getattr(handle, method).remote(held.info.fingerprint, order, among=among)
            try:
                with _serves_errors():
                    return await answer
            except asyncio.CancelledError:
                answer.cancel()
                raise
            except NotHeldError:  # on its way when a replica let the version go; others have it
                if not among or time.monotonic() > give_up:
                    raise
            await asyncio.sleep(RETRY_S)

    def _among(self, held: Held) -> frozenset[str]:
        """The replicas that have a version, if not all have; of any deployment."""
        rolling = self._served.rolling if self._served is not None else None
        return rolling.replicas.get(held.info.fingerprint, frozenset()) if rolling is not None else frozenset()

    async def _stream(
        self, handle: DeploymentHandle[Any], method: str, held: Held, order: Any
    ) -> AsyncGenerator[Any, None]:
        """The events of a replica. Whoever closes this stops the work there."""
        events = getattr(handle.options(stream=True), method).remote(
            held.info.fingerprint, order, among=self._among(held)
        )
        is_over = False
        try:
            with _serves_errors():
                async for event in events:
                    yield event
                is_over = True
        except (Exception, asyncio.CancelledError) as error:
            is_over = not isinstance(error, asyncio.CancelledError)
            raise
        finally:
            if not is_over:
                events.cancel()


def _choose(served: Served, model: str | None, number: float) -> Held:
    """The version that is asked for; `number` is a `Lot`'s. Raises: UnknownModelError."""
    if model is None or model == served.models[0].info.id:
        index = 1 if number < served.canary_share else 0
        rolling = served.rolling
        if rolling is not None and rolling.index == index and random.random() < rolling.share:
            return rolling.new
        return served.models[index]
    for held in served.models:
        if model in (held.info.id, f"{served.models[0].info.id}/{held.info.version}"):
            return held
    names = ", ".join(repr(held.info.id) for held in served.models)
    raise UnknownModelError(f"The model {model!r} does not exist; this server has {names}.")


@contextlib.contextmanager
def _serves_errors() -> Iterator[None]:
    """Serve's errors become the door's, and those of a replica what they were there."""
    try:
        yield
    except RayTaskError as error:
        raise error.cause from None
    except (RayError, RayServeException, grpc.aio.AioRpcError):
        raise UnavailableError("The model's replica is gone or not up yet; try again shortly.") from None
