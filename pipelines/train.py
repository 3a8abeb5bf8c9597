"""The job `train`: one stage on Ray Train workers, resumed where it stopped, followed in MLflow.

The driver checks everything that can be checked before a worker starts; each worker runs the loop of `loop.py`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator

from nexusgen.config import Config, dump_config
from nexusgen.errors import ConfigError, ModelError, NexusgenError, ResourceError
from nexusgen.flow_matching import LevelDensity
from nexusgen.model.manifest import Manifest, read_manifest
from nexusgen.schema import Task
from pipelines import checkpoint, storage, tracking
from pipelines.accounting import Prices, account_uri, finish_account
from pipelines.batches import SHUFFLE_BYTES, BatchRule, Plan, check_world_size
from pipelines.checkpoint import Checkpoint
from pipelines.exported import Exporter
from pipelines.loop import Ranks, open_training, run_training
from pipelines.lora import LoraConfig
from pipelines.notices import Notice, Notices, active
from pipelines.parallel import resolve_precision
from pipelines.registry import pin_model, resolve_model
from pipelines.runtime import CpuMeter, JobReport, ray_cluster
from pipelines.stage_data import Embeddings
from pipelines.stages import STAGES, StageName

if TYPE_CHECKING:
    from ray.train import WorkerGroupError

SHOW_EVERY_S = 10.0  # the driver prints where rank 0 is
RESIZE_EVERY_S = 60.0  # Ray Train looks whether there is room for another number of workers
HOLD_S = 120.0  # workers that are to be replaced wait so long beyond the time that was told
STOP_FILE = "stop.json"  # in a stage's folder: the driver was told to end


class TrainConfig(Config):
    """What one stage is trained on, how long and how. Steps are fixed: the result doesn't depend on the clock."""

    storage: str
    name: str
    stage: StageName
    data: str | list[str] | None = None  # names of embedded data; default: the project's own name
    model: str = "demo-base"
    embeddings: Embeddings = "stored"  # online: made of mode images while stage ar runs, where storing is too much

    num_steps: int = Field(default=1000, ge=1)
    batch_samples: int = Field(default=24, ge=1)  # samples of a step, over all workers
    batch_tokens: int | None = Field(default=None, ge=1)  # if set, a step's budget of padded tokens, in their place
    mixture: dict[Task, float] | None = None  # shares of the tasks in a step; null: as the data has them
    virtual_streams: int = Field(default=2, ge=1)  # a step is cut into so many parts; num_workers must divide it
    window_gb: float = Field(default=SHUFFLE_BYTES / 2**30, gt=0)  # of slices whose rows are mixed; a worker holds two

    learning_rate: float = Field(default=2e-3, gt=0)
    warmup_steps: int = Field(default=50, ge=0)
    final_lr_fraction: float = Field(default=0.02, ge=0, le=1)  # of the learning rate, at the end of the cosine
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = Field(default=0.01, ge=0)  # on matrices only
    gradient_clip: float = Field(default=1.0, gt=0)
    # Of the forward; weights and optimizer are always fp32. auto: bf16 where the driver's hardware is fast in it.
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    normalisation: Literal["global", "per_rank"] = "global"  # per_rank: as the released model was trained
    levels: LevelDensity = "logit_normal"  # noise levels of a decoder stage
    conditioning_dropout: float = Field(
        default=0.0, ge=0, lt=1
    )  # share of a decoder's samples drawn without their image
    lora: LoraConfig | None = None  # stage ar with adapters on a frozen language model; null: all of it is trained
    ema_decay: float = Field(default=0.0, ge=0, lt=1)  # of the averaged weights that are published; 0: none are kept
    max_gradient_ratio: float = Field(default=20.0, gt=1)  # a gradient so many times the usual one is skipped
    max_skipped_steps: int = Field(default=20, ge=0)  # more of them end the training
    seed: int = 0

    # [min, max]: as many as there is room for, at any time. A step is cut as for max; fewer take more of it each.
    num_workers: int | tuple[int, int] = 1
    # Of the workers, from the last checkpoint, when one or its node dies. When they are used up, the training ends; if
    # steps were saved meanwhile, they are counted anew.
    max_restarts: int = Field(default=3, ge=0)
    parallelism: Literal["replicated", "fsdp"] = "replicated"  # of weights, gradients and optimizer
    accumulate: int = Field(default=1, ge=1)  # micro-batches that a worker, of the most, makes of its part of a step
    activation_checkpointing: bool = False  # compute activations again in the backward, for a third more arithmetic
    cpus_per_worker: float = Field(default=0.5, gt=0)  # logical, as Ray counts them
    threads_per_worker: int = Field(default=1, ge=1)
    gpus_per_worker: Literal[0, 1] = 0

    validation_fraction: float = Field(default=0.02, ge=0, lt=1)  # of the samples, held out by a hash of their key
    validation_samples: int = Field(default=256, ge=0)  # at most so many are looked at
    checkpoint_every: int = Field(default=500, ge=1)  # steps; the last step always has one
    keep_checkpoints: int = Field(default=2, ge=1)  # so many of the last, and the best on held-out samples
    log_every: int = Field(default=10, ge=1)  # steps
    prices: Prices | None = None  # what an hour costs: then the job's run tells its cost
    dry_run: bool = False  # tell what it takes, and start nothing
    fresh: bool = False  # start over even if a training of this name and stage can be resumed

    @field_validator("num_workers", mode="before")
    @classmethod
    def _check_num_workers(cls, value: Any) -> Any:
        numbers = list(value) if isinstance(value, list | tuple) else [value, value]
        if len(numbers) != 2 or not all(type(number) is int for number in numbers) or not 1 <= numbers[0] <= numbers[1]:
            raise ValueError("wanted a whole number from 1 on, or [min, max] with 1 <= min <= max")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            check_world_size(self.virtual_streams, self.max_workers, self.accumulate)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if self.lora is not None and self.stage != "ar":
            raise ValueError(
                f"lora is for stage ar, the language model; stage {self.stage} trains its decoder in full: "
                "leave lora out, or set lora=null"
            )
        if self.embeddings == "online" and self.stage != "ar":
            raise ValueError(
                f"embeddings=online is for stage ar; stage {self.stage} reads few numbers of each picture, and "
                "predictions of a whole language model: embed them, and set embeddings=stored"
            )
        return self

    @property
    def min_workers(self) -> int:
        """The training waits while there is room for fewer workers."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The training never has more workers."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def num_micro_batches(self) -> int:
        """Into so many micro-batches a step is cut, whatever the number of workers."""
        return self.max_workers * self.accumulate

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
            samples=samples,
            tokens=self.batch_tokens,
            mixture=self.mixture,
            virtual_streams=self.virtual_streams,
            window_bytes=max(1, round(self.window_gb * 2**30)),
        )


# Keys that may differ between a training and its continuation: they don't change what is computed.
_FREE_KEYS = {
    "storage",
    "model",  # its fingerprint is compared instead
    "data",  # its digest, in the plan's
    "window_gb",  # in the plan's digest, where it matters
    "num_workers",
    "max_restarts",
    "parallelism",
    "accumulate",
    "activation_checkpointing",
    "keep_checkpoints",
    "cpus_per_worker",
    "threads_per_worker",
    "gpus_per_worker",
    "validation_samples",
    "checkpoint_every",
    "log_every",
    "prices",
    "dry_run",
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
        precision = resolve_precision(config.precision, config.gpus_per_worker > 0)
        settled = {"storage": storage.absolute(config.storage), "model": model, "precision": precision}
        config = config.model_copy(update=settled)
        folder = resolve_model(config.model, config.storage)
        manifest = read_manifest(folder)
        _check_parts(config, manifest)
        data, plan = open_training(config, manifest)
        place = checkpoint.stage_folder(config.storage, config.name, config.stage)
        found = None if config.fresh else checkpoint.latest(place)
        if found is not None:
            _check_same_training(config, plan, manifest, found)
            if found.meta.step >= config.num_steps:
                return _report(meter.seconds, 0.0, found, resumed_from=found.meta.step)
        needed = config.min_workers * config.cpus_per_worker
        why = f"train {config.stage} with {config.min_workers} worker(s) of {config.cpus_per_worker:g} CPU"
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
            if done is None or done.meta.step < config.num_steps:  # told to end, it has saved, and is to say so
                raise KeyboardInterrupt
            progress = json.loads(storage.read_bytes(storage.join(place, "progress.json")))
            resumed_from = found.meta.step if found is not None else 0
            report = _report(meter.seconds, progress["cpu_seconds"], done, resumed_from)
            uri = account_uri(config.storage, "train", config.name, config.stage)
            run.log_metrics(finish_account(uri, run.run_id).metrics())
            run.log_report(report)
        return report


def _check_parts(config: TrainConfig, manifest: Manifest) -> None:
    missing = STAGES[config.stage].missing_parts(manifest.parts)
    if missing:
        raise ModelError(
            f"model={config.model} lacks {', '.join(missing)}, which stage {config.stage} trains; "
            f"it holds {', '.join(manifest.parts) or 'nothing'}"
        )


def _check_same_training(config: TrainConfig, plan: Plan, manifest: Manifest, found: Checkpoint) -> None:
    """Raises: ConfigError naming what differs between the stored training and this configuration."""
    ours, theirs = config.model_dump(mode="json"), found.meta.config
    keys = [key for key in ours if key not in _FREE_KEYS and ours[key] != theirs.get(key)]
    differences = [f"{key} was {theirs.get(key)!r}, now {ours[key]!r}" for key in keys]
    if found.meta.base_fingerprint != manifest.fingerprint:
        differences.append(f"the model was {found.meta.base_fingerprint[:12]}, now {manifest.fingerprint[:12]}")
    if not differences and found.meta.plan_digest != plan.digest:
        differences.append("the embedded data has changed, or window_gb")
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
    """Run `_work` on the workers until the last step.

    Ray Train counts restarts for good, and a long training on machines that come and go would use up any number. So
    when they are used up, but steps were saved meanwhile, they are counted anew.
    Raises: the workers' own NexusgenError; ResourceError if restarts are used up without a step being saved meanwhile.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.ray_notices import ResizeCallback, SignalCallback, saved_on_sigterm

    stop_uri = storage.join(place, STOP_FILE)
    storage.delete(stop_uri)  # an earlier driver's
    scratch = storage.join(place, ".ray")  # Ray Train wants a place that all nodes reach; it holds nothing of value
    # Any: where Ray's types are those of its Train v1.
    scaling: dict[str, Any] = {
        "num_workers": config.num_workers,
        "elastic_resize_monitor_interval_s": RESIZE_EVERY_S,
    }
    is_main_thread = threading.current_thread() is threading.main_thread()
    on_interrupt = signal.getsignal(signal.SIGINT)

    def fit() -> None:
        callbacks: list[Any] = [SignalCallback(), ResizeCallback()]
        trainer = TorchTrainer(
            _work,
            train_loop_config={"config": config.model_dump(mode="json"), "run_id": run_id, "place": place},
            scaling_config=ScalingConfig(
                use_gpu=config.gpus_per_worker > 0,
                resources_per_worker={"CPU": config.cpus_per_worker},
                **scaling,
            ),
            run_config=RunConfig(
                name=f"{config.stage}-{uuid.uuid4().hex[:8]}",
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=config.max_restarts),
                callbacks=callbacks,
            ),
            torch_config=TorchConfig(backend="nccl" if config.gpus_per_worker else "gloo"),
        )
        try:
            trainer.fit()
        finally:
            if is_main_thread and on_interrupt is not None:
                signal.signal(signal.SIGINT, on_interrupt)  # Ray leaves its handler behind

    told = f"train {config.stage}: SIGTERM; it saves after this step and ends, a second SIGTERM ends it at once"
    try:
        with saved_on_sigterm(stop_uri, told) as is_told_to_end:
            is_through = False
            while not is_through:
                saved = _saved_step(place)
                try:
                    fit()
                    is_through = True
                except WorkerGroupError as error:
                    _raise_own_fault(error, WorkerStoppedError, ResourceError)  # what may pass isn't final
                    if is_told_to_end.is_set():
                        raise KeyboardInterrupt from None
                    _check_goes_on(config, error, saved, _saved_step(place))
    except SystemExit:  # how Ray's own handler of SIGINT, which aborts the workers, ends the driver
        if is_main_thread:
            raise KeyboardInterrupt from None
        raise  # Ray went down under this thread; the main thread knows why
    finally:
        storage.delete(stop_uri)
        if not storage.is_remote(scratch):
            shutil.rmtree(storage.local_path(scratch), ignore_errors=True)


