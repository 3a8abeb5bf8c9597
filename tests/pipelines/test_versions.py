"""The turns of a rolling swap among three replicas of each deployment, which are plain objects here.

`test_rolling.py` has the real ones, two of each; with two, a version is refused before it has had a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import versions
from pipelines.orders import ModelInfo
from pipelines.replicas import Held
from pipelines.versions import COMPUTING, Rolling, Versions, VersionSettings

OLD, NEW = (
    Held(name, ModelInfo("nexusgen", name, name, ("autoregressive", "generation_decoder"), (32, 32), 2, 0))
    for name in ("old", "new")
)
ALIAS = "models:/nexusgen@champion"


class Three(Versions):
    """Knows its replicas by name, with what they hold, and what the door was told last."""

    def __init__(self, refusing: str = "") -> None:
        """`refusing` names a replica that can't load the new version."""
        self._settings = VersionSettings("", ALIAS, "", swap="rolling")
        self._names, self._held, self._refused = [ALIAS], {ALIAS: OLD}, {}
        self._rolling, self._lock = None, asyncio.Lock()
        self.refusing = refusing
        self.replicas = {f"{deployment} {number}": "old" for deployment in COMPUTING for number in range(3)}
        self.told: Rolling | None = None
        self.steps: list[str] = []

    def _handle(self, deployment: str) -> Any:
        async def answers(method: str, *values: Any) -> list[Any]:
            if deployment == "ingress":
                return [await self.look() if method == "look" else []]
            names = [name for name in self.replicas if name.startswith(deployment)]
            return [[name] if method == "names" else self.hold(name, *values) for name in names]

        return SimpleNamespace(
            broadcast=lambda *values: SimpleNamespace(results_async=lambda **_: answers(*values)),
        )

    async def look(self) -> None:
        """The door's: each version that has a share of the requests has a replica of each deployment."""
        self.told = (await self.served()).rolling
        if self.told is None:
            self.steps.append("all alike")
            return
        self.steps.append(f"{self.told.share:.2f} new")
        for version, names in self.told.replicas.items():
            is_asked = self.told.share < 1 if version == "old" else self.told.share > 0
            having = {name.split()[0] for name in names if self.replicas[name] == version}
            if is_asked and having != set(COMPUTING):  # an assertion's error would be taken for the door's silence
                self.steps.append(f"only {having} have {version}")

    def hold(self, name: str, wanted: Sequence[Held], drop_first: bool, only: Sequence[str] | None) -> dict[str, str]:
        """A replica's: what it lets go isn't asked of it any more."""
        (held,) = wanted
        if only is not None and name not in only:
            return {}
        if self.replicas[name] != held.info.fingerprint:
            assert drop_first
            assert self.told is not None
            assert only is None or name not in self.told.replicas[self.replicas[name]]
            self.replicas[name] = "nothing" if name == self.refusing and held is NEW else held.info.fingerprint
            if name.startswith("ar"):
                self.steps.append(f"{self.replicas[name]} in {name}")
        return {held.pinned: "no room" if self.replicas[name] == "nothing" else ""}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "ARRIVAL_S", 0)


def test_requests_move_along_with_the_replicas() -> None:
    swapped = Three()
    asyncio.run(swapped._roll(ALIAS, NEW))
    assert swapped.steps == [
        "0.00 new", "new in ar 0", "0.33 new", "new in ar 1", "1.00 new", "new in ar 2", "all alike",
    ]  # fmt: skip
    assert set(swapped.replicas.values()) == {"new"}
    assert swapped._held == {ALIAS: NEW}


def test_a_version_that_the_second_replica_cannot_load_is_taken_back_from_the_first() -> None:
    swapped = Three(refusing="generation_decoder 1")
    asyncio.run(swapped._roll(ALIAS, NEW))
    assert swapped.steps == [
        "0.00 new", "new in ar 0", "0.33 new", "new in ar 1", "0.00 new", "old in ar 0", "old in ar 1", "all alike",
    ]  # fmt: skip
    assert set(swapped.replicas.values()) == {"old"}
    assert asyncio.run(swapped.served()).models[0].info.refused == "new: generation_decoder: no room"


def test_one_replica_of_a_deployment_is_too_few() -> None:
    swapped = Three()
    del swapped.replicas["editing_decoder 1"], swapped.replicas["editing_decoder 2"]
    asyncio.run(swapped._roll(ALIAS, NEW))
    assert swapped.steps == []
    assert "two running replicas" in asyncio.run(swapped.served()).models[0].info.refused
