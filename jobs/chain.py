"""The road itself: every job from tar shards to a promoted model, as one chain.

    pack -> embed vision -> embed latents -> train ar                 -> register
                                          -> train generation_decoder
         -> embed predicted -> train editing_decoder -> register -> evaluate -> promote

The first two trainings run side by side: the decoder learns from embeddings of the vision tower, so it needs no stage
ar. The editing decoder learns from the trained language model's predictions, so it comes after the first version, and
makes a second one of it. All jobs share one Ray cluster and one MLflow run, the parent of theirs. What is finished is
not done again: started anew, the road goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nexusgen.config import Config, dump_config, parse_config, read_values
from nexusgen.errors import ConfigError, GateError
from pipelines import registry, runtime, storage, tracking
from pipelines.accounting import Prices
from pipelines.embed import EmbedConfig, embed
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.pack import PackConfig, pack
from pipelines.promote import PromoteConfig, promote
from pipelines.register import RegisterConfig, register
from pipelines.runtime import JobReport
from pipelines.train import TrainConfig, train

SUITE = "demo_world"
SAMPLES_NAME = "samples.png"
SPARE_CPUS = 1.0  # for Ray Data's own tasks, beside a job's workers

# Sections of a road's configuration, and which of the road's own keys each takes over.
SECTIONS = {
    "pack": ("storage", "name", "prices"),
    "embed_vision": ("storage", "name", "model", "input", "prices"),
    "embed_latents": ("storage", "name", "model", "input", "prices"),
    "train_ar": ("storage", "name", "model", "prices"),
    "train_generation_decoder": ("storage", "name", "model", "prices"),
    "embed_predicted": ("storage", "name", "model", "input", "prices"),
    "train_editing_decoder": ("storage", "name", "model", "prices"),
    "evaluate": ("storage", "name", "model", "prices"),
    "promote": ("storage",),
}


class RoadConfig(Config):
    """The whole road: what all jobs share, and each job's own settings."""

    storage: str
    name: str
    model: str = registry.DEMO_BASE  # the base that everything starts from
    input: str | list[str] | None = None  # tar shards to start from; null: those that `pack` makes
    prices: Prices | None = None  # what an hour costs: then each job's run tells its cost

    pack: PackConfig
    embed_vision: EmbedConfig
    embed_latents: EmbedConfig
    train_ar: TrainConfig
    train_generation_decoder: TrainConfig
    embed_predicted: EmbedConfig
    train_editing_decoder: TrainConfig
    evaluate: EvaluateConfig
    promote: PromoteConfig

    @property
    def tars(self) -> str:
        """Where `pack` puts its shards."""
        return storage.join(self.storage, "tars", self.name)

    @property
    def num_cpus(self) -> float:
        """Logical CPUs that the most demanding of the jobs needs."""
        trainings = (self.train_ar, self.train_generation_decoder)
        embeds = (self.embed_vision, self.embed_latents, self.embed_predicted)
        editing = self.train_editing_decoder
        return SPARE_CPUS + max(
            sum(one.min_workers * one.cpus_per_worker for one in trainings),
            editing.min_workers * editing.cpus_per_worker,
            max(one.num_encoders for one in embeds),
            self.evaluate.num_actors * self.evaluate.actor_cpus,
        )


@dataclass(frozen=True)
class RoadResult:
    """What came of a road. `refusal` is what the gate of `promote` said against the model; empty if it passed."""

    storage: str
    seconds: float
    cpu_seconds: float
    reports: tuple[JobReport, ...]
    base_scores: Mapping[str, Any]
    scores: Mapping[str, Any]
    model: str
    fingerprint: str
    version: int
    samples: str
    refusal: str


def load_road(path: Path, overrides: Sequence[str] = ()) -> RoadConfig:
    """Read a road: each job has the settings of the file SECTION.yaml beside `path`, replaced by those of its section.

    Raises: ConfigError naming the unknown key, the wrong value, or the key that is the road's to set.
    """
    return parse_config(RoadConfig, read_sections(path, overrides, SECTIONS), str(path))


