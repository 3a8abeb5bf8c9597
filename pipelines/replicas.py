"""The deployments that compute, and what all of them do: hold versions of the model, each with a loop of its own.

    ar                   texts and predicted embeddings (`ReplyWork`)
    generation_decoder   pictures of predictions (`DrawWork`)
    editing_decoder      pictures of predictions that keep to another one

A replica holds the versions that `versions.py` wants served: a new one is loaded beside those that answer, tried, and
only then named to the ingress; an old one goes when its last request has ended. Requests say by fingerprint which
version they are for.

What versions have in common is in memory once. Those whose part is the same share a loop, as when only the language
model was trained anew and the decoder wasn't. A version that was registered with `adapter=keep` is put, as an adapter,
on its base's language model (`nexusgen.variants`), and its requests share the base's batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

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
    import torch
    from torch import Tensor

    from nexusgen.model.decoder import ConditionerKind
    from nexusgen.model.weights import Model

WEDGED_S = 120.0  # a step that takes so long never ends
QUEUE_S = 900.0  # an adapter is tried in the company of requests, and waits its turn
DRAIN_POLL_S = 0.05
ROOM_FOR_ONE_MORE = 1.2  # times the weights of a version must be free before it is loaded beside others
logger = logging.getLogger("nexusgen.serve")


class NotHeldError(NexusgenError):
    """This replica doesn't hold the version that a request is for: it is being loaded, or has just been taken down."""


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what is stderr at the moment."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """It is looked up each time."""


def log_to_stderr() -> None:
    """Have this process tell, in Ray's logs of it, what it fetches and loads, how long that took, and what changes."""
    for one in (logger, logging.getLogger("pipelines.storage")):
        if not one.handlers:
            handler = _Stderr()
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
            one.addHandler(handler)
        one.setLevel(logging.INFO)


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


@dataclass(frozen=True)
class _Source:
    """Where a version's part is found: a folder, its identity, and the adapter that belongs on it."""

    folder: Path
    identity: str
    adapter: registry.Adapter | None = None


@dataclass(eq=False)
class _Loaded:
    """A part in memory, the loop that runs it, and the fingerprints of the versions that use it."""

    identity: str
    model: Model
    work: Any
    loop: EngineLoop[Any]
    users: set[str] = field(default_factory=set)


