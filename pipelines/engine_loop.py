"""One thread that runs an engine, and the async side of it: requests join between steps, their events stream back.

The queue stands here, inside the replica: what has no room in the engine waits in the order of arrival, and joins at
the next step at which there is some. A caller that goes away takes its request out, of the queue or of the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from pipelines.orders import UnavailableError

RequestT = TypeVar("RequestT", contravariant=True)
LoopRequestT = TypeVar("LoopRequestT")
_TAKEN_DOWN = "this version of the model has just been taken down; try again"


@dataclass(frozen=True)
class EngineEvent:
    """Something that an engine has to say about the request of a ticket."""

    ticket: int
    content: Any
    is_last: bool = False


class Engine(Protocol[RequestT]):
    """What computes, step by step. All of it is called from one thread."""

    @property
    def has_room(self) -> bool:
        """Whether another request may join now."""
        ...

    @property
    def num_in_step(self) -> int:
        """Requests that the next step takes further."""
        ...

    def join(self, request: RequestT) -> int:
        """Take a request in; gives its ticket. Raises: what is wrong with the request, which is then not taken."""
        ...

    def step(self) -> Sequence[EngineEvent]:
        """One step for all requests that are in."""
        ...

    def leave(self, ticket: int) -> None:
        """Drop a request."""
        ...

    def recover(self) -> Sequence[int]:
        """After a step that has raised: drop those that can't go on, so that the others can. Gives their tickets."""
        ...


@dataclass(eq=False)
class _Job:
    request: Any
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Any]
    arrived: float
    ticket: int | None = None
    is_abandoned: bool = False
    has_begun: bool = False  # it has had an event


@dataclass
class LoopStats:
    """What a loop has done so far: counts, and sums of seconds."""

    requests: int = 0
    steps: int = 0
    step_s: float = 0.0
    batch_sum: int = 0  # requests that took part, summed over steps
    queue_s: float = 0.0  # from arrival to joining, summed over requests
    first_event_s: float = 0.0  # from arrival to the first event, summed over requests that had one
    first_events: int = 0
    units: dict[str, int] = field(default_factory=dict)  # of what was made: tokens, pictures

    def add_units(self, name: str, count: int) -> None:
        self.units[name] = self.units.get(name, 0) + count


class EngineLoop(Generic[LoopRequestT]):
    """Runs an engine in a thread of its own for as long as it isn't closed."""

    def __init__(self, engine: Engine[LoopRequestT], name: str) -> None:
        self.stats = LoopStats()
        self._engine = engine
        self._waiting: deque[_Job] = deque()
        self._running: dict[int, _Job] = {}
        self._joining: _Job | None = None
        self._abandoned: list[_Job] = []
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._is_closed = False
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def num_requests(self) -> int:
        """Requests that wait, or are in the engine or on their way into it."""
        with self._wake:
            return len(self._waiting) + len(self._running) + (self._joining is not None)

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def seconds_in_step(self) -> float:
        """How long the step under way has been going on; 0 between steps. Raises: RuntimeError if the thread died."""
        if not self._thread.is_alive() and not self._is_closed:
            raise RuntimeError(f"the thread {self._thread.name} has died")
        began = self._step_began
        return time.monotonic() - began if began is not None else 0.0

    async def events(self, request: LoopRequestT) -> AsyncGenerator[Any, None]:
        """The contents of a request's events. Raises: what the engine raised for it; UnavailableError if closed."""
        job = _Job(request, asyncio.get_running_loop(), asyncio.Queue(), time.monotonic())
        with self._wake:
            if self._is_closed:
                raise UnavailableError(_TAKEN_DOWN)
            self._waiting.append(job)
            self._wake.notify()
        is_over = False
        try:
            while not is_over:
                event = await job.events.get()
                is_over = isinstance(event, BaseException) or event.is_last
                if isinstance(event, BaseException):
                    raise event
                yield event.content
        finally:
            if not is_over:
                with self._wake:
                    job.is_abandoned = True
                    self._abandoned.append(job)
                    self._wake.notify()

    async def run(self, call: Callable[[], Any]) -> Any:
        """Call something on the thread, between two steps, and give what it gives. Requests whose callers had gone away
        before are out of the engine by then. Raises: what it raises; UnavailableError if closed."""
        done: Future[Any] = Future()
        with self._wake:
            if self._is_closed:
                raise UnavailableError(_TAKEN_DOWN)
            self._calls.append((call, done))
            self._wake.notify()
        return await asyncio.wrap_future(done)

    def close(self) -> None:
        """End the thread; requests that are still here fail with UnavailableError."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()

    def join_thread(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._running or self._abandoned or self._calls or self._is_closed):
                    self._wake.wait()
                abandoned, self._abandoned = self._abandoned, []
                calls, self._calls = self._calls, deque()
                if self._is_closed:
                    break
            for job in abandoned:
                self._drop(job)
            for call, done in calls:
                _call(call, done)
            self._admit()
            if self._running:
                self._step()
        gone = UnavailableError(_TAKEN_DOWN)
        for _, done in calls:
            done.set_exception(gone)
        for job in [*self._waiting, *self._running.values()]:
            _send(job, gone)
        self._waiting.clear()
        self._running.clear()

    def _drop(self, job: _Job) -> None:
        if job.ticket is not None and self._running.get(job.ticket) is job:
            del self._running[job.ticket]
            self._engine.leave(job.ticket)
        else:
            with self._wake, contextlib.suppress(ValueError):
                self._waiting.remove(job)

    def _admit(self) -> None:
        while self._engine.has_room:
            with self._wake:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                if job.is_abandoned:
                    continue
                self._joining = job
            self._step_began = time.monotonic()
            try:
                job.ticket = self._engine.join(job.request)
            except Exception as error:
                _send(job, error)
            else:
                self._running[job.ticket] = job
                self.stats.requests += 1
                self.stats.queue_s += self._step_began - job.arrived
            self._step_began = None
            with self._wake:
                self._joining = None

    def _step(self) -> None:
        began = self._step_began = time.monotonic()
        num_in_step = self._engine.num_in_step
        try:
            events = self._engine.step()
        except Exception as error:  # nobody's fault in particular: all that were in the step are told
            for ticket in self._engine.recover():
                job = self._running.pop(ticket, None)
                if job is not None:
                    _send(job, error)
            self._step_began = None
            return
        self._step_began = None
        now = time.monotonic()
        self.stats.steps += 1
        self.stats.step_s += now - began
        self.stats.batch_sum += num_in_step
        for event in events:
            job = self._running.get(event.ticket)
            if job is None:
                continue
            if not job.has_begun:
                job.has_begun = True
                self.stats.first_events += 1
                self.stats.first_event_s += now - job.arrived
            if event.is_last:
                del self._running[event.ticket]
            _send(job, event)


def _call(call: Callable[[], Any], done: Future[Any]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(call())
    except Exception as error:
        done.set_exception(error)


def _send(job: _Job, event: EngineEvent | BaseException) -> None:
    with contextlib.suppress(RuntimeError):  # the caller's event loop is closed: nobody listens any more
        job.loop.call_soon_threadsafe(job.events.put_nowait, event)
