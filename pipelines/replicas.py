"""The deployments that compute, and what all of them do: hold versions of the model, each with a loop of its own.

    ar                   texts and predicted embeddings (`ReplyWork`)
    generation_decoder   pictures of predictions (`DrawWork`)
    editing_decoder      pictures of predictions that keep to another one

A replica holds the versions that `versions.py` wants served: a new one is loaded beside those that answer, tried, and
only then named to the ingress; an old one goes when its last request has ended. Requests say by fingerprint which
version they are for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nexusgen.errors import InputError, ModelError, NexusgenError, ResourceError
from nexusgen.model.manifest import Manifest, read_manifest
from pipelines import registry
from pipelines.engine_loop import EngineLoop
from pipelines.engines import DrawRequest, DrawWork, Predicted, Replied, ReplyWork, decode_order
from pipelines.orders import (
    ChatOrder,
    Drawing,
    ModelInfo,
    PartialPicture,
    PictureOrder,
    PictureSettings,
    Text,
)
from pipelines.pictures import encode_png

if TYPE_CHECKING:
    from nexusgen.model.decoder import ConditionerKind
    from nexusgen.model.weights import Model

WEDGED_S = 120.0  # a step that takes so long never ends
DRAIN_POLL_S = 0.05
ROOM_FOR_ONE_MORE = 1.2  # times the weights of a version must be free before it is loaded beside others
logger = logging.getLogger("nexusgen.serve")


class NotHeldError(NexusgenError):
    """This replica doesn't hold the version that a request is for: it is being loaded, or has just been taken down."""


@dataclass(frozen=True)
class Held:
    """A version to hold: its pinned name, which any process can resolve, and what is said of it."""

    pinned: str
    info: ModelInfo


@dataclass(frozen=True)
class ReplicaSettings:
    """What all replicas of a deployment have in common."""

    storage: str
    part: str  # autoregressive, generation_decoder or editing_decoder
    max_batch: int
    num_threads: int
    on_gpu: bool
    deterministic: bool
    max_length: int = 4096  # tokens of a conversation, its reply included


