"""Which versions are served: what the configuration names, followed when an alias moves, without a lost request.

One replica of this deployment looks at the registry every few seconds. A new version is loaded by every computing
replica, tried there, and only then becomes what the ingress asks for; if any replica can't, the old one stays, and the
reason is told. It computes nothing and imports no torch.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from nexusgen.errors import NexusgenError
from pipelines import registry
from pipelines.orders import ModelInfo
from pipelines.replicas import Held, log_to_stderr

Swap = Literal["beside", "in_place", "rolling"]
COMPUTING = ("ar", "generation_decoder", "editing_decoder")
ARRIVAL_S = 1.0  # calls that were on their way to a replica have come
TRY_AGAIN_S = 60.0  # a version that couldn't be served is tried again: a store may have been away
ASK_TIMEOUT_S = 3.0
HOLD_TIMEOUT_S = 3600.0  # for a version to be fetched, loaded and tried by all replicas
logger = logging.getLogger("nexusgen.serve")


@dataclass(frozen=True)
class VersionSettings:
    """What is to be served: the default, a share of whose requests a canary may take, and what else has a name."""

    storage: str
    model: str
    app_name: str
    canary: str | None = None
    canary_share: float = 0.0
    also: tuple[str, ...] = ()
    swap: Swap = "beside"
    poll_s: float = 5.0
    drain_s: float = 300.0  # an old version waits so long for requests that began with it


@dataclass(frozen=True)
class Rolling:
    """In the middle of a rolling swap: a version that comes in the place of one of those served.

    `index` is that one's among `Served.models`, `share` what the new one takes of its requests. `replicas` names, by
    fingerprint, those that have the old one and the new one.
    """

    index: int
    new: Held
    share: float
    replicas: dict[str, frozenset[str]]


@dataclass(frozen=True)
class Served:
    """What an ingress needs to know. The default comes first; the canary, if there is one, second."""

    models: tuple[Held, ...]
    canary_share: float = 0.0
    rolling: Rolling | None = None

    @property
    def fingerprints(self) -> set[str]:
        """Of all versions that requests may be for."""
        coming = [self.rolling.new] if self.rolling is not None else []
        return {held.info.fingerprint for held in (*self.models, *coming)}


@dataclass(frozen=True)
class _Refusal:
    """A version that couldn't be served, and when it was tried, in seconds of the monotonic clock."""

    pinned: str
    reason: str
    at: float

    def __str__(self) -> str:
        return f"{self.pinned}: {self.reason}"


