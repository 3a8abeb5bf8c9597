"""Which version answers a request, while versions change: handles are plain objects here, which change at will."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipelines.engines import Predicted, Replied
from pipelines.ingress import HandleBackend
from pipelines.orders import Drawing, Lot, ModelInfo, PictureOrder, PictureSettings, UnavailableError, Usage
from pipelines.replicas import Held, NotHeldError
from pipelines.versions import Served

FIRST, SECOND = (
    Held(name, ModelInfo("nexusgen", name, name, ("autoregressive", "generation_decoder"), (32, 32), 2, 0))
    for name in ("first", "second")
)


class Swapped:
    """Both versions' replicas, and what is served: `looks` are told one after another, the last of them on and on."""

    def __init__(self, *looks: Held) -> None:
        self.looks = list(looks)
        self.is_first_gone = False
        self.asked: Counter[str] = Counter()
        self.waiting: dict[int, asyncio.Event] = {}  # by seed

    def backend(self) -> HandleBackend:
        def handle(**methods: Any) -> Any:
            return SimpleNamespace(**{name: SimpleNamespace(remote=method) for name, method in methods.items()})

        versions, ar = handle(served=self._served), handle(predict=self._predict)
        return HandleBackend(versions, ar, {"generation_decoder": handle(draw_at_once=self._draw)}, 8, 10.0)

    async def _served(self) -> Served:
        told = Served((self.looks.pop(0) if len(self.looks) > 1 else self.looks[0],))
        await asyncio.sleep(0)  # an answer takes its time
        return told

    async def _predict(self, fingerprint: str, order: PictureOrder, among: Any) -> tuple[Predicted, Replied]:
        self.asked[fingerprint] += 1
        return Predicted(np.zeros((4, 8), np.float32)), Replied("stop", Usage())

    async def _draw(self, fingerprint: str, request: Any, among: Any) -> Drawing:
        if fingerprint == "first" and request.settings.seed in self.waiting:
            await self.waiting[request.settings.seed].wait()
        if fingerprint == "first" and request.settings.seed == 1 and self.is_first_gone:
            raise NotHeldError("gone")
        info = {"first": FIRST, "second": SECOND}[fingerprint].info
        return Drawing(b"", info, request.settings.seed, 2, (32, 32))


async def makers(backend: HandleBackend) -> list[str]:
    """By which version each of the two pictures of one request was made."""
    lot = Lot()

    async def draw(seed: int) -> str:
        order = PictureOrder("a circle", PictureSettings(seed), lot=lot)
        events = [event async for event in backend.draw(order)]
        return next(event.model.fingerprint for event in events if isinstance(event, Drawing))

    return await asyncio.gather(draw(0), draw(1))


def test_pictures_of_a_request_are_of_one_version_though_each_looks_anew() -> None:
    """As after some idle seconds, when each picture asks what is served, and a swap ends between their questions."""
    assert asyncio.run(makers(Swapped(FIRST, SECOND).backend())) == ["first", "first"]


def test_a_version_that_goes_in_the_middle_of_a_request_is_left_by_all_its_pictures() -> None:
    """The second picture finds it gone while the first one is drawn: nothing has gone out, so both begin anew."""

    async def run() -> None:
        swapped = Swapped(FIRST, FIRST, SECOND)
        swapped.is_first_gone = True
        swapped.waiting = {0: asyncio.Event()}
        asking = asyncio.create_task(makers(swapped.backend()))
        while not swapped.asked["second"]:
            await asyncio.sleep(0.01)
        swapped.waiting[0].set()
        assert await asking == ["second", "second"]

    asyncio.run(run())


def test_a_request_whose_first_picture_has_gone_out_ends_rather_than_mix_versions() -> None:
    async def run() -> None:
        swapped = Swapped(FIRST, FIRST, SECOND)
        swapped.is_first_gone = True
        swapped.waiting = {1: asyncio.Event()}
        asking = asyncio.create_task(makers(swapped.backend()))
        while swapped.asked["first"] < 2:
            await asyncio.sleep(0.01)
        swapped.waiting[1].set()
        with pytest.raises(UnavailableError, match="taken down meanwhile"):
            await asking
        assert not swapped.asked["second"]

    asyncio.run(run())
