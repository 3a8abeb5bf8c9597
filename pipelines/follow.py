"""Eyes on a training: validation on held-out samples, pictures beside their targets, metrics, and where it is."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from nexusgen.losses import LossPart
from pipelines import storage, tracking
from pipelines.flops import Utilisation
from pipelines.notices import Notice
from pipelines.parallel import attention_kernel, device_of
from pipelines.sheets import Cell, draw_sheet
from pipelines.stage_data import StageData, StageSource
from pipelines.stages import AnyStage, StepRandom

if TYPE_CHECKING:
    from pipelines.train import TrainConfig

VALIDATION_BATCH = 32
NUM_PICTURES = 16
PROGRESS_EVERY_S = 2.0  # rank 0 writes where it is
REASONS = {
    Notice.SAVE: "a worker's node will be taken away",
    Notice.HOLD: "the workers are about to be replaced",
    Notice.RESTART: "a worker was told to end",
    Notice.END: "the job was told to end",
}


@dataclass(frozen=True)
class StepRecord:
    """What one step did, over all ranks; `losses` are means by part, `loss` their weighted sum."""

    step: int
    loss: float
    losses: Mapping[str, float]
    grad_norm: float
    learning_rate: float
    num_samples: int
    num_tokens: int
    seconds: float
    wait_s: float
    is_skipped: bool = False  # the gradient wasn't finite, or far larger than those before: no weight changed
    asked: Notice = Notice.NONE  # what is to be done after the step, because a worker is about to end


@contextlib.contextmanager
def forward_precision(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Autocast, if asked for, and the attention that goes with it."""
    if config.precision == "fp32":
        yield
        return
    with torch.autocast(device.type, torch.bfloat16), attention_kernel(config.precision, device):
        yield


@torch.no_grad()
def validate(stage: AnyStage, data: StageData, source: StageSource[Any, Any], config: TrainConfig) -> dict[str, float]:
    """Losses on held-out samples by part, with the same random numbers every time, beside the stage's baseline."""
    held_out = source.samples(data.validation[: config.validation_samples])
    if not held_out:
        return {}
    parts: dict[str, list[LossPart]] = {name: [] for name in stage.weights}
    stage.module.eval()
    device = device_of(stage.module)
    for start in range(0, len(held_out), VALIDATION_BATCH):
        batch = stage.collate(held_out[start : start + VALIDATION_BATCH]).to(device)
        with forward_precision(config, device):
            for name, part in stage.loss(batch, StepRandom(config.seed, -1)).items():  # type: ignore[arg-type]
                parts[name].append(part)
    stage.module.train()
    means = {
        name: float(sum(float(part.sum) for part in found) / max(1, sum(part.count for part in found)))
        for name, found in parts.items()
    }
    means["loss"] = sum(stage.weights[name] * mean for name, mean in means.items())
    return means | stage.baseline(source.samples(data.train[: config.validation_samples]), held_out)


def draw_pictures(stage: AnyStage, data: StageData, source: StageSource[Any, Any]) -> Image.Image | None:
    """Targets beside predictions of the first held-out samples (of training samples, where none is held out)."""
    rows = data.validation if len(data.validation) else data.train
    pairs = stage.pictures(source.samples(rows[:NUM_PICTURES]))
    if not pairs:
        return None
    return draw_sheet([Cell(pair, "") for pair in pairs], num_columns=4, title="target | drawn")


class Follower:
    """Metrics of every `log_every` steps into MLflow, and where the training is into progress.json: both by rank 0."""

    def __init__(
        self,
        config: TrainConfig,
        run: tracking.Run | None,
        place: str,
        rank: int,
        world_size: int = 1,
        utilisation: Utilisation | None = None,
    ) -> None:
        """Without a `utilisation`, where the device's peak isn't known, `train/mfu` is left out."""
        self._config, self._run, self._place, self._rank = config, run, place, rank
        self._utilisation = utilisation
        self._window: deque[StepRecord] = deque(maxlen=config.log_every)
        self._written = 0.0
        self._num_skipped = 0
        self._progress: dict[str, Any] = {
            "stage": config.stage,
            "num_steps": config.num_steps,
            "workers": world_size,
            "cpu_seconds": None,
        }

    @property
    def loss(self) -> float:
        """Mean loss of the last steps that were taken, `log_every` at most; 0 if there are none."""
        losses = [record.loss for record in self._window if not record.is_skipped]
        return sum(losses) / max(1, len(losses))

    def follow(self, record: StepRecord, num_skipped: int) -> None:
        """Take note of a step; so many have been skipped so far."""
        self._window.append(record)
        self._num_skipped = num_skipped
        step = record.step + 1
        is_due = step % self._config.log_every == 0 or step == self._config.num_steps
        if is_due and self._run is not None:
            self._run.log_metrics(self._metrics(), step)
        if self._rank == 0 and time.monotonic() - self._written > PROGRESS_EVERY_S:
            self._write(step)

    def show_validation(self, step: int, validation: Mapping[str, float], sheet: Image.Image | None) -> None:
        """Log what held-out samples say."""
        if self._run is None:
            return
        self._run.log_metrics({f"eval/validation/{name}": value for name, value in validation.items()}, step)
        if sheet is not None:
            self._run.log_image(sheet, f"samples/step-{step:06d}.png")

    def show_checkpoint(self, step: int, seconds: float) -> None:
        """Log how long the checkpoint after a step took."""
        if self._run is not None:
            self._run.log_metrics({"train/checkpoint_s": seconds}, step)

    def tell(self, step: int, asked: Notice) -> None:
        """Say in the progress that a checkpoint was written after a step because a worker is about to end."""
        reasons = [reason for notice, reason in REASONS.items() if notice in asked]
        self._progress["note"] = f"saved at step {step} as {' and '.join(reasons)}"
        if self._rank == 0:
            self._write(step)

    def finish(self, cpu_seconds: float) -> None:
        """Leave what the driver reports."""
        self._progress["cpu_seconds"] = cpu_seconds
        self._write(self._config.num_steps)

    def _metrics(self) -> dict[str, float]:
        window, last = self._window, self._window[-1]
        seconds = sum(record.seconds for record in window)
        taken = [record for record in window if not record.is_skipped]
        losses = {
            f"train/{name}": sum(record.losses[name] for record in taken) / max(1, len(taken)) for name in last.losses
        }
        num_tokens = sum(record.num_tokens for record in window)
        num_samples = sum(record.num_samples for record in window)
        metrics = losses | {
            "train/loss": self.loss,
            "train/grad_norm": last.grad_norm,
            "train/lr": last.learning_rate,
            "train/skipped_steps": float(self._num_skipped),
            "train/samples_per_s": num_samples / seconds,
            "train/tokens_per_s": num_tokens / seconds,
            "train/data_wait_fraction": sum(record.wait_s for record in window) / seconds,
        }
        if self._utilisation is not None:
            metrics["train/mfu"] = self._utilisation.of(num_tokens, num_samples, seconds)
        return metrics

    def _write(self, step: int) -> None:
        self._written = time.monotonic()
        if self._window:
            seconds = sum(record.seconds for record in self._window)
            self._progress |= {
                "losses": dict(self._window[-1].losses),
                "samples_per_s": sum(record.num_samples for record in self._window) / seconds,
                "steps_per_s": len(self._window) / seconds,
            }
        storage.write_json(storage.join(self._place, "progress.json"), self._progress | {"step": step})
