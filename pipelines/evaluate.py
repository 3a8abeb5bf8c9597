"""`nexusgen evaluate`: scores of a model folder or registered version, by batch inference on Ray Data.

Suites (see suites.py) cut their items into units of one batch each; actors that hold the model turn units into rows.
Rows, contact sheets and scores land in STORAGE/evaluations/FINGERPRINT/SUITE/ together with the settings that they were
made under: the same weights under the same settings are not evaluated again.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field, model_validator

from nexusgen.config import Config, dump_config
from nexusgen.model.manifest import Manifest, read_manifest
from nexusgen.model.weights import DRAWING_PARTS, load_model
from pipelines import embedded, registry, runtime, storage, tracking
from pipelines.runtime import JobReport
from pipelines.suite_demo_world import DemoWorldSuite
from pipelines.suite_retrieval import RetrievalSuite
from pipelines.suites import EvaluationSuite, Row, Unit

SuiteName = Literal["demo_world", "retrieval"]
RESULTS_NAME = "results.parquet"
EVALUATED_PARTS = (*DRAWING_PARTS, "editing_decoder")
READER_CPUS = 1.0  # Ray Data's own tasks, beside the actors


class EvaluateConfig(Config):
    """What to evaluate, on what, and how finely."""

    storage: str = Field(description="folder or s3:// URI that holds evaluations/, embedded/ and models/")
    name: str = Field(default="nexusgen", description="name of the project: the MLflow experiment")
    model: str = Field(description="demo-base, a model folder, models:/nexusgen@ALIAS or models:/nexusgen/VERSION")
    suites: tuple[SuiteName, ...] = ("demo_world",)
    seed: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="denoising steps; None: the model's own"
    )
    per_category: Annotated[int, Field(ge=1)] = 24
    num_explicit: Annotated[int, Field(ge=0)] = 96
    num_questions: Annotated[int, Field(ge=0)] = 144
    num_edits: Annotated[int, Field(ge=0)] = 0
    data: str | None = Field(default=None, description="retrieval: name of embedded data of mode vision, held out")
    max_samples: Annotated[int, Field(ge=1)] = Field(default=512, description="retrieval: the first so many targets")
    num_targets: Annotated[int, Field(ge=2)] = Field(default=64, description="retrieval: targets to choose among")
    num_pictures: Annotated[int, Field(ge=0)] = Field(default=24, description="samples on a contact sheet")
    batch_size: Annotated[int, Field(ge=1)] = 24
    num_actors: Annotated[int, Field(ge=1)] = 2
    actor_cpus: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "retrieval" in self.suites and self.data is None:
            raise ValueError("suite retrieval needs data=NAME, the name of embedded data of mode vision")
        if not self.suites:
            raise ValueError("suites is empty: name at least one")
        return self


def evaluate(config: EvaluateConfig, parent_run_id: str | None = None) -> JobReport:
    """Evaluate a model, suite by suite; scores go to the storage, to MLflow and to the version of these weights.

    A suite that was run on the same weights under the same settings is not run again.
    Raises: InputError or ModelError if there is no such model or data; FingerprintError if the data is of another
    encoder; ResourceError if too few CPUs are free.
    """
    with runtime.CpuMeter() as meter:
        manifest = read_manifest(registry.resolve_model(config.model, config.storage))
        suites = _suites(config)
        for suite in suites:
            suite.check(manifest)
        stored = {suite.path: _stored(config, suite, manifest.fingerprint) for suite in suites}
        todo = [suite for suite in suites if stored[suite.path] is None]
        if todo:
            tags = {tracking.TAG_FINGERPRINT: manifest.fingerprint}
            with (
                runtime.ray_cluster(config.num_actors * config.actor_cpus + READER_CPUS, "evaluate"),
                tracking.job_run(
                    config.storage, config.name, "evaluate", dump_config(config), parent=parent_run_id, tags=tags
                ) as run,
            ):
                for suite in todo:
                    stored[suite.path] = _run(suite, config, manifest, run)
                report = _report(config, meter, manifest.fingerprint, stored, reused=False)
                run.log_report(report)
        else:
            report = _report(config, meter, manifest.fingerprint, stored, reused=True)
        for name, content in stored.items():
            assert content is not None
            registry.attach_scores(config.storage, manifest.fingerprint, name, content["scores"], content["run_id"])
    return report


class SuiteActor:
    """One loaded model at work on a suite's units; an actor of Ray Data."""

    def __init__(self, suite: EvaluationSuite, model: str, storage_uri: str) -> None:
        torch.set_num_threads(1)
        # Found here, not in the driver: on a cluster this may be another machine, with a cache of its own.
        folder = registry.resolve_model(model, storage_uri)
        self._schema = suite.schema
        self._work = suite.worker(
            load_model(folder, [part for part in EVALUATED_PARTS if part in read_manifest(folder).parts])
        )

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        """Rows of the units in the batch."""
        rows: list[Row] = []
        for kind, first, last in zip(batch["kind"], batch["first"], batch["last"], strict=True):
            unit = Unit(str(kind), int(first), int(last))
            rows += [{"kind": unit.kind, "index": unit.first + i, **row} for i, row in enumerate(self._work(unit))]
        return pa.Table.from_pylist(rows, schema=self._schema)