class Replica:
    """One replica: versions by fingerprint. `hold` is called on all replicas when what is served changes."""

    def __init__(self, settings: ReplicaSettings) -> None:
        import torch

        torch.set_num_threads(settings.num_threads)
        self._settings = settings
        self._loops: dict[str, EngineLoop[Any] | None] = {}  # None: the version lacks this part
        self._held: dict[str, Held] = {}
        self._manifests: dict[str, Manifest] = {}
        self._leaving: set[str] = set()
        self._past: list[dict[str, Any]] = []  # what loops did that are gone: counts never fall
        self._lock = asyncio.Lock()

    async def start(self, versions: Any) -> None:
        """Hold what is served now, before this replica takes requests. Raises: ModelError if that can't be."""
        wanted: list[Held] = []
        while (found := await versions.wanted.remote()) != wanted:  # a swap may end while this loads
            wanted = found
            for pinned, reason in (await self.hold(wanted)).items():
                if reason:
                    raise ModelError(f"{pinned}: {reason}")

    async def hold(self, wanted: Sequence[Held], drop_first: bool = False) -> dict[str, str]:
        """Hold these versions and no others. Gives by pinned name why one can't be held, or an empty text.

        With `drop_first` the others go before a new one is loaded, for want of memory.
        """
        async with self._lock:
            names = {held.info.fingerprint for held in wanted}
            if drop_first:
                await self._drop([fingerprint for fingerprint in self._loops if fingerprint not in names])
            reasons = {held.pinned: await self._try_to_load(held) for held in wanted}
            if not any(reasons.values()):  # or something that answers would go for something that can't
                await self._drop([fingerprint for fingerprint in self._loops if fingerprint not in names])
            return reasons

    async def held(self) -> list[Held]:
        """The versions that this replica holds."""
        return list(self._held.values())

    async def stats(self) -> dict[str, Any]:
        """What the loops have done, summed over versions, and what is going on."""
        loops = [loop for loop in self._loops.values() if loop is not None]
        return {
            "part": self._settings.part,
            "pid": os.getpid(),
            "waiting": sum(loop.num_waiting for loop in loops),
            "requests": sum(loop.num_requests for loop in loops),
            "loops": [*self._past, *(asdict(loop.stats) for loop in loops)],
            "fingerprints": sorted(self._loops),
        }

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica that isn't well."""
        for fingerprint, loop in self._loops.items():
            seconds = loop.seconds_in_step() if loop is not None else 0.0
            if seconds > WEDGED_S:
                raise RuntimeError(f"{self._settings.part} {fingerprint}: a step has been going on for {seconds:.0f} s")

    def _loop_of(self, fingerprint: str) -> EngineLoop[Any]:
        if fingerprint not in self._loops or fingerprint in self._leaving:
            raise NotHeldError(f"{self._settings.part}: the version {fingerprint} isn't held here")
        loop = self._loops[fingerprint]
        if loop is None:
            raise ModelError(f"the model {fingerprint} has no {self._settings.part}")
        return loop

    async def _try_to_load(self, held: Held) -> str:
        fingerprint = held.info.fingerprint
        self._leaving.discard(fingerprint)
        if fingerprint in self._loops:
            self._held[fingerprint] = held  # it may have another name by now
            return ""
        began = time.monotonic()
        loop: EngineLoop[Any] | None = None
        try:
            model = await asyncio.to_thread(self._load, held)
            if model is not None:
                loop = EngineLoop(self._work(model), f"{self._settings.part}-{fingerprint[:8]}")
                async with asyncio.timeout(WEDGED_S):
                    await self._try_out(loop, model)
        except Exception as error:  # whatever is wrong with it: the others go on
            if loop is not None:
                loop.close()
            self._manifests.pop(fingerprint, None)
            loop = model = None
            await asyncio.to_thread(_give_back_memory, "cuda" if self._settings.on_gpu else "cpu")
            logger.warning("%s can't be served by %s: %s", held.pinned, self._settings.part, error)
            return str(error) or type(error).__name__
        self._loops[fingerprint], self._held[fingerprint] = loop, held
        logger.info("%s: %s loaded in %.1f s", self._settings.part, held.pinned, time.monotonic() - began)
        return ""

    def _load(self, held: Held) -> Model | None:
        """Find, check and load this deployment's part of a version; None if it has none. Raises: NexusgenError."""
        import torch

        from nexusgen.memory import free_bytes, weight_bytes
        from nexusgen.model.weights import load_model

        settings = self._settings
        folder = registry.resolve_model(held.pinned, settings.storage)
        manifest = read_manifest(folder)
        if manifest.fingerprint != held.info.fingerprint:
            raise ModelError(f"{folder} is {manifest.fingerprint}, but was {held.info.fingerprint} when it was chosen")
        self._manifests[manifest.fingerprint] = manifest
        if settings.part not in manifest.parts:
            if settings.part != "editing_decoder":
                raise ModelError(f"{held.pinned} has no {settings.part}; it holds {', '.join(manifest.parts)}")
            return None
        parts = [settings.part] if settings.part == "autoregressive" else [settings.part, "vae"]
        device, dtype = ("cuda", torch.bfloat16) if settings.on_gpu else ("cpu", torch.float32)
        needed, free = sum(weight_bytes(folder, part, dtype) for part in parts), free_bytes(device)
        if needed * ROOM_FOR_ONE_MORE > free:
            raise ResourceError(
                f"{settings.part} of {held.pinned} takes {needed / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} GB "
                "free beside what is served: set swap=in_place, which drops the old version first"
            )
        return load_model(folder, parts, dtype, device)

    def _work(self, model: Model) -> Any:
        """The engine around this deployment's part of a version."""
        raise NotImplementedError

    async def _try_out(self, loop: EngineLoop[Any], model: Model) -> None:
        """A version that can't answer must not be served. Raises: whatever it fails with."""
        raise NotImplementedError

    async def _drop(self, fingerprints: Sequence[str]) -> None:
        """Let the last requests of versions end, then forget them."""
        self._leaving.update(fingerprints)
        for fingerprint in fingerprints:
            loop = self._loops[fingerprint]
            while loop is not None and loop.num_requests:
                await asyncio.sleep(DRAIN_POLL_S)
            if loop is not None:
                loop.close()
                await asyncio.to_thread(loop.join_thread)
                self._past.append(asdict(loop.stats))
            del self._loops[fingerprint], self._held[fingerprint], self._manifests[fingerprint]
            self._leaving.discard(fingerprint)
            del loop
            await asyncio.to_thread(_give_back_memory, "cuda" if self._settings.on_gpu else "cpu")


