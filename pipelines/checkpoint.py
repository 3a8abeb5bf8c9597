"""Checkpoints of a training stage: written whole or not at all, found again by one pointer.

STORAGE/checkpoints/NAME/STAGE/
    config.yaml            the resolved configuration
    run.json               MLflow run and inputs
    progress.json          where the training is, for the progress line and for `status`
    latest.json            {"step", "path"}: the last complete checkpoint, written after it
    step-NNNNNN/
        model.safetensors  the trained module's weights under its own names, fp32
        state.pt           optimizer and random state
        meta.json          Meta, below
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from nexusgen.config import Config
from nexusgen.errors import ModelError
from pipelines import storage

if TYPE_CHECKING:  # the registry reads checkpoints without torch
    from jaxtyping import Shaped
    from torch import Tensor, nn
    from torch.optim import Optimizer


class DataInput(Config):
    """One embedded data set that training read; enough to walk from here to the tars through MLflow."""

    name: str  # NAME/MODE
    uri: str
    digest: str
    run_id: str | None  # of the embed run that made it


class Meta(Config):
    """`meta.json`: where a checkpoint stands and what it belongs to."""

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
    validation: dict[str, float]


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
    except (ValidationError, ValueError, KeyError) as error:
        raise ModelError(
            f"{pointer} doesn't lead to a readable checkpoint: {error}; start over with fresh=true"
        ) from None


def forget(folder: str) -> None:
    """Start over: without the pointer, what was trained before is no longer found."""
    storage.delete(storage.join(folder, "latest.json"))


def save(folder: str, module: nn.Module, optimizer: Optimizer, meta: Meta) -> str:
    """Write a checkpoint, then point to it. Returns its URI. Raises: ResourceError if it can't be written."""
    import torch

    from nexusgen.model.tensors import save_tensors

    name = f"step-{meta.step:06d}"
    uri = storage.join(folder, name)
    with tempfile.TemporaryDirectory(prefix="nexusgen-checkpoint-") as scratch:
        local = Path(scratch)
        save_tensors(module.state_dict(), local / "model.safetensors", torch.float32)
        torch.save({"optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}, local / "state.pt")
        (local / "meta.json").write_text(meta.model_dump_json(indent=2) + "\n", encoding="utf-8")
        storage.upload_folder(local, uri)
    storage.write_json(storage.join(folder, "latest.json"), {"step": meta.step, "path": name})
    return uri


def load(checkpoint: Checkpoint, module: nn.Module, optimizer: Optimizer) -> None:
    """Put a checkpoint's weights, optimizer and random state back. Raises: ModelError if the weights don't fit."""
    import torch
    from safetensors.torch import load as load_safetensors

    state: Mapping[str, Shaped[Tensor, ...]] = load_safetensors(
        storage.read_bytes(storage.join(checkpoint.uri, "model.safetensors"))
    )
    expected = module.state_dict()
    if expected.keys() != state.keys() or any(expected[name].shape != state[name].shape for name in expected):
        odd = sorted(expected.keys() ^ state.keys())[:8]
        raise ModelError(f"{checkpoint.uri}: the weights don't fit the model ({odd or 'shapes differ'})")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(state[name])  # in place: the optimizer holds these very parameters
    content = storage.read_bytes(storage.join(checkpoint.uri, "state.pt"))
    saved = torch.load(io.BytesIO(content), weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"])