class Versions:
    """Follows the names of the configuration."""

    async def __init__(self, settings: VersionSettings) -> None:  # type: ignore[misc]
        """Raises: InputError or ModelError if there is no such model."""
        log_to_stderr()
        self._settings = settings
        self._names = [settings.model, *([settings.canary] if settings.canary else []), *settings.also]
        self._held = {name: await asyncio.to_thread(self._find, name) for name in self._names}
        await self._keep_what_is_held()
        self._rolling: Rolling | None = None
        self._refused: dict[str, _Refusal] = {}
        self._lock = asyncio.Lock()
        self._watch_task = asyncio.create_task(self._watch())

    async def _keep_what_is_held(self) -> None:
        """After a loss of this very actor: what the replicas hold goes on, until something else has been tried."""
        held = {one.info.id: one for one in await self._ask_all("ar", "held") or []}
        self._held = {name: held.get(found.info.id, found) for name, found in self._held.items()}

    async def wanted(self) -> list[Held]:
        """What a replica that begins is to hold."""
        return _once(self._held.values())

    async def served(self) -> Served:
        """What requests can have."""
        share = self._settings.canary_share if self._settings.canary else 0.0
        told = [
            replace(held, info=replace(held.info, refused=str(self._refused.get(name, ""))))
            for name, held in ((name, self._held[name]) for name in self._names)
        ]
        return Served(tuple(told), share, self._rolling)

    async def check_health(self) -> None:
        """Called by Serve. Raises: RuntimeError if nobody looks at the registry any more."""
        if self._watch_task.done():
            raise RuntimeError("the watch over the registry has ended")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.poll_s)
            for name in self._names:
                try:
                    found = await asyncio.to_thread(self._find_if_new, name)
                    if found is not None:
                        await (self._roll if self._settings.swap == "rolling" else self._swap)(name, found)
                except Exception as error:  # a registry that is away, above all: what is served stays
                    logger.warning("%s couldn't be looked up: %s: %s", name, type(error).__name__, error)
            await self._settle()

    async def _settle(self) -> None:
        """Have all replicas hold what is served: one that began while versions were changing may hold the old ones."""
        reasons = await self._hold(_once(self._held.values()), drop_first=self._settings.swap != "beside")
        if self._rolling is not None and reasons:  # the others answer, and these are tried again
            logger.error("not all replicas hold what is served: %s", "; ".join(sorted(set(reasons))))
        elif self._rolling is not None:
            self._rolling = None
            await self._tell_doors()

    def _find_if_new(self, name: str) -> Held | None:
        pinned = registry.pin_model(name, self._settings.storage)
        if pinned == self._held[name].pinned:
            self._refused.pop(name, None)
            return None
        refusal = self._refused.get(name)
        if refusal is not None and refusal.pinned == pinned and time.monotonic() - refusal.at < TRY_AGAIN_S:
            return None
        try:
            return self._find(name)
        except NexusgenError as error:
            self._refuse(name, pinned, str(error))
            return None

    def _find(self, name: str) -> Held:
        """The version that a name means now. Raises: InputError or ModelError if there is none."""
        pinned = registry.pin_model(name, self._settings.storage)
        manifest = registry.find_manifest(pinned, self._settings.storage)
        version = pinned.rpartition("/")[2] if pinned.startswith("models:/") else None
        is_default = name == self._settings.model
        suffix = f"/{version or manifest.fingerprint}"
        return Held(
            pinned,
            ModelInfo(
                id=registry.MODEL_NAME if is_default else registry.MODEL_NAME + suffix,
                version=version,
                fingerprint=manifest.fingerprint,
                parts=manifest.parts,
                image_size=manifest.image_size,
                steps=manifest.num_inference_steps,
                loaded_at=int(time.time()),
            ),
        )

    async def _swap(self, name: str, new: Held) -> None:
        async with self._lock:
            old = self._held
            in_place = self._settings.swap == "in_place"
            after = {**old, name: new}
            during = _once(after.values()) if in_place else _once([*old.values(), new])
            logger.info("%s is %s now: it is being loaded", name, new.pinned)
            reasons = await self._hold(during, drop_first=in_place)
            if reasons:
                self._refuse(name, new.pinned, "; ".join(sorted(set(reasons))))
                await self._hold(_once(old.values()), drop_first=in_place)
                return
            self._held = after
            logger.info("%s is served as %s", new.pinned, name)
            await self._until_unused(old[name].info.fingerprint)
            await self._hold(_once(after.values()))

    async def _roll(self, name: str, new: Held) -> None:
        """Swap in one replica of each deployment after another: it lets the old version go, then loads the new one.

        The new version takes as large a share of the requests as it has of the replicas, and all of them before the
        last replicas change. Both have replicas of each deployment until then, so a request is of one all the way.
        """
        async with self._lock:
            rounds = await self._rounds()
            if len(rounds) < 2:
                self._refuse(name, new.pinned, "a rolling swap wants two running replicas of each deployment")
                return
            old, after = self._held[name], {**self._held, name: new}
            before_it, after_it = ({held.info.fingerprint for held in of.values()} for of in (self._held, after))
            with_old, with_new = frozenset().union(*map(_names, rounds)), frozenset[str]()

            def rolling(share: float) -> Rolling:
                replicas = dict.fromkeys(before_it - after_it, with_old) | dict.fromkeys(after_it - before_it, with_new)
                return Rolling(self._names.index(name), new, share, replicas)

            for number, some in enumerate(rounds[:-1]):
                logger.info("%s is %s now: swap in replicas %d of %d", name, new.pinned, number + 1, len(rounds))
                with_old -= _names(some)
                self._rolling = rolling(number / len(rounds))
                await self._tell_doors()
                await asyncio.sleep(ARRIVAL_S)
                reasons = await self._hold(_once(after.values()), drop_first=True, only=some)
                if reasons:
                    self._refuse(name, new.pinned, "; ".join(sorted(set(reasons))))
                    self._rolling = rolling(0.0)
                    await self._until_unused(new.info.fingerprint)
                    break
                with_new |= _names(some)
            else:
                self._held, self._rolling = after, rolling(1.0)
                logger.info("%s is served as %s", new.pinned, name)
                if old.info.fingerprint not in after_it:
                    await self._until_unused(old.info.fingerprint)
            await self._settle()

    async def _rounds(self) -> list[dict[str, list[str]]]:
        """The names of the replicas by deployment, dealt out so that each round has one of each, at least."""
        names = [sorted(await self._ask_all(deployment, "names") or []) for deployment in COMPUTING]
        count = min(map(len, names))
        return [dict(zip(COMPUTING, (of[number::count] for of in names), strict=True)) for number in range(count)]

    async def _tell_doors(self) -> None:
        """Have every door know what is served now, so that none picks by what was served before."""
        deadline = time.monotonic() + self._settings.drain_s
        while await self._ask_all("ingress", "look") is None and time.monotonic() < deadline:
            await asyncio.sleep(1.0)

    async def _until_unused(self, fingerprint: str) -> None:
        """Until every door has heard of a change, and no request is inside that began with the version before it."""
        deadline = time.monotonic() + self._settings.drain_s
        await self._tell_doors()
        while time.monotonic() < deadline:
            uses = await self._ask_all("ingress", "in_use")
            if uses is not None and fingerprint not in uses:
                return
            await asyncio.sleep(1.0)

    async def _hold(
        self, wanted: Sequence[Held], drop_first: bool = False, only: dict[str, list[str]] | None = None
    ) -> list[str]:
        """Have all computing replicas, or `only` those named, by deployment, hold these versions. Gives what went
        wrong."""

        async def of(deployment: str) -> list[str]:
            names = only[deployment] if only is not None else None
            try:
                results = (
                    await self._handle(deployment)
                    .broadcast("hold", list(wanted), drop_first, names)
                    .results_async(timeout_s=HOLD_TIMEOUT_S, return_exceptions=True)
                )
            except Exception as error:  # Serve's own, of a deployment that is being replaced
                return [f"{deployment}: {error}"]
            found = []
            for result in results:
                if isinstance(result, BaseException):
                    found.append(f"{deployment}: a replica was lost while it loaded ({type(result).__name__})")
                else:
                    found += [f"{deployment}: {reason}" for reason in result.values() if reason]
            if names is not None and sum(map(bool, results)) < len(names):
                found.append(f"{deployment}: a replica was gone before its turn came")
            return found

        return [reason for found in await asyncio.gather(*map(of, COMPUTING)) for reason in found]

    async def _ask_all(self, deployment: str, method: str) -> list[Any] | None:
        """Answers of all replicas that reply, in one list where they are lists; None if the deployment doesn't."""
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                answers = await self._handle(deployment).broadcast(method).results_async(return_exceptions=True)
        except Exception as error:  # there is none yet, or Serve is replacing them
            logger.info("%s doesn't reply: %s", deployment, type(error).__name__)
            return None
        found: list[Any] = []
        for answer in answers:
            if not isinstance(answer, BaseException):
                found += answer if isinstance(answer, list) else [answer]
        return found

    def _handle(self, deployment: str) -> Any:
        from ray import serve

        return serve.get_deployment_handle(deployment, self._settings.app_name)

    def _refuse(self, name: str, pinned: str, reason: str) -> None:
        self._refused[name] = _Refusal(pinned, reason, time.monotonic())
        logger.error("%s stays %s: %s can't be served: %s", name, self._held[name].pinned, pinned, reason)


def _names(replicas: dict[str, list[str]]) -> frozenset[str]:
    return frozenset(name for names in replicas.values() for name in names)


def _once(held: Any) -> list[Held]:
    """Each version once, in order."""
    return list({one.info.fingerprint: one for one in held}.values())
