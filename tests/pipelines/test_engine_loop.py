"""The thread around an engine, with a small engine that counts: who joins when, who leaves, who is told what."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest

from nexusgen.errors import InputError
from pipelines.engine_loop import EngineEvent, EngineLoop
from pipelines.orders import UnavailableError


class Counting:
    """Gives each request as many numbers as it asks for, one a step; at most two requests at a time.

    Steps wait for `may_step`. A request for 13 numbers is refused; the step after one that asks for 99 fails.
    """

    def __init__(self) -> None:
        self.may_step = threading.Event()
        self.may_step.set()
        self.inside: dict[int, list[int]] = {}  # ticket -> numbers asked for, given
        self.companies: list[int] = []
        self._next = 0

    @property
    def has_room(self) -> bool:
        return len(self.inside) < 2

    @property
    def num_in_step(self) -> int:
        return len(self.inside)

    def join(self, request: int) -> int:
        if request == 13:
            raise InputError("thirteen")
        self._next += 1
        self.inside[self._next] = [request, 0]
        return self._next

    def step(self) -> Sequence[EngineEvent]:
        self.may_step.wait(10)
        self.companies.append(len(self.inside))
        if any(asked == 99 for asked, _ in self.inside.values()):
            raise RuntimeError("ninety-nine")
        events = []
        for ticket, count in list(self.inside.items()):
            count[1] += 1
            is_last = count[1] == count[0]
            events.append(EngineEvent(ticket, count[1], is_last))
            if is_last:
                del self.inside[ticket]
        return events

    def leave(self, ticket: int) -> None:
        self.inside.pop(ticket, None)

    def recover(self) -> Sequence[int]:
        lost = list(self.inside)
        self.inside.clear()
        return lost


@contextlib.contextmanager
def running() -> Iterator[tuple[Counting, EngineLoop[int]]]:
    engine = Counting()
    loop = EngineLoop(engine, "counting")
    yield engine, loop
    loop.close()
    loop.join_thread()


async def all_of(events: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in events]


def test_requests_join_between_steps_in_the_order_of_arrival() -> None:
    with running() as (engine, loop):

        async def scenario() -> list[list[int]]:
            engine.may_step.clear()
            calls = [asyncio.create_task(all_of(loop.events(count))) for count in (5, 2, 3)]
            await asyncio.sleep(0.05)
            assert (loop.num_requests, loop.num_waiting) == (3, 1)  # two have joined
            engine.may_step.set()
            return await asyncio.gather(*calls)

        assert asyncio.run(scenario()) == [[1, 2, 3, 4, 5], [1, 2], [1, 2, 3]]
        assert max(engine.companies) == 2
        assert (loop.stats.requests, loop.stats.first_events, loop.num_requests) == (3, 3, 0)
        assert loop.stats.batch_sum == sum(engine.companies) == 10


def test_who_goes_away_leaves_the_engine_or_the_queue() -> None:
    with running() as (engine, loop):

        async def scenario() -> list[int]:
            engine.may_step.clear()
            gone, stays, waits = (asyncio.create_task(all_of(loop.events(count))) for count in (10**9, 4, 10**9))
            await asyncio.sleep(0.05)
            gone.cancel()
            waits.cancel()
            engine.may_step.set()
            found = await stays
            deadline = asyncio.get_running_loop().time() + 10
            while loop.num_requests:
                assert asyncio.get_running_loop().time() < deadline
                await asyncio.sleep(0.01)
            return found

        assert asyncio.run(scenario()) == [1, 2, 3, 4]
        assert not engine.inside


def test_closing_the_events_early_stops_the_work() -> None:
    with running() as (engine, loop):

        async def scenario() -> None:
            async with contextlib.aclosing(loop.events(10**9)) as events:
                async for event in events:
                    if event > 2:
                        break
            while loop.num_requests:
                await asyncio.sleep(0.01)

        asyncio.run(asyncio.wait_for(scenario(), 10))
        assert not engine.inside


def test_errors_reach_those_whom_they_concern() -> None:
    with running() as (engine, loop):

        async def scenario() -> list[Any]:
            engine.may_step.clear()
            calls = [asyncio.create_task(all_of(loop.events(count))) for count in (3, 13)]
            await asyncio.sleep(0.05)
            engine.may_step.set()
            refused = await asyncio.gather(*calls, return_exceptions=True)
            engine.may_step.clear()
            calls = [asyncio.create_task(all_of(loop.events(count))) for count in (3, 99, 2)]
            await asyncio.sleep(0.05)
            engine.may_step.set()
            return refused + await asyncio.gather(*calls, return_exceptions=True)

        good, refused, company, failed, later = asyncio.run(scenario())
        assert good == [1, 2, 3]
        assert isinstance(refused, InputError)
        assert str(company) == str(failed) == "ninety-nine"
        assert later == [1, 2]  # it had not joined, and the engine goes on


def test_a_call_runs_on_the_thread_between_two_steps() -> None:
    with running() as (engine, loop):

        async def scenario() -> None:
            assert await loop.run(lambda: threading.current_thread().name) == "counting"  # without any request
            with pytest.raises(ZeroDivisionError):
                await loop.run(lambda: 1 / 0)
            engine.may_step.clear()
            gone, stays = (asyncio.create_task(all_of(loop.events(count))) for count in (10**9, 3))
            await asyncio.sleep(0.05)
            gone.cancel()
            await asyncio.sleep(0)
            call = asyncio.create_task(loop.run(lambda: (len(engine.inside), len(engine.companies))))
            await asyncio.sleep(0.05)
            assert not call.done()  # a step is under way
            engine.may_step.set()
            assert await call == (1, 1)  # after it, and the one who has gone away is out
            assert await stays == [1, 2, 3]
            loop.close()
            loop.join_thread()
            with pytest.raises(UnavailableError, match="taken down"):
                await loop.run(lambda: None)

        asyncio.run(scenario())


def test_a_loop_that_is_closed_tells_everybody() -> None:
    with running() as (engine, loop):

        async def scenario() -> Any:
            engine.may_step.clear()
            call = asyncio.create_task(all_of(loop.events(5)))
            await asyncio.sleep(0.05)
            assert loop.seconds_in_step() > 0
            loop.close()
            engine.may_step.set()
            (first,) = await asyncio.gather(call, return_exceptions=True)
            with pytest.raises(UnavailableError, match="taken down"):
                await all_of(loop.events(1))
            return first

        assert isinstance(asyncio.run(scenario()), UnavailableError)
