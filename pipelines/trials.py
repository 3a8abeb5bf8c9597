"""Runs of an experiment: one arm is trained with one seed, in this process, and what was measured of it is kept.

    STORAGE/trials/KIND/ARM-SEED/
        weights.safetensors   what was trained, under the module's own names
        training.json         the settings, the losses on the way, what it cost
        measured.json         errors and scores, under which settings

What is finished under the same settings is not done again. No Ray here: trials are short, one worker takes their steps,
and one that is killed is started over.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nexusgen.errors import NexusgenError
from nexusgen.model.manifest import read_manifest
from nexusgen.model.tensors import save_tensors
from pipelines import storage
from pipelines.batches import iterate
from pipelines.follow import StepRecord, validate
from pipelines.loop import Ranks, SpikeGuard, make_optimizer, open_training, training_steps
from pipelines.registry import resolve_model
from pipelines.stage_data import StageSource
from pipelines.stages import AnyStage
from pipelines.train import TrainConfig

CURVE_EVERY = 25  # steps that a point of the curve is the mean of
SHOW_EVERY_S = 15.0


@dataclass(frozen=True)
class Trial:
    """One arm trained with one seed. `settings` are what two of them must have in common to be the same."""

    storage: str
    kind: str  # ar or decoder
    arm: str
    seed: int
    config: TrainConfig  # its seed is this trial's
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """For people, and for its folder."""
        return f"{self.kind}/{self.arm}-{self.seed}"

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return storage.local_path(storage.join(self.storage, "trials", self.kind, f"{self.arm}-{self.seed}"))

    @property
    def weights(self) -> Path:
        """What was trained."""
        return self.folder / "weights.safetensors"


def digest_of(settings: Mapping[str, Any]) -> str:
    """Names settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def keep(path: Path, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file holds that was made under these settings, or what `make` gives, which the file then holds."""
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_bytes())
        if found["settings"] == json.loads(json.dumps(settings)):
            return found
    made = {"settings": settings, **make()}
    storage.write_json(str(path), made)
    return made


def train_trial(trial: Trial, make_stage: Callable[[Path], AnyStage]) -> dict[str, Any]:
    """Train, unless that was done: {"settings", "curve", "validation", "seconds", "cpu_seconds", "num_skipped"}.

    `make_stage` makes the hollow stage of a model folder. The same settings give the same weights, bit for bit.
    Raises: NexusgenError if more steps were skipped than the configuration allows.
    """
    return keep(trial.folder / "training.json", trial.settings, lambda: _train(trial, make_stage))


def _train(trial: Trial, make_stage: Callable[[Path], AnyStage]) -> dict[str, Any]:
    config = trial.config
    started, cpu_started = time.monotonic(), time.process_time()
    folder = resolve_model(config.model, config.storage)
    data, plan = open_training(config, read_manifest(folder))
    torch.manual_seed(config.seed)
    stage = make_stage(folder)
    stage.fill(torch.device("cpu"))
    optimizer = make_optimizer(stage.module, config)
    source: StageSource[Any, Any] = StageSource(data, stage)
    guard = SpikeGuard(config.max_gradient_ratio)
    records: list[StepRecord] = []
    curve: list[dict[str, Any]] = []
    num_skipped, shown = 0, time.monotonic()
    batches = iterate(plan, source, config.num_steps, 0, 0, 1, config.num_micro_batches)
    for record in training_steps(stage, batches, plan, optimizer, config, Ranks(), guard):
        num_skipped += record.is_skipped
        if num_skipped > config.max_skipped_steps:
            raise NexusgenError(
                f"{trial.name}: {num_skipped} steps were skipped until step {record.step + 1}, max_skipped_steps "
                f"allows {config.max_skipped_steps}; lower learning_rate, or raise max_gradient_ratio"
            )
        records.append(record)
        if len(records) == CURVE_EVERY or record.step + 1 == config.num_steps:
            curve.append({"step": record.step + 1, **_means([one.losses for one in records])})
            records.clear()
        if time.monotonic() - shown > SHOW_EVERY_S and curve:
            shown = time.monotonic()
            tell(trial, f"step {record.step + 1}/{config.num_steps} {_losses(curve[-1])}")
    stage.module.eval()
    validation = validate(stage, data, source, config)
    trial.folder.mkdir(parents=True, exist_ok=True)
    save_tensors(stage.module.state_dict(), trial.weights, torch.float32)
    return {
        "curve": curve,
        "validation": validation,
        "num_skipped": num_skipped,
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }


def tell(trial: Trial, text: str) -> None:
    """A line on standard error about a trial."""
    print(f"reproduce {trial.name}: {text}", file=sys.stderr, flush=True)


def _means(losses: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(one[name] for one in losses) / len(losses) for name in losses[0]}


def _losses(point: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.4f}" for name, value in point.items() if name != "step")