def _saved_step(place: str) -> int:
    """The last step in a checkpoint; 0 if there is none."""
    found = checkpoint.latest(place)
    return found.meta.step if found is not None else 0


def _raise_own_fault(error: WorkerGroupError, *but_not: type[NexusgenError]) -> None:
    """Raises: the NexusgenError that a worker raised, if one did."""
    for failure in error.worker_failures.values():
        if isinstance(failure, NexusgenError) and not isinstance(failure, but_not):
            raise failure from None


def _check_goes_on(config: TrainConfig, error: WorkerGroupError, saved_before: int, saved: int) -> None:
    """Raises: ResourceError if no step was saved while the restarts were used up: a worker's own, or that they died."""
    count = f"{config.max_restarts + 1} time(s)"
    if saved <= saved_before:
        _raise_own_fault(error, WorkerStoppedError)
        print(error, file=sys.stderr, flush=True)  # with the tracebacks of the workers
        raise ResourceError(
            f"train {config.stage}: its workers ended early {count} (max_restarts={config.max_restarts}) and saved no "
            f"step meanwhile, the last is {saved}. The reason stands above; started again, it goes on from there. If "
            "nodes go so often, save more often (checkpoint_every)"
        ) from error
    told = f"train {config.stage}: its workers ended early {count}, but step {saved} is saved: they are started again"
    print(told, file=sys.stderr, flush=True)