class Replica:
    """One replica: versions by fingerprint. `hold` is called on all replicas when what is served changes."""

    def __init__(self, settings: ReplicaSettings) -> None:
        import torch

        log_to_stderr()
        torch.set_num_threads(settings.num_threads)
        self._settings = settings
        self._loaded: dict[str, _Loaded | None] = {}  # by fingerprint; None: the version lacks this part
        self._uses: Counter[str] = Counter()  # requests inside, by fingerprint
        self._adapters: set[str] = set()  # fingerprints of the versions that are adapters on what they use
        self._weight_bytes = 0
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

    async def hold(
        self, wanted: Sequence[Held], drop_first: bool = False, only: Collection[str] | None = None
    ) -> dict[str, str]:
        """Hold these versions and no others. Gives by pinned name why one can't be held, or an empty text.

        With `drop_first` the others go before a new one is loaded, for want of memory. `only` names the replicas that
        are meant, if not all are; the others give nothing.
        """
        if only is not None and _own_name() not in only:
            return {}
        async with self._lock:
            names = {held.info.fingerprint for held in wanted}
            if drop_first:
                await self._drop([fingerprint for fingerprint in self._loaded if fingerprint not in names])
            reasons = {held.pinned: await self._try_to_load(held) for held in wanted}
            if not any(reasons.values()):  # or something that answers would go for something that can't
                await self._drop([fingerprint for fingerprint in self._loaded if fingerprint not in names])
            return reasons

    async def names(self) -> list[str]:
        """This replica's name, by which `hold` and the router know it."""
        return [_own_name()]

    async def held(self) -> list[Held]:
        """The versions that this replica holds."""
        return list(self._held.values())

    async def stats(self) -> dict[str, Any]:
        """What the loops have done, summed over versions, and what is going on."""
        loops = [loaded.loop for loaded in self._present()]
        return {
            "part": self._settings.part,
            "pid": os.getpid(),
            "waiting": sum(loop.num_waiting for loop in loops),
            "requests": sum(loop.num_requests for loop in loops),
            "loops": [*self._past, *(asdict(loop.stats) for loop in loops)],
            "fingerprints": sorted(self._loaded),
            "weight_bytes": self._weight_bytes,
        }

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica that isn't well."""
        for loaded in self._present():
            seconds = loaded.loop.seconds_in_step()
            if seconds > WEDGED_S:
                users = ", ".join(sorted(loaded.users))
                raise RuntimeError(f"{self._settings.part} {users}: a step has been going on for {seconds:.0f} s")

    def _present(self) -> list[_Loaded]:
        """What is in memory, each once."""
        return list(dict.fromkeys(loaded for loaded in self._loaded.values() if loaded is not None))

    @contextlib.contextmanager
    def _using(self, fingerprint: str) -> Iterator[EngineLoop[Any]]:
        """The loop that answers for a version, which stays for as long as the body runs. Raises: NotHeldError."""
        if fingerprint not in self._loaded or fingerprint in self._leaving:
            raise NotHeldError(f"{self._settings.part}: the version {fingerprint} isn't held here")
        loaded = self._loaded[fingerprint]
        if loaded is None:
            raise ModelError(f"the model {fingerprint} has no {self._settings.part}")
        self._uses[fingerprint] += 1
        try:
            yield loaded.loop
        finally:
            self._uses[fingerprint] -= 1

    def _variant(self, fingerprint: str) -> str | None:
        """A version's name on the loaded part that it uses."""
        return fingerprint if fingerprint in self._adapters else None

    async def _try_to_load(self, held: Held) -> str:
        fingerprint = held.info.fingerprint
        self._leaving.discard(fingerprint)
        if fingerprint in self._loaded:
            self._held[fingerprint] = held  # it may have another name by now
            return ""
        began = time.monotonic()
        loaded, reason = None, ""
        try:
            source = await asyncio.to_thread(self._find, held)
            if source is not None:
                loaded = await self._join(source, fingerprint)
        except Exception as error:  # whatever is wrong with it: the others go on
            reason = str(error) or type(error).__name__
        if reason:  # the error, which refers to what it was raised in, is gone by now
            self._manifests.pop(fingerprint, None)
            await asyncio.to_thread(_give_back_memory, self._device)
            logger.warning("%s can't be served by %s: %s", held.pinned, self._settings.part, reason)
            return reason
        self._loaded[fingerprint], self._held[fingerprint] = loaded, held
        self._count_weights()
        shared = len(loaded.users) - 1 if loaded is not None else 0
        logger.info(
            "%s: %s loaded in %.1f s%s",
            self._settings.part,
            held.pinned,
            time.monotonic() - began,
            f", sharing weights with {shared} more" if shared else "",
        )
        return ""

    async def _join(self, source: _Source, fingerprint: str) -> _Loaded:
        """The loaded part that a version uses from now on: what is in memory already, or else loaded; an adapter put on
        it; and tried. Raises: whatever is wrong; what was there before is then as it was."""
        present = {loaded.identity: loaded for loaded in self._present()}
        loaded = present.get(source.identity)
        is_new = loaded is None
        try:
            if loaded is None:
                model = await asyncio.to_thread(self._load, source.folder)
                work = self._work(model)
                name = f"{self._settings.part}-{source.identity[:8]}"
                loaded = _Loaded(source.identity, model, work, EngineLoop(work, name))
            if source.adapter is not None:
                await self._add_adapter(loaded, source.adapter, fingerprint)
            if is_new or source.adapter is not None:
                async with asyncio.timeout(WEDGED_S if is_new else QUEUE_S):
                    await self._try_out(loaded.loop, loaded.model, fingerprint)
        except BaseException:
            if loaded is not None:
                await self._part(loaded, fingerprint)
            raise
        loaded.users.add(fingerprint)
        return loaded

    async def _part(self, loaded: _Loaded, fingerprint: str) -> None:
        """A version uses a loaded part no longer: its adapter goes and, with its last user, the part."""
        loaded.users.discard(fingerprint)
        if not loaded.users:
            loaded.loop.close()
            await asyncio.to_thread(loaded.loop.join_thread)
            self._past.append(asdict(loaded.loop.stats))
        elif fingerprint in self._adapters:
            await loaded.loop.run(lambda: loaded.work.variants.remove(fingerprint))
        self._adapters.discard(fingerprint)

    async def _add_adapter(self, loaded: _Loaded, adapter: registry.Adapter, fingerprint: str) -> None:
        """Read an adapter, then put it on a loaded language model between two steps of its engine."""
        tensors = await asyncio.to_thread(self._read_adapter, adapter.file)
        await loaded.loop.run(lambda: loaded.work.variants.add(fingerprint, tensors, adapter.lora.scale))
        self._adapters.add(fingerprint)

    def _read_adapter(self, file: Path) -> dict[str, Tensor]:
        import peft  # noqa: F401 (it takes seconds, which the engine's thread would stand still for)

        from nexusgen.model.tensors import iterate_file

        self._check_room(file.name, file.stat().st_size)
        device, dtype = self._device, self._dtype
        return {name: tensor.to(device, dtype, copy=True) for name, tensor in iterate_file(file)}

    def _find(self, held: Held) -> _Source | None:
        """Where this deployment's part of a version is, here on this machine; None if it has none.

        Raises: NexusgenError.
        """
        from nexusgen.model.weights import DECODER_FOLDERS, part_identity

        settings, part = self._settings, self._settings.part
        folder = registry.locate_model(held.pinned, settings.storage)
        manifest = read_manifest(folder)
        if manifest.fingerprint != held.info.fingerprint:
            raise ModelError(f"{folder} is {manifest.fingerprint}, but was {held.info.fingerprint} when it was chosen")
        self._manifests[manifest.fingerprint] = manifest
        if part not in manifest.parts:
            if part != "editing_decoder":
                raise ModelError(f"{held.pinned} has no {part}; it holds {', '.join(manifest.parts)}")
            return None
        adapter = registry.find_adapter(folder, settings.storage)
        if adapter is not None and part == "autoregressive":
            return _Source(adapter.base, part_identity(adapter.base, part), adapter)
        if adapter is not None and not (folder / DECODER_FOLDERS[part]).is_dir():
            folder = adapter.base
        elif adapter is not None and not (folder / "vae").is_dir():  # registered by an earlier version
            folder = registry.resolve_model(held.pinned, settings.storage)
        return _Source(folder, part_identity(folder, part))

    def _load(self, folder: Path) -> Model:
        """Check and load this deployment's part of a model folder. Raises: NexusgenError."""
        from nexusgen.memory import weight_bytes
        from nexusgen.model.weights import load_model

        part = self._settings.part
        parts = [part] if part == "autoregressive" else [part, "vae"]
        self._check_room(f"{part} of {folder}", sum(weight_bytes(folder, one, self._dtype) for one in parts))
        return load_model(folder, parts, self._dtype, self._device)

    def _check_room(self, what: str, needed: int) -> None:
        from nexusgen.memory import free_bytes

        free = free_bytes(self._device)
        if needed * ROOM_FOR_ONE_MORE > free:
            raise ResourceError(
                f"{what} takes {needed / 1e9:.1f} GB, and {self._device} has {free / 1e9:.1f} GB free beside what is "
                "served: set swap=in_place or swap=rolling, which drop the old version first"
            )

    @property
    def _device(self) -> str:
        return "cuda" if self._settings.on_gpu else "cpu"

    @property
    def _dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self._settings.on_gpu else torch.float32

    def _count_weights(self) -> None:
        from nexusgen.memory import unique_bytes

        self._weight_bytes = unique_bytes(tensor for loaded in self._present() for tensor in loaded.work.weights())

    def _work(self, model: Model) -> Any:
        """The engine around this deployment's part of a version."""
        raise NotImplementedError

    async def _try_out(self, loop: EngineLoop[Any], model: Model, fingerprint: str) -> None:
        """A version that can't answer must not be served. Raises: whatever it fails with."""
        raise NotImplementedError

    async def _drop(self, fingerprints: Sequence[str]) -> None:
        """Let the last requests of versions end, then forget them."""
        self._leaving.update(fingerprints)
        for fingerprint in fingerprints:
            while self._uses[fingerprint]:
                await asyncio.sleep(DRAIN_POLL_S)
            loaded = self._loaded[fingerprint]
            if loaded is not None:
                await self._part(loaded, fingerprint)
            del self._loaded[fingerprint], self._held[fingerprint], self._manifests[fingerprint]
            del self._uses[fingerprint]
            self._leaving.discard(fingerprint)
            loaded = None
            self._count_weights()
            await asyncio.to_thread(_give_back_memory, self._device)