class ReplyReplica(Replica):
    """Texts and predictions."""

    async def __init__(self, settings: ReplicaSettings, versions: Any) -> None:  # type: ignore[misc]
        super().__init__(settings)
        await self.start(versions)

    async def reply(
        self, fingerprint: str, order: ChatOrder | PictureOrder
    ) -> AsyncGenerator[Text | Predicted | Replied, None]:
        """What the language model says to an order, piece by piece. Raises: NotHeldError, InputError."""
        loop = self._loop_of(fingerprint)
        request = await asyncio.to_thread(decode_order, order)
        async with contextlib.aclosing(loop.events(request)) as events:
            async for event in events:
                if isinstance(event, Replied):
                    loop.stats.add_units("tokens", event.usage.completion_tokens)
                    loop.stats.add_units("prompt_tokens", event.usage.prompt_tokens)
                yield event

    async def predict(self, fingerprint: str, order: PictureOrder) -> tuple[Predicted, Replied]:
        """What is to be drawn for an order, and how the reply ended. One answer costs less than a stream. Raises: as
        `reply`."""
        async with contextlib.aclosing(self.reply(fingerprint, order)) as stream:
            events = [event async for event in stream]
        predicted = next((event for event in events if isinstance(event, Predicted)), None)
        replied = next((event for event in events if isinstance(event, Replied)), None)
        if predicted is None or replied is None:
            raise InputError("the prompt leaves no room for a picture within the model's context: shorten it")
        return predicted, replied

    def _work(self, model: Model) -> ReplyWork:
        settings = self._settings
        return ReplyWork(model, settings.max_batch, settings.max_length, settings.deterministic)

    async def _try_out(self, loop: EngineLoop[Any], model: Model) -> None:
        async for event in loop.events(decode_order(PictureOrder("warm-up", PictureSettings(seed=0)))):
            if isinstance(event, Predicted) and not np.isfinite(event.embeddings).all():
                raise ModelError("its predictions aren't finite numbers")


class DrawReplica(Replica):
    """Pictures."""

    async def __init__(self, settings: ReplicaSettings, versions: Any) -> None:  # type: ignore[misc]
        super().__init__(settings)
        await self.start(versions)

    async def draw(self, fingerprint: str, request: DrawRequest) -> AsyncGenerator[PartialPicture | Drawing, None]:
        """The pictures of one prediction: partial ones and, last, the whole. Raises: NotHeldError, InputError."""
        from nexusgen.sampling import drawing_settings

        loop, info, seed = self._loop_of(fingerprint), self._held[fingerprint].info, request.settings.seed
        asked = request.settings
        made = drawing_settings(self._manifests[fingerprint], self._kind, asked.steps, asked.size, asked.guidance)
        async with contextlib.aclosing(loop.events(request)) as events:
            async for image, number in events:
                png = await asyncio.to_thread(encode_png, image, info, seed, made.steps, made.true_cfg_scale)
                if number is not None:
                    yield PartialPicture(png, number)
                else:
                    loop.stats.add_units("pictures", 1)
                    yield Drawing(png, info, seed, made.steps, made.size, made.true_cfg_scale)

    async def draw_at_once(self, fingerprint: str, request: DrawRequest) -> Drawing:
        """The whole picture alone. One answer costs less than a stream. Raises: as `draw`."""
        async with contextlib.aclosing(self.draw(fingerprint, request)) as events:
            (drawing,) = [event async for event in events if isinstance(event, Drawing)]
        return drawing

    @property
    def _kind(self) -> ConditionerKind:
        return "generation" if self._settings.part == "generation_decoder" else "editing"

    def _work(self, model: Model) -> DrawWork:
        return DrawWork(model, self._kind, self._settings.max_batch, self._settings.deterministic)

    async def _try_out(self, loop: EngineLoop[Any], model: Model) -> None:
        decoder = getattr(model, self._settings.part)
        rows, columns = decoder.config.token_grid
        nothing = Predicted(np.zeros((rows * columns, decoder.config.embedding_dim), np.float32))
        async for image, _ in loop.events(DrawRequest(nothing, PictureSettings(seed=0, steps=1))):
            image.load()


def _give_back_memory(device: str) -> None:
    import gc

    from nexusgen.model.weights import give_back_memory

    gc.collect()
    give_back_memory(device)
