"""Checkpoints of a training stage: written whole or not at all, found again by one pointer, on any number of ranks.

STORAGE/checkpoints/NAME/STAGE/
    config.yaml            the resolved configuration
    run.json               MLflow run and inputs
    progress.json          where the training is, for the progress line and for `status`
    latest.json            {"step", "path"}: the last complete checkpoint, written after it
    best.json              {"step", "path", "loss"}: the complete one with the lowest loss on held-out samples
    step-NNNNNN/
        __RANK_*.distcp    what a rank wrote: its parts of sharded tensors, its share of those that all ranks have
        .metadata          which tensor is where, torch.distributed.checkpoint's
        meta.json          Meta, below; written when all the rest is there
        .rank-*            on object storage, while it is written: that rank's part is there

The tensors are named model.NAME, optimizer.NAME.SLOT and ema.NAME, with NAME the module's own. Frozen weights aren't
among them: they are those of the base, whose fingerprint is in meta.json. Nothing else needs to be
stored: training draws its random numbers from (seed, step, sample), and an optimizer's learning rate, betas and decay
come from the configuration, which a resumed training shares.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import shutil
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pydantic import ConfigDict, ValidationError

from nexusgen.config import Config
from nexusgen.errors import InputError, ModelError, ResourceError
from pipelines import process_use, storage

if TYPE_CHECKING:  # `register` finds checkpoints without torch
    from jaxtyping import Shaped
    from torch import Tensor, nn
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.optim import Optimizer

POLL_S = 0.5  # rank 0 looks whether the others' parts are there
METADATA = ".metadata"
_STEP_FOLDER = re.compile(r"step-\d{6,}|\.step-.+")  # the latter are being written, or were when the training died


class DataInput(Config):
    """One embedded data set that training read; enough to walk from here to the tars through MLflow."""

    name: str  # NAME/MODE
    uri: str
    digest: str
    run_id: str | None  # of the embed run that made it


class Meta(Config):
    """`meta.json`: where a checkpoint stands and what it belongs to."""

    model_config = ConfigDict(ser_json_inf_nan="constants")  # a loss may be NaN, and is to come back as one

    stage: str
    step: int  # optimizer steps done, and the position in the plan
    num_steps: int
    run_id: str  # MLflow run, continued by a resumed training
    seed: int
    plan_digest: str  # of data, lengths, batch rule and seed: the position means nothing in another plan
    world_size: int
    config: dict[str, Any]
    base_fingerprint: str
    inputs: tuple[DataInput, ...]
    num_samples: int  # seen so far
    loss_first: float
    loss_last: float
    validation: dict[str, float]  # "loss" is what the best checkpoint is chosen by
    num_skipped: int = 0  # steps whose gradients were thrown away
    gradient_norms: tuple[float, ...] = ()  # of the last steps: what a spike is measured against
    has_ema: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint."""

    uri: str
    meta: Meta


def stage_folder(storage_uri: str, name: str, stage: str) -> str:
    """Where a stage's checkpoints are."""
    return storage.join(storage_uri, "checkpoints", name, stage)


def latest(folder: str) -> Checkpoint | None:
    """The last complete checkpoint, or None. Raises: ModelError if the pointer or its checkpoint is damaged."""
    pointer = storage.join(folder, "latest.json")
    if not storage.exists(pointer):
        return None
    try:
        uri = storage.join(folder, json.loads(storage.read_bytes(pointer))["path"])
        return Checkpoint(uri, Meta.model_validate_json(storage.read_bytes(storage.join(uri, "meta.json"))))
    except (InputError, ValidationError, ValueError, KeyError) as error:
        raise ModelError(
            f"{pointer} doesn't lead to a readable checkpoint: {error}; start over with fresh=true"
        ) from None


def forget(folder: str) -> None:
    """Start over: without the pointers, what was trained before is no longer found; the next checkpoint replaces it."""
    storage.delete(storage.join(folder, "latest.json"))
    storage.delete(storage.join(folder, "best.json"))