class ReplyReplica(Replica):
    """Texts and predictions."""

    async def __init__(self, settings: ReplicaSettings, versions: Any) -> None:  # type: ignore[misc]
        super().__init__(settings)
        await self.start(versions)

    async def reply(
        self, fingerprint: str, order: ChatOrder | PictureOrder, among: Collection[str] = ()
    ) -> AsyncGenerator[Text | Predicted | Replied, None]:
        """What the language model says to an order, piece by piece. `among` is for the router (`version_router.py`).

        Raises: NotHeldError, InputError.
        """
        with self._using(fingerprint) as loop:
            can_edit = "editing_decoder" in self._manifests[fingerprint].parts
            request = await asyncio.to_thread(decode_order, order, self._variant(fingerprint), can_edit)
            async with contextlib.aclosing(loop.events(request)) as events:
                async for event in events:
                    if isinstance(event, Replied):
                        loop.stats.add_units("tokens", event.usage.completion_tokens)
                        loop.stats.add_units("prompt_tokens", event.usage.prompt_tokens)
                    yield event

    async def predict(
        self, fingerprint: str, order: PictureOrder, among: Collection[str] = ()
    ) -> tuple[Predicted, Replied]:
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

    async def _try_out(self, loop: EngineLoop[Any], model: Model, fingerprint: str) -> None:
        order = PictureOrder("warm-up", PictureSettings(seed=0))
        async for event in loop.events(decode_order(order, self._variant(fingerprint), can_edit=False)):
            if isinstance(event, Predicted) and not np.isfinite(event.embeddings).all():
                raise ModelError("its predictions aren't finite numbers")