def _work(job: Mapping[str, Any]) -> None:
    """The train function of one worker."""
    import ray.train
    import ray.train.torch

    from pipelines.ray_notices import DrainWatch, stop_watched

    config = TrainConfig.model_validate(job["config"])
    context = ray.train.get_context()
    device = ray.train.torch.get_device() if config.gpus_per_worker else torch.device("cpu")
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), device)
    torch.set_num_threads(config.threads_per_worker)
    notices = Notices(DrainWatch().deadline, announces=ranks.rank == 0)
    with active(notices):
        with contextlib.ExitStack() as stack:
            run = None
            if ranks.rank == 0:
                exporter = Exporter(config.name, config.stage)
                run = stack.enter_context(tracking.attach(config.storage, job["run_id"], exporter))
                stack.enter_context(stop_watched(storage.join(job["place"], STOP_FILE)))
            stopped = run_training(config, job["run_id"], ranks, run, notices)
        if stopped:
            _give_up(stopped, config, ranks, notices)


def _give_up(stopped: Notice, config: TrainConfig, ranks: Ranks, notices: Notices) -> None:
    """End this worker as a training wants it that stopped early. Raises: WorkerStoppedError, to be started again."""
    ranks.sum_(torch.zeros(1))  # rank 0 has delivered its metrics: nobody is ended before that
    notices.is_held.set()
    if Notice.END in stopped:
        return
    if Notice.RESTART not in stopped:
        time.sleep(max(0.0, notices.seconds_left) + HOLD_S)  # Ray Train ends this process before
    raise WorkerStoppedError(f"train {config.stage}: a worker was told to end (SIGTERM)")


class WorkerStoppedError(NexusgenError):
    """A worker ended early, after a checkpoint: a failure in Ray Train's eyes, which starts the workers again."""


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
    note = f"; {progress['note']}" if "note" in progress else ""
    return (
        f"train {stage}: step {progress['step']}/{progress['num_steps']} {parts} "
        f"{progress['samples_per_s']:.0f} samples/s, {eta_s / 60:.1f} min left{note}"
    )