class Saver:
    """Writes a training's checkpoints, one saver on every rank, and deletes those that are no longer needed.

    Kept are the last `keep_last`, the best, and nothing of another run or of steps that are trained anew. A checkpoint
    that can't be written is told on standard error and counted in `num_failed`; the training goes on to the next one.
    """

    def __init__(
        self,
        folder: str,
        rank: int,
        world_size: int,
        keep_last: int,
        told: Callable[[int, float], None] | None = None,
    ) -> None:
        """`told` is called on rank 0 with step and seconds when a checkpoint is in its place, from another thread."""
        self._folder = storage.absolute(folder)
        self._told = told
        self._rank, self._world_size, self._keep_last = rank, world_size, keep_last
        self._attempt = ""  # tells what this training writes from what an earlier one left behind; equal on all ranks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._upload: Future[None] | None = None
        self._failure: str | None = None  # of the last checkpoint
        self.num_failed = 0

    def save(
        self, module: nn.Module, optimizer: Optimizer, ema: Mapping[str, Shaped[Tensor, ...]] | None, meta: Meta
    ) -> None:
        """Write a checkpoint, all ranks together; on object storage it is uploaded while the training goes on.

        `ema` has names and sharding of the module's parameters. Waits for the upload before, if that isn't done yet.
        """
        self.wait()
        started = time.monotonic()
        self._failure = None
        self._attempt = self._attempt or _agree_on_name(self._world_size)
        meta = meta.model_copy(update={"has_ema": ema is not None})
        staging = self._staging(meta)
        try:
            _write(_state_of(module, optimizer) | _name_average(module, ema or {}), staging)
        except ResourceError as error:
            shutil.rmtree(staging, ignore_errors=True)
            self._fail(meta, error)
            return
        if storage.is_remote(self._folder):
            self._upload = self._thread.submit(self._deliver, staging, meta, started)
        elif self._rank == 0:
            self._deliver(staging, meta, started)

    def close(self) -> None:
        """Wait for the last upload. Raises: ResourceError if the last checkpoint couldn't be written."""
        self.wait()
        self._thread.shutdown()
        if self._failure is not None:
            raise ResourceError(
                f"the last checkpoint couldn't be written: {self._failure}; start the training again: it goes on from "
                f"the one before"
            )

    def wait(self) -> None:
        """Return when the last checkpoint is in its place, or has failed."""
        if self._upload is not None:
            self._upload.result()
            self._upload = None

    def _staging(self, meta: Meta) -> Path:
        """Where this rank writes: in a local storage beside the target, for all ranks the same."""
        name = f".{_folder_name(meta)}-{self._attempt}"
        if storage.is_remote(self._folder):
            return Path(tempfile.gettempdir()) / f"nexusgen{name}-rank-{self._rank}"
        return storage.local_path(self._folder) / name

    def _deliver(self, staging: Path, meta: Meta, started: float) -> None:
        """Bring what is staged to its place; rank 0, when all ranks have done so, points to it and tells."""
        uri = storage.join(self._folder, _folder_name(meta))
        content = (meta.model_dump_json(indent=2) + "\n").encode()
        try:
            if storage.is_remote(uri):
                self._send(staging, uri)
                if self._rank != 0:
                    return
                storage.write_bytes_atomic(storage.join(uri, "meta.json"), content)
            else:
                (staging / "meta.json").write_bytes(content)
                process_use.count_written(sum(path.stat().st_size for path in staging.iterdir()))
                shutil.rmtree(storage.local_path(uri), ignore_errors=True)  # of steps that are trained anew
                staging.rename(storage.local_path(uri))
            pointer = {"step": meta.step, "path": _folder_name(meta)}
            storage.write_json(storage.join(self._folder, "latest.json"), pointer)
        except (InputError, ResourceError, OSError) as error:
            self._fail(meta, error)
            return
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        if self._told is not None:
            self._told(meta.step, time.monotonic() - started)
        try:
            self._tidy(meta)
        except (InputError, ResourceError) as error:
            _say(f"{uri}: what is older couldn't be deleted: {error}; the next checkpoint tries again")

    def _send(self, staging: Path, uri: str) -> None:
        """Upload this rank's part. Rank 0 waits for the others. Raises: ResourceError."""
        started = time.monotonic()
        storage.upload_folder(staging, uri)
        if self._rank != 0:
            storage.write_bytes_atomic(self._marker(uri, self._rank), b"")
            return
        # The others have about as much to upload as this rank, and may fail for as long as storage lets them.
        patience_s = time.monotonic() - started + storage.RETRY_BUDGET_S
        deadline = time.monotonic() + patience_s
        wanted = {self._marker(uri, rank): rank for rank in range(1, self._world_size)}
        while missing := wanted.keys() - storage.list_files(uri):
            if time.monotonic() > deadline:
                ranks = ", ".join(str(rank) for rank in sorted(wanted[marker] for marker in missing))
                raise ResourceError(f"the parts of rank {ranks} didn't come within {patience_s:.0f} s after rank 0's")
            time.sleep(POLL_S)

    def _marker(self, uri: str, rank: int) -> str:
        return storage.join(uri, f".rank-{rank}-{self._attempt}")

    def _tidy(self, meta: Meta) -> None:
        """Point to the best checkpoint and delete what isn't needed. Raises: ResourceError or InputError."""
        uri = storage.join(self._folder, _folder_name(meta))
        for rank in range(1, self._world_size) if storage.is_remote(uri) else ():
            storage.delete(self._marker(uri, rank))
        names = _step_folders(self._folder)
        metas = {name: _find_meta(storage.join(self._folder, name)) for name in names}
        # A later step than this one is of a training that went on from an earlier checkpoint, as we did.
        ours = {
            name: found
            for name, found in metas.items()
            if found and found.run_id == meta.run_id and found.step <= meta.step
        }
        kept = set(sorted(ours, key=lambda name: ours[name].step)[-self._keep_last :])
        losses = {name: found.validation.get("loss", math.nan) for name, found in ours.items()}
        ranked = sorted((loss, ours[name].step, name) for name, loss in losses.items() if math.isfinite(loss))
        if ranked:
            loss, step, name = ranked[0]
            storage.write_json(storage.join(self._folder, "best.json"), {"step": step, "path": name, "loss": loss})
            kept.add(name)
        for name in names - kept:
            if not name.endswith(self._attempt):
                _delete_folder(storage.join(self._folder, name))

    def _fail(self, meta: Meta, error: Exception) -> None:
        self.num_failed += 1
        self._failure = f"{storage.join(self._folder, _folder_name(meta))}: {error}"
        _say(f"{self._failure}; the training goes on, and the next checkpoint tries again")