def read_sections(path: Path, overrides: Sequence[str], sections: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The values of a configuration that chains jobs. Each section holds a job's settings: those of SECTION.yaml beside
    `path`, replaced by the file's own section, and by those keys of the file itself that `sections` names.

    Raises: ConfigError if a section sets such a key itself.
    """
    values = read_values(path, overrides)
    shared = {"model": registry.DEMO_BASE, "input": None, **values}
    if "storage" in shared:
        shared["storage"] = storage.absolute(str(shared["storage"]))  # workers have another working directory
        values["storage"] = shared["storage"]
        if shared["input"] is None and "name" in shared:
            shared["input"] = storage.join(shared["storage"], "tars", str(shared["name"]))
    for section, keys in sections.items():
        own = values.get(section, {})
        if not isinstance(own, dict):
            continue  # the check of the whole says what is wrong
        for key in keys:
            if key in own:
                raise ConfigError(
                    f"{path}: {section}.{key} is {own[key]!r}, but the road's own {key} holds for all its jobs: "
                    f"remove it, and set {key} instead if the road has such a key"
                )
        file = path.parent / f"{section}.yaml"
        from_file = read_values(file) if file.is_file() else {}
        values[section] = from_file | own | {key: shared[key] for key in keys if key in shared}
    return values


def run_road(config: RoadConfig) -> RoadResult:
    """Walk the whole road. A model that the gate refuses is a result, not an error.

    Raises: what the jobs raise; ResourceError with the numbers, before anything starts, if CPUs are short.
    """
    registry.resolve_model(config.model, config.storage)
    storage.check_writable(config.storage)
    with (
        runtime.CpuMeter() as meter,
        runtime.ray_cluster(config.num_cpus, "the road"),
        tracking.road_run(
            config.storage, config.name, dump_config(config), resume_run_id=_earlier_run(config)
        ) as parent,
    ):
        _remember_run(config, parent.run_id)
        walker = _Walker(parent.run_id)
        if config.input is None:
            walker.walk("pack", lambda run_id: pack(config.pack, run_id))
        walker.walk("embed vision", lambda run_id: embed(config.embed_vision, run_id))
        walker.walk("embed latents", lambda run_id: embed(config.embed_latents, run_id))
        walker.walk_side_by_side(
            ("train generation_decoder", lambda run_id: train(config.train_generation_decoder, run_id)),
            ("train ar", lambda run_id: train(config.train_ar, run_id)),
        )
        own = RegisterConfig(storage=config.storage, name=config.name, model=config.model, prices=config.prices)
        drawing = _published(walker.walk("register", lambda run_id: register(own, run_id)))
        predicted = config.embed_predicted.model_copy(update={"model": drawing})
        walker.walk("embed predicted", lambda run_id: embed(predicted, run_id))
        editing = config.train_editing_decoder.model_copy(update={"model": drawing})
        walker.walk("train editing_decoder", lambda run_id: train(editing, run_id))
        own = own.model_copy(
            update={"model": drawing, "ar": None, "generation_decoder": None, "editing_decoder": "latest"}
        )
        registered = walker.walk("register with editing", lambda run_id: register(own, run_id))
        made, published = registered.outputs, _published(registered)
        of_base = config.evaluate.model_copy(update={"model": config.model})
        of_model = config.evaluate.model_copy(update={"model": published})
        base_scores = walker.walk("evaluate base", lambda run_id: evaluate(of_base, run_id)).outputs["scores"]
        scores = walker.walk("evaluate", lambda run_id: evaluate(of_model, run_id)).outputs["scores"]
        refusal = ""
        wanted = config.promote.model_copy(update={"version": made["version"]})
        try:
            walker.walk("promote", lambda run_id: promote(wanted, run_id))
        except GateError as error:
            refusal = str(error)
        samples = _copy_samples(config, made["fingerprint"])
        result = RoadResult(
            storage=config.storage,
            seconds=meter.seconds,
            cpu_seconds=meter.cpu_seconds,
            reports=tuple(walker.reports),
            base_scores=base_scores.get(SUITE, {}),
            scores=scores.get(SUITE, {}),
            model=made["model"],
            fingerprint=made["fingerprint"],
            version=made["version"],
            samples=samples,
            refusal=refusal,
        )
        parent.set_tags({tracking.TAG_FINGERPRINT: result.fingerprint})
        parent.log_text(json.dumps([report.to_json() for report in result.reports], indent=2), "jobs.json")
        parent.log_metrics({"job/seconds": result.seconds, "job/cpu_seconds": result.cpu_seconds})
    return result


class _Walker:
    """Runs jobs under one parent run, says on standard error where the road is, and keeps the reports."""

    def __init__(self, parent_run_id: str) -> None:
        self.reports: list[JobReport] = []
        self._parent_run_id = parent_run_id

    def walk(self, label: str, job: Callable[[str], JobReport]) -> JobReport:
        """Run one job."""
        _say(f"== {label}")
        report = replace(job(self._parent_run_id), job=label)
        self.reports.append(report)
        _say(f"== {label}: {'re-used' if report.reused else f'done in {report.seconds:.0f} s'}")
        return report

    def walk_side_by_side(
        self, main: tuple[str, Callable[[str], JobReport]], beside: tuple[str, Callable[[str], JobReport]]
    ) -> None:
        """Run two jobs at the same time. If one fails, the other is still brought to its end, as its work keeps."""
        failures: list[Exception] = []

        def work(label: str, job: Callable[[str], JobReport]) -> None:
            try:
                self.walk(label, job)
            except Exception as error:
                failures.append(error)
                _say(f"== {label}: failed ({error}); the job beside it goes on to its end")

        # A daemon, so that Ctrl-C isn't held up by it: the job goes down with Ray, and resumes when started again.
        thread = threading.Thread(target=work, args=beside, name=beside[0], daemon=True)
        thread.start()
        work(*main)
        thread.join()
        if failures:
            raise failures[0]
        self.reports[-2:] = sorted(self.reports[-2:], key=lambda report: report.job)


def _published(report: JobReport) -> str:
    """The version that a register job made."""
    return f"models:/{registry.MODEL_NAME}/{report.outputs['version']}"


def _earlier_run(config: RoadConfig) -> str | None:
    """The MLflow run of a road of the same name and configuration, to be continued."""
    uri = _run_uri(config)
    if not storage.exists(uri):
        return None
    record = json.loads(storage.read_bytes(uri))
    return str(record["run_id"]) if record["config"] == _digest(config) else None


def _remember_run(config: RoadConfig, run_id: str) -> None:
    record = {"run_id": run_id, "config": _digest(config)}
    storage.write_bytes_atomic(_run_uri(config), json.dumps(record, indent=2).encode())


def _run_uri(config: RoadConfig) -> str:
    return storage.join(config.storage, "roads", config.name, "run.json")


def _digest(config: RoadConfig) -> str:
    return hashlib.sha256(dump_config(config).encode()).hexdigest()[:16]


def _copy_samples(config: RoadConfig, fingerprint: str) -> str:
    """The evaluation's unpicked samples of the published model, where nobody has to look for them."""
    sheet = storage.join(config.storage, "evaluations", fingerprint, SUITE, SAMPLES_NAME)
    target = storage.join(config.storage, SAMPLES_NAME)
    if storage.exists(sheet):
        storage.write_bytes_atomic(target, storage.read_bytes(sheet))
    return target


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