def _suites(config: EvaluateConfig) -> list[EvaluationSuite]:
    """The suites asked for, each with the settings that concern it."""
    suites: list[EvaluationSuite] = []
    if "demo_world" in config.suites:
        suites.append(
            DemoWorldSuite(
                seed=config.seed,
                steps=config.steps,
                per_category=config.per_category,
                num_explicit=config.num_explicit,
                num_questions=config.num_questions,
                num_edits=config.num_edits,
                num_pictures=config.num_pictures,
                batch_size=config.batch_size,
            )
        )
    if "retrieval" in config.suites:
        assert config.data is not None
        suites.append(
            RetrievalSuite(
                storage=storage.absolute(config.storage),
                data=config.data,
                data_digest=embedded.read_manifest(config.storage, config.data, "vision").digest,
                seed=config.seed,
                steps=config.steps,
                max_samples=config.max_samples,
                num_targets=config.num_targets,
                num_pictures=config.num_pictures,
                batch_size=config.batch_size,
            )
        )
    return suites


def _run(suite: EvaluationSuite, config: EvaluateConfig, manifest: Manifest, run: tracking.Run) -> dict[str, Any]:
    """Evaluate, write rows, sheets and last the scores. Returns what the file of scores holds."""
    rows = _work_through(suite, config)
    result = suite.summarise(rows)
    folder = _folder(config, suite.path, manifest.fingerprint)
    table = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=suite.schema), table)
    storage.write_bytes_atomic(storage.join(folder, RESULTS_NAME), table.getvalue())
    for name, sheet in result.sheets.items():
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG")
        storage.write_bytes_atomic(storage.join(folder, f"{name}.png"), buffer.getvalue())
        run.log_image(sheet, f"{suite.path}/{name}.png")
    storage.write_bytes_atomic(storage.join(folder, "config.yaml"), dump_config(config).encode())
    made_by = {"run_id": run.run_id, "inputs": [{"uri": config.model, "digest": manifest.fingerprint}]}
    storage.write_bytes_atomic(storage.join(folder, "run.json"), json.dumps(made_by, indent=2).encode())
    run.log_metrics({f"eval/{suite.path}/{name}": value for name, value in _flatten(result.scores)})
    content = {
        "fingerprint": manifest.fingerprint,
        "suite": suite.path,
        "settings": suite.settings,
        "scores": result.scores,
        "run_id": run.run_id,
    }
    storage.write_bytes_atomic(
        registry.scores_uri(config.storage, manifest.fingerprint, suite.path), json.dumps(content, indent=2).encode()
    )
    return content


def _work_through(suite: EvaluationSuite, config: EvaluateConfig) -> list[Row]:
    """Every unit's rows, in order of the items, computed by a pool of actors."""
    import ray.data

    units = suite.units()
    arguments = (suite, registry.pin_model(config.model, config.storage), storage.absolute(config.storage))
    dataset = ray.data.from_items([asdict(unit) for unit in units], override_num_blocks=len(units)).map_batches(
        SuiteActor,
        fn_constructor_args=arguments,
        compute=ray.data.ActorPoolStrategy(size=min(config.num_actors, len(units))),
        batch_size=1,
        num_cpus=config.actor_cpus,
    )
    rows: list[Row] = []
    total = sum(unit.last - unit.first for unit in units)
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        rows += pa.table(batch).to_pylist()
        print(f"evaluate {suite.path}: {len(rows)}/{total}", file=sys.stderr, flush=True)
    order = {unit.kind: number for number, unit in enumerate(units)}
    return sorted(rows, key=lambda row: (order[row["kind"]], row["index"]))


def _stored(config: EvaluateConfig, suite: EvaluationSuite, fingerprint: str) -> dict[str, Any] | None:
    """What an earlier evaluation under the same settings left, if there is one."""
    uri = registry.scores_uri(config.storage, fingerprint, suite.path)
    if not storage.exists(uri):
        return None
    content: dict[str, Any] = json.loads(storage.read_bytes(uri))
    return content if content["settings"] == suite.settings else None


def _folder(config: EvaluateConfig, suite: str, fingerprint: str) -> str:
    """Where a suite's rows, sheets and scores lie; `suite` is its path."""
    return storage.join(config.storage, "evaluations", fingerprint, suite)


def _report(
    config: EvaluateConfig,
    meter: runtime.CpuMeter,
    fingerprint: str,
    stored: Mapping[str, dict[str, Any] | None],
    *,
    reused: bool,
) -> JobReport:
    contents = {name: content for name, content in stored.items() if content is not None}
    return JobReport(
        job="evaluate",
        seconds=meter.seconds,
        cpu_seconds=meter.cpu_seconds,
        samples=sum(int(content["scores"]["n"]) for content in contents.values()),
        outputs={
            "fingerprint": fingerprint,
            "scores": {name: content["scores"] for name, content in contents.items()},
            "sheets": [_folder(config, name, fingerprint) for name in contents],
            "run_id": next(content["run_id"] for content in contents.values()),
        },
        reused=reused,
    )


def _flatten(scores: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in scores.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", float(value)