def load(checkpoint: Checkpoint, module: nn.Module, optimizer: Optimizer) -> dict[str, Shaped[Tensor, ...]] | None:
    """Put weights and optimizer state back in place, all ranks together; either side may be sharded in its own way.

    Returns the averaged weights by the names of the module's parameters, sharded like them, if there are any.
    Raises: ModelError, naming tensors, if they don't fit the module, or if files are missing or damaged; ResourceError
    if the store doesn't answer.
    """
    import torch

    from nexusgen.model.tensors import check_tensors
    from pipelines.parallel import local

    stored = _stored_tensors(checkpoint.uri)
    averaged = {
        name: torch.empty_like(parameter.detach(), dtype=stored[f"ema.{name}"].dtype)
        for name, parameter in module.named_parameters()
        if f"ema.{name}" in stored
    }
    state = _state_of(module, optimizer) | _name_average(module, averaged)
    check_tensors(state, stored, checkpoint.uri)
    _read(state, checkpoint.uri)
    process_use.count_read(sum(local(tensor).nbytes for tensor in state.values()))
    return averaged or None


def export_weights(checkpoint: Checkpoint, path: Path) -> None:
    """Write the trained module's tensors, averaged ones where there are any, into one safetensors file, fp32.

    With LoRA these are adapters, and what was trained in full; `lora.merge_file` makes weights of them.
    Needs no module and no other ranks. Raises: ModelError if files are missing or damaged; ResourceError.
    """
    import torch
    from safetensors.torch import save_file

    stored = _stored_tensors(checkpoint.uri)
    names = [name.removeprefix("model.") for name in stored if name.startswith("model.")]
    sources = {name: f"ema.{name}" if f"ema.{name}" in stored else f"model.{name}" for name in names}
    state = {
        source: torch.empty(stored[source].shape, dtype=torch.float32 if found.is_floating_point() else found.dtype)
        for source, found in ((source, stored[source]) for source in sources.values())
    }
    _read(state, checkpoint.uri, no_dist=True)
    process_use.count_read(sum(tensor.nbytes for tensor in state.values()))
    save_file({name: state[source] for name, source in sources.items()}, path, metadata={"format": "pt"})


# --- torch.distributed.checkpoint -------------------------------------------------------------------------------------