class DrawReplica(Replica):
    """Pictures."""

    async def __init__(self, settings: ReplicaSettings, versions: Any) -> None:  # type: ignore[misc]
        super().__init__(settings)
        await self.start(versions)

    async def draw(
        self, fingerprint: str, request: DrawRequest, among: Collection[str] = ()
    ) -> AsyncGenerator[PartialPicture | Drawing, None]:
        """The pictures of one prediction: partial ones and, last, the whole. `among` is for the router.

        Raises: NotHeldError, InputError.
        """
        from nexusgen.sampling import drawing_settings

        with self._using(fingerprint) as loop:
            info, seed, asked = self._held[fingerprint].info, request.settings.seed, request.settings
            made = drawing_settings(self._manifests[fingerprint], self._kind, asked.steps, asked.size, asked.guidance)
            async with contextlib.aclosing(loop.events(request)) as events:
                async for image, number in events:
                    png = await asyncio.to_thread(encode_png, image, info, seed, made.steps, made.true_cfg_scale)
                    if number is not None:
                        yield PartialPicture(png, number)
                    else:
                        loop.stats.add_units("pictures", 1)
                        yield Drawing(png, info, seed, made.steps, made.size, made.true_cfg_scale)

    async def draw_at_once(self, fingerprint: str, request: DrawRequest, among: Collection[str] = ()) -> Drawing:
        """The whole picture alone. One answer costs less than a stream. Raises: as `draw`."""
        async with contextlib.aclosing(self.draw(fingerprint, request)) as events:
            (drawing,) = [event async for event in events if isinstance(event, Drawing)]
        return drawing

    @property
    def _kind(self) -> ConditionerKind:
        return "generation" if self._settings.part == "generation_decoder" else "editing"

    def _work(self, model: Model) -> DrawWork:
        return DrawWork(model, self._kind, self._settings.max_batch, self._settings.deterministic)

    async def _try_out(self, loop: EngineLoop[Any], model: Model, fingerprint: str) -> None:
        decoder = getattr(model, self._settings.part)
        rows, columns = decoder.config.token_grid
        nothing = Predicted(np.zeros((rows * columns, decoder.config.embedding_dim), np.float32))
        async for image, _ in loop.events(DrawRequest(nothing, PictureSettings(seed=0, steps=1))):
            image.load()


def _own_name() -> str:
    from ray import serve

    return serve.get_replica_context().replica_id.to_full_id_str()


def _give_back_memory(device: str) -> None:
    import gc

    from nexusgen.model.weights import give_back_memory

    gc.collect()
    give_back_memory(device)
