"""The job `train`: one stage on Ray Train workers, resumed where it stopped, followed in MLflow.

Every worker runs `_work`: it opens the model and the data itself, asks the plan for its part of each step, and sums
losses, counts and gradients with the others in one flat all-reduce each, so that results don't depend on how gradients
are bucketed. Rank 0 logs, validates and writes checkpoints. The driver checks everything that can be checked before a
worker starts.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nexusgen.config import Config, dump_config
from nexusgen.errors import ConfigError, ModelError, NexusgenError
from nexusgen.flow_matching import LevelDensity
from nexusgen.losses import LossPart, total_loss
from nexusgen.model.manifest import Manifest, read_manifest
from nexusgen.schema import Task
from pipelines import checkpoint, storage, tracking
from pipelines.batches import Batch, BatchRule, Plan, check_world_size, iterate
from pipelines.checkpoint import Checkpoint, Meta
from pipelines.registry import pin_model, resolve_model
from pipelines.runtime import CpuMeter, JobReport, ray_cluster
from pipelines.sheets import Cell, draw_sheet
from pipelines.stage_data import StageData, StageSource, open_data
from pipelines.stages import STAGES, AnyStage, StageName, StepRandom, build_stage

PROGRESS_EVERY_S = 2.0  # rank 0 writes where it is
SHOW_EVERY_S = 10.0  # the driver prints it
VALIDATION_BATCH = 32
NUM_PICTURES = 16


class TrainConfig(Config):
    """What one stage is trained on, how long and how. Steps are fixed: the result doesn't depend on the clock."""

    storage: str
    name: str
    stage: StageName
    data: str | list[str] | None = None  # names of embedded data; default: the project's own name
    model: str = "demo-base"

    num_steps: int = Field(default=1000, ge=1)
    batch_samples: int = Field(default=24, ge=1)  # samples of a step, over all workers
    batch_tokens: int | None = Field(default=None, ge=1)  # if set, a step's budget of padded tokens, in their place
    mixture: dict[Task, float] | None = None  # shares of the tasks in a step; null: as the data has them
    virtual_streams: int = Field(default=2, ge=1)  # a step is cut into so many parts; num_workers must divide it

    learning_rate: float = Field(default=2e-3, gt=0)
    warmup_steps: int = Field(default=50, ge=0)
    final_lr_fraction: float = Field(default=0.02, ge=0, le=1)  # of the learning rate, at the end of the cosine
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = Field(default=0.01, ge=0)  # on matrices only
    gradient_clip: float = Field(default=1.0, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"  # of the forward; weights and optimizer are always fp32
    levels: LevelDensity = "logit_normal"  # noise levels of a decoder stage
    seed: int = 0

    num_workers: int = Field(default=1, ge=1)
    cpus_per_worker: float = Field(default=0.5, gt=0)  # logical, as Ray counts them
    threads_per_worker: int = Field(default=1, ge=1)

    validation_fraction: float = Field(default=0.02, ge=0, lt=1)  # of the samples, held out by a hash of their key
    validation_samples: int = Field(default=256, ge=0)  # at most so many are looked at
    checkpoint_every: int = Field(default=500, ge=1)  # steps; the last step always has one
    log_every: int = Field(default=10, ge=1)  # steps
    fresh: bool = False  # start over even if a training of this name and stage can be resumed

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            check_world_size(self.virtual_streams, self.num_workers)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def data_names(self) -> list[str]:
        """Names of the embedded data to train on."""
        if self.data is None:
            return [self.name]
        return [self.data] if isinstance(self.data, str) else self.data

    @property
    def batch_rule(self) -> BatchRule:
        """The rule that batches are formed by."""
        samples = self.batch_samples if self.batch_tokens is None else None
        return BatchRule(
            samples=samples, tokens=self.batch_tokens, mixture=self.mixture, virtual_streams=self.virtual_streams
        )


# Keys that may differ between a training and its continuation: they don't change what is computed.
_FREE_KEYS = {
    "storage",
    "model",  # its fingerprint is compared instead
    "data",  # its digest, in the plan's
    "num_workers",
    "cpus_per_worker",
    "threads_per_worker",
    "validation_samples",
    "checkpoint_every",
    "log_every",
    "fresh",
}


def train(config: TrainConfig, parent_run_id: str | None = None) -> JobReport:
    """Train one stage; a training of the same name and stage is resumed, a finished one re-used.

    Two trainings may run at the same time from two threads of one driver, each in its own Ray Train group (checked with
    Ray 2.60; Ctrl-C then stops the driver, but only a fit in the main thread is aborted cleanly). Enter `ray_cluster`
    around both, so that neither shuts the other's Ray down. `cpu_seconds` counts this training's workers alone.

    Raises: before a worker starts, InputError for missing data, modes, columns or rows; FingerprintError for another
    model's data; ModelError if the model lacks the stage's part; ConfigError if the name holds another training;
    ResourceError if CPUs are short. Later, NexusgenError if the loss is no longer finite.
    """
    with CpuMeter() as meter:
        model = pin_model(config.model, config.storage)
        config = config.model_copy(update={"storage": storage.absolute(config.storage), "model": model})
        folder = resolve_model(config.model, config.storage)
        manifest = read_manifest(folder)
        _check_parts(config, manifest)
        data, plan = _open(config, manifest)
        place = checkpoint.stage_folder(config.storage, config.name, config.stage)
        found = None if config.fresh else checkpoint.latest(place)
        if found is not None:
            _check_same_training(config, plan, manifest, found)
            if found.meta.step >= config.num_steps:
                return _report(meter.seconds, 0.0, found, resumed_from=found.meta.step)
        needed = config.num_workers * config.cpus_per_worker
        why = f"train {config.stage} with {config.num_workers} worker(s) of {config.cpus_per_worker:g} CPU"
        with (
            ray_cluster(needed, why),
            tracking.job_run(
                config.storage,
                config.name,
                "train",
                dump_config(config),
                stage=config.stage,
                parent=parent_run_id,
                resume_run_id=found.meta.run_id if found is not None else None,
            ) as run,
        ):
            if config.fresh:
                checkpoint.forget(place)
            run.set_tags({tracking.TAG_FINGERPRINT: manifest.fingerprint})
            for entry in data.inputs:
                run.log_dataset_input(entry.name, entry.uri, entry.digest, run_id=entry.run_id)
            storage.write_bytes_atomic(storage.join(place, "config.yaml"), dump_config(config).encode())
            inputs = [entry.model_dump() for entry in data.inputs]
            storage.write_json(storage.join(place, "run.json"), {"run_id": run.run_id, "inputs": inputs})
            with _shown_progress(config, place):
                _fit(config, run.run_id, place)
            done = checkpoint.latest(place)
            assert done is not None
            progress = json.loads(storage.read_bytes(storage.join(place, "progress.json")))
            resumed_from = found.meta.step if found is not None else 0
            report = _report(meter.seconds, progress["cpu_seconds"], done, resumed_from)
            run.log_report(report)
        return report


def _check_parts(config: TrainConfig, manifest: Manifest) -> None:
    missing = [part for part in STAGES[config.stage].parts if part not in manifest.parts]
    if missing:
        raise ModelError(
            f"model={config.model} lacks {', '.join(missing)}, which stage {config.stage} trains; "
            f"it holds {', '.join(manifest.parts) or 'nothing'}"
        )


def _open(config: TrainConfig, manifest: Manifest) -> tuple[StageData, Plan]:
    stage = STAGES[config.stage]
    data = open_data(config.storage, config.data_names, stage, manifest, config.validation_fraction)
    return data, Plan(data.train_table, config.batch_rule, config.seed, data.digest)


def _check_same_training(config: TrainConfig, plan: Plan, manifest: Manifest, found: Checkpoint) -> None:
    """Raises: ConfigError naming what differs between the stored training and this configuration."""
    ours, theirs = config.model_dump(mode="json"), found.meta.config
    keys = [key for key in ours if key not in _FREE_KEYS and ours[key] != theirs.get(key)]
    differences = [f"{key} was {theirs.get(key)!r}, now {ours[key]!r}" for key in keys]
    if found.meta.base_fingerprint != manifest.fingerprint:
        differences.append(f"the model was {found.meta.base_fingerprint[:12]}, now {manifest.fingerprint[:12]}")
    if not differences and found.meta.plan_digest != plan.digest:
        differences.append("the embedded data has changed")
    if differences:
        raise ConfigError(
            f"{found.uri} belongs to another training of name={config.name} stage={config.stage}: "
            f"{'; '.join(differences)}. Choose another name, or fresh=true to start over"
        )


def _report(seconds: float, cpu_seconds: float, done: Checkpoint, resumed_from: int) -> JobReport:
    meta = done.meta
    return JobReport(
        job=f"train {meta.stage}",
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        samples=meta.num_samples,
        loss_first=meta.loss_first,
        loss_last=meta.loss_last,
        outputs={
            "checkpoint": done.uri,
            "run_id": meta.run_id,
            "step": meta.step,
            "resumed_from": resumed_from,
            "validation": meta.validation,
        },
        reused=resumed_from == meta.step,
    )


# --- on Ray Train ---


def _fit(config: TrainConfig, run_id: str, place: str) -> None:
    """Run `_work` on the workers until the last step. Raises: the workers' own NexusgenError."""
    from ray.train import RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    scratch = storage.join(place, ".ray")  # Ray Train wants a place that all nodes reach; it holds nothing of value
    trainer = TorchTrainer(
        _work,
        train_loop_config={"config": config.model_dump(mode="json"), "run_id": run_id},
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, resources_per_worker={"CPU": config.cpus_per_worker}
        ),
        run_config=RunConfig(name=f"{config.stage}-{uuid.uuid4().hex[:8]}", storage_path=scratch),
        torch_config=TorchConfig(backend="gloo"),
    )
    is_main_thread = threading.current_thread() is threading.main_thread()
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit:  # how Ray's own handler of SIGINT, which aborts the workers, ends the driver
        if is_main_thread:
            raise KeyboardInterrupt from None
        raise  # Ray went down under this thread; the main thread knows why
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            cause = getattr(failure, "_base_exc", failure)  # Ray wraps what a worker raised together with its traceback
            if isinstance(cause, NexusgenError):
                raise cause from None
        raise
    finally:
        if is_main_thread and on_interrupt is not None:
            signal.signal(signal.SIGINT, on_interrupt)  # Ray leaves its handler behind
        if not storage.is_remote(scratch):
            shutil.rmtree(storage.local_path(scratch), ignore_errors=True)