def _state_of(module: nn.Module, optimizer: Optimizer) -> dict[str, Shaped[Tensor, ...]]:
    """The very tensors of a module that aren't frozen, and its optimizer's; a fresh optimizer's are made first."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    weights = get_model_state_dict(module, options=StateDictOptions(ignore_frozen_params=True))
    state: dict[str, Any] = {f"model.{name}": tensor for name, tensor in weights.items()}
    slots: Mapping[str, Any] = get_optimizer_state_dict(module, optimizer)["state"]  # type: ignore[assignment]
    return state | {f"optimizer.{name}.{slot}": tensor for name, of in slots.items() for slot, tensor in of.items()}


def _name_average(module: nn.Module, ema: Mapping[str, Shaped[Tensor, ...]]) -> dict[str, Shaped[Tensor, ...]]:
    """Averaged weights under all the names that a state dict has for them: of tied weights, `ema` knows the first."""
    first = {parameter: name for name, parameter in module.named_parameters()}
    names = {name: first[parameter] for name, parameter in module.named_parameters(remove_duplicate=False)}
    return {f"ema.{name}": ema[known] for name, known in names.items() if known in ema}


def _agree_on_name(world_size: int) -> str:
    """A name that nobody had before, the same on all ranks."""
    names = [uuid.uuid4().hex[:12]]
    if world_size > 1:
        import torch.distributed

        torch.distributed.broadcast_object_list(names, src=0)
    return names[0]


def _write(state: dict[str, Shaped[Tensor, ...]], folder: Path) -> None:
    """Write this rank's part into a new folder. Raises: ResourceError, on all ranks, if one of them can't write."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        with _without_advice():
            save(state, storage_writer=FileSystemWriter(folder))
    except CheckpointException as error:
        causes = {rank: cause for rank, (cause, _) in error.failures.items()}
        if not all(isinstance(cause, OSError | RuntimeError) for cause in causes.values()):
            raise
        told = "; ".join(f"rank {rank}: {cause}" for rank, cause in sorted(causes.items()))
        raise ResourceError(f"cannot write {folder}: {told}; check rights and space there") from None


def _read(state: dict[str, Shaped[Tensor, ...]], uri: str, *, no_dist: bool = False) -> None:
    """Fill tensors in place. Raises: ModelError if files are missing or damaged; ResourceError."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader: Any = FileSystemReader(uri)
    reader.fs, reader.path = _Files(), uri
    try:
        with _without_advice():
            load(state, storage_reader=reader, no_dist=no_dist)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        outage = next((cause for cause in causes if isinstance(cause, ResourceError)), None)
        if outage is not None:
            raise outage from None
        raise ModelError(f"{uri}: the checkpoint is incomplete or damaged: {causes[0]!r}") from None


@contextmanager
def _without_advice() -> Iterator[None]:
    """Without torch's warning that a single process is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _Files:
    """The files of a storage, as torch's reader wants them: each rank reads just the ranges that it needs."""

    @contextmanager
    def create_stream(self, path: str, mode: str) -> Iterator[IO[bytes]]:
        opened = storage.open_input(path) if storage.is_remote(path) else storage.local_path(path).open(mode)
        with opened as stream:
            yield stream

    def concat_path(self, path: str, suffix: str) -> str:
        return storage.join(path, suffix)


class _MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata`, which is a pickle, and refuses all that such a file doesn't hold: no code of it ever runs."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) not in _METADATA_CLASSES and not (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


_METADATA_CLASSES = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
}


def _stored_tensors(uri: str) -> dict[str, Shaped[Tensor, ...]]:
    """Shape and dtype of a checkpoint's tensors, as tensors on meta. Raises: ModelError if they can't be told."""
    import torch

    metadata_uri = storage.join(uri, METADATA)
    if not storage.exists(metadata_uri):
        raise ModelError(f"{metadata_uri} is missing: the checkpoint is incomplete")
    content = storage.read_bytes(metadata_uri)
    try:
        metadata: Metadata = _MetadataUnpickler(io.BytesIO(content)).load()
        return {
            name: torch.empty(found.size, dtype=found.properties.dtype, device="meta")  # type: ignore[union-attr]
            for name, found in metadata.state_dict_metadata.items()
        }
    except Exception as error:  # a damaged pickle raises almost anything
        raise ModelError(f"{metadata_uri} can't be read as a checkpoint's: {error!r}") from None


# --- folders ----------------------------------------------------------------------------------------------------------


def _folder_name(meta: Meta) -> str:
    return f"step-{meta.step:06d}"


def _step_folders(folder: str) -> set[str]:
    """Names of the folders of checkpoints, complete or not."""
    if storage.is_remote(folder):
        files = storage.list_files(folder, recursive=True)
        names = {file.removeprefix(f"{folder.rstrip('/')}/").partition("/")[0] for file in files}
    else:
        names = {path.name for path in storage.local_path(folder).iterdir()}
    return {name for name in names if _STEP_FOLDER.fullmatch(name)}


def _find_meta(uri: str) -> Meta | None:
    """A complete checkpoint's meta.json; None if it isn't complete."""
    try:
        return Meta.model_validate(storage.find_json(storage.join(uri, "meta.json")))
    except ValidationError:
        return None


def _delete_folder(uri: str) -> None:
    storage.delete(storage.join(uri, "meta.json"))  # first: what is deleted in part is no checkpoint
    if storage.is_remote(uri):
        for file in storage.list_files(uri):
            storage.delete(file)
    else:
        shutil.rmtree(storage.local_path(uri), ignore_errors=True)


def _say(text: str) -> None:
    print(f"checkpoint {text}", file=sys.stderr, flush=True)