def _work(job: Mapping[str, Any]) -> None:
    """The train function of one worker."""
    import ray.train

    config = TrainConfig.model_validate(job["config"])
    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size())
    torch.set_num_threads(config.threads_per_worker)
    if ranks.rank != 0:
        run_training(config, job["run_id"], ranks, None)
        return
    with tracking.attach(config.storage, job["run_id"]) as run:
        run_training(config, job["run_id"], ranks, run)


@contextlib.contextmanager
def _shown_progress(config: TrainConfig, place: str) -> Iterator[None]:
    """Print rank 0's progress to standard error now and then, while the body runs."""
    uri = storage.join(place, "progress.json")
    storage.delete(uri)
    is_over = threading.Event()

    def show() -> None:
        shown = -1
        while not is_over.wait(SHOW_EVERY_S):
            with contextlib.suppress(NexusgenError, ValueError):
                if not storage.exists(uri):
                    continue
                progress = json.loads(storage.read_bytes(uri))
                if progress["step"] != shown:
                    shown = progress["step"]
                    print(progress_line(config.stage, progress), file=sys.stderr, flush=True)

    thread = threading.Thread(target=show, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def progress_line(stage: str, progress: Mapping[str, Any]) -> str:
    """Where a training is, for people: step, losses, speed, and how long it will still take."""
    parts = " ".join(f"{name} {value:.4f}" for name, value in progress["losses"].items())
    left = progress["num_steps"] - progress["step"]
    eta_s = left / progress["steps_per_s"] if progress["steps_per_s"] else 0.0
    return (
        f"train {stage}: step {progress['step']}/{progress['num_steps']} {parts} "
        f"{progress['samples_per_s']:.0f} samples/s, {eta_s / 60:.1f} min left"
    )


# --- the loop ---


@dataclass(frozen=True)
class Ranks:
    """This process among the workers."""

    rank: int = 0
    world_size: int = 1

    def sum_(self, tensor: Float[Tensor, "..."]) -> None:
        """Replace a tensor by its sum over all ranks."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)


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


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to `final_lr_fraction` at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.num_steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.learning_rate * (config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine)


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def training_steps(
    stage: AnyStage,
    batches: Iterator[Batch[Any]],
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    ranks: Ranks,
) -> Iterator[StepRecord]:
    """Take one optimizer step per batch. Losses and gradients are those of the whole step, whatever the ranks.

    Raises: NexusgenError if the loss is no longer finite.
    """
    parameters = list(stage.module.parameters())
    stage.module.train()
    for batch in batches:
        started = time.perf_counter()
        step, rows = batch.planned.step, batch.planned.rows
        parts = _losses(stage, batch, config)
        means, counts = _global_means(parts, list(stage.weights), ranks)
        loss = sum(stage.weights[name] * mean for name, mean in means.items())
        if not math.isfinite(loss):
            raise NexusgenError(
                f"train {config.stage}: the loss is {loss} at step {step}: lower learning_rate, or look at the data"
            )
        optimizer.zero_grad()
        if parts:
            total_loss(parts, stage.weights, counts).backward()
        _sum_gradients(parameters, ranks)
        grad_norm = nn.utils.clip_grad_norm_(parameters, config.gradient_clip, foreach=True)
        learning_rate = learning_rate_at(step, config)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        yield StepRecord(
            step=step,
            loss=loss,
            losses=means,
            grad_norm=float(grad_norm),
            learning_rate=learning_rate,
            num_samples=len(rows),
            num_tokens=plan.num_tokens(rows),
            seconds=time.perf_counter() - started + batch.wait_s,
            wait_s=batch.wait_s,
        )


def _losses(stage: AnyStage, batch: Batch[Any], config: TrainConfig) -> dict[str, LossPart]:
    if batch.content is None:
        return {}
    with _forward_precision(config):
        return stage.loss(batch.content, StepRandom(config.seed, batch.planned.step))


@contextlib.contextmanager
def _forward_precision(config: TrainConfig) -> Iterator[None]:
    """Autocast, if asked for. Attention by plain matrix products: the backward of the CPU's fused bf16 kernel is slow
    (a third of a whole step of the demo's sizes, measured with torch 2.13)."""
    if config.precision == "fp32":
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def _global_means(
    parts: Mapping[str, LossPart], names: Sequence[str], ranks: Ranks
) -> tuple[dict[str, float], dict[str, int]]:
    """Mean and count of each part over all ranks; a part without terms has mean 0."""
    sums = [float(parts[name].sum.detach()) if name in parts else 0.0 for name in names]
    counts = [float(parts[name].count) if name in parts else 0.0 for name in names]
    totals = torch.tensor([sums, counts], dtype=torch.float64)
    ranks.sum_(totals)
    all_sums, all_counts = totals.tolist()
    means = {name: total / max(count, 1.0) for name, total, count in zip(names, all_sums, all_counts, strict=True)}
    return means, {name: int(count) for name, count in zip(names, all_counts, strict=True)}


def _sum_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Sum gradients over ranks in one flat all-reduce; what the loss didn't touch gets zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if ranks.world_size == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    ranks.sum_(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def run_training(config: TrainConfig, run_id: str, ranks: Ranks, run: tracking.Run | None) -> None:
    """Train from the last checkpoint, or the beginning, to the last step. Rank 0 may have a `run` to log into."""
    folder = resolve_model(config.model, config.storage)
    manifest = read_manifest(folder)
    data, plan = _open(config, manifest)
    torch.manual_seed(config.seed)
    stage = build_stage(config.stage, folder, config.levels)
    optimizer = make_optimizer(stage.module, config)
    place = checkpoint.stage_folder(config.storage, config.name, config.stage)
    found = checkpoint.latest(place)
    if found is not None:
        checkpoint.load(found, stage.module, optimizer)
    meta = found.meta if found is not None else _first_meta(config, run_id, ranks, manifest, data, plan)
    source: StageSource[Any, Any] = StageSource(data, stage)
    batches = iterate(plan, source, config.num_steps, meta.step, ranks.rank, ranks.world_size)
    follower = _Follower(config, run, place)
    for record in training_steps(stage, batches, plan, optimizer, config, ranks):
        step = record.step + 1
        meta = meta.model_copy(
            update={
                "step": step,
                "world_size": ranks.world_size,
                "num_samples": meta.num_samples + record.num_samples,
                "loss_first": record.loss if record.step == 0 else meta.loss_first,
                "loss_last": record.loss,
            }
        )
        if ranks.rank != 0:
            continue
        follower.follow(record)
        if step % config.checkpoint_every == 0 or step == config.num_steps:
            meta = meta.model_copy(
                update={"validation": _validate(stage, data, source, config), "loss_last": follower.loss}
            )
            checkpoint.save(place, stage.module, optimizer, meta)
            follower.show_validation(step, meta.validation, _draw(stage, data, source))
    cpu_seconds = torch.tensor([time.process_time()], dtype=torch.float64)
    ranks.sum_(cpu_seconds)
    if ranks.rank == 0:
        follower.finish(float(cpu_seconds))


def _first_meta(
    config: TrainConfig, run_id: str, ranks: Ranks, manifest: Manifest, data: StageData, plan: Plan
) -> Meta:
    return Meta(
        stage=config.stage,
        step=0,
        num_steps=config.num_steps,
        run_id=run_id,
        seed=config.seed,
        plan_digest=plan.digest,
        world_size=ranks.world_size,
        config=config.model_dump(mode="json"),
        base_fingerprint=manifest.fingerprint,
        inputs=data.inputs,
        num_samples=0,
        loss_first=0.0,
        loss_last=0.0,
        validation={},
    )


@torch.no_grad()
def _validate(stage: AnyStage, data: StageData, source: StageSource[Any, Any], config: TrainConfig) -> dict[str, float]:
    """Losses on held-out samples by part, with the same random numbers every time, beside the stage's baseline."""
    held_out = source.samples(data.validation[: config.validation_samples])
    if not held_out:
        return {}
    parts: dict[str, list[LossPart]] = {name: [] for name in stage.weights}
    stage.module.eval()
    for start in range(0, len(held_out), VALIDATION_BATCH):
        batch = stage.collate(held_out[start : start + VALIDATION_BATCH])
        with _forward_precision(config):
            for name, part in stage.loss(batch, StepRandom(config.seed, -1)).items():  # type: ignore[arg-type]
                parts[name].append(part)
    stage.module.train()
    means = {
        name: float(sum(float(part.sum) for part in found) / max(1, sum(part.count for part in found)))
        for name, found in parts.items()
    }
    return means | stage.baseline(source.samples(data.train[: config.validation_samples]), held_out)


def _draw(stage: AnyStage, data: StageData, source: StageSource[Any, Any]) -> Image.Image | None:
    """Targets beside predictions of the first held-out samples (of training samples, where none is held out)."""
    rows = data.validation if len(data.validation) else data.train
    pairs = stage.pictures(source.samples(rows[:NUM_PICTURES]))
    if not pairs:
        return None
    return draw_sheet([Cell(pair, "") for pair in pairs], num_columns=4, title="target | decoded from its embedding")


class _Follower:
    """Rank 0's eyes: metrics of every `log_every` steps into MLflow, and where the training is into progress.json."""

    def __init__(self, config: TrainConfig, run: tracking.Run | None, place: str) -> None:
        self._config, self._run, self._place = config, run, place
        self._window: deque[StepRecord] = deque(maxlen=config.log_every)
        self._written = 0.0
        self._progress: dict[str, Any] = {"stage": config.stage, "num_steps": config.num_steps, "cpu_seconds": None}

    @property
    def loss(self) -> float:
        """Mean loss of the last steps, `log_every` at most."""
        return sum(record.loss for record in self._window) / len(self._window)

    def follow(self, record: StepRecord) -> None:
        """Take note of a step."""
        self._window.append(record)
        step = record.step + 1
        is_due = step % self._config.log_every == 0 or step == self._config.num_steps
        if is_due and self._run is not None:
            self._run.log_metrics(self._metrics(), step)
        if time.monotonic() - self._written > PROGRESS_EVERY_S:
            self._write(step)

    def show_validation(self, step: int, validation: Mapping[str, float], sheet: Image.Image | None) -> None:
        """Log what held-out samples say."""
        if self._run is None:
            return
        self._run.log_metrics({f"eval/validation/{name}": value for name, value in validation.items()}, step)
        if sheet is not None:
            self._run.log_image(sheet, f"samples/step-{step:06d}.png")

    def finish(self, cpu_seconds: float) -> None:
        """Leave what the driver reports."""
        self._progress["cpu_seconds"] = cpu_seconds
        self._write(self._config.num_steps)

    def _metrics(self) -> dict[str, float]:
        window, last = self._window, self._window[-1]
        seconds = sum(record.seconds for record in window)
        losses = {f"train/{name}": sum(record.losses[name] for record in window) / len(window) for name in last.losses}
        return losses | {
            "train/loss": self.loss,
            "train/grad_norm": last.grad_norm,
            "train/lr": last.learning_rate,
            "train/samples_per_s": sum(record.num_samples for record in window) / seconds,
            "train/tokens_per_s": sum(record.num_tokens for record in window) / seconds,
            "train/data_wait_fraction": sum(record.wait_s for record in window) / seconds,
        }

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
