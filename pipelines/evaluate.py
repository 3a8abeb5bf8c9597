"""`nexusgen evaluate`: scores of a model folder or registered version, by batch inference on Ray Data.

| suite | items | what is measured |
|---|---|---|
| demo_world | prompts in GenEval's six categories, explicit captions, questions about pictures | pictures and answers, read by the exact scorer |
| retrieval | samples of a user's own embedded data | is the predicted embedding's nearest target the right one; its error |

A suite's items are cut into units of one batch each; an actor pool that holds the model turns units into rows. Rows and
scores land in STORAGE/evaluations/FINGERPRINT/SUITE[-DATA]/ together with the settings that they were made under; the
same fingerprint under the same settings is not evaluated again.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import Field, model_validator

from nexusgen.config import Config, dump_config
from pipelines import registry, runtime, sheets, storage, tracking
from pipelines.runtime import JobReport

Suite = Literal["demo_world", "retrieval"]
RESULTS_NAME = "results.parquet"
SCORES_NAME = "scores.json"
READER_CPUS = 1.0  # Ray Data's own tasks, beside the actors
SHEET_COLUMNS = 8


class EvaluateConfig(Config):
    """What to evaluate, on what, and how finely."""

    storage: str = Field(description="folder or s3:// URI that holds evaluations/, embedded/ and models/")
    name: str = Field(default="nexusgen", description="name of the project: the MLflow experiment")
    model: str = Field(description="demo-base, a model folder, models:/nexusgen@ALIAS or models:/nexusgen/VERSION")
    suites: tuple[Suite, ...] = ("demo_world",)
    seed: Annotated[int, Field(ge=0)] = 0
    steps: Annotated[int, Field(ge=1)] | None = Field(default=None, description="denoising steps; None: the model's own")
    per_category: Annotated[int, Field(ge=1)] = 24
    num_explicit: Annotated[int, Field(ge=0)] = 96
    num_questions: Annotated[int, Field(ge=0)] = 144
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


@dataclass(frozen=True)
class Unit:
    """One batch of work: items `first` up to `last` of one kind."""

    kind: str
    first: int
    last: int


class Worker(Protocol):
    """Holds the model and turns a unit into rows; constructed once per actor from the configuration."""

    def __init__(self, config: EvaluateConfig) -> None: ...

    def __call__(self, unit: Unit) -> list[dict[str, Any]]:
        """Rows of the unit's items; each has the columns of the suite's schema."""
        ...


@dataclass(frozen=True)
class SuiteResult:
    """What a suite found: scores (nested, numbers only), and contact sheets by name."""

    scores: dict[str, Any]
    sheets: dict[str, Image.Image]


def evaluate(config: EvaluateConfig, parent_run_id: str | None = None) -> JobReport:
    """Evaluate a model, suite by suite; scores go to the storage, to MLflow and to the version of these weights.

    A suite that was run on the same weights under the same settings is not run again.
    Raises: InputError or ModelError if there is no such model or data; FingerprintError if the data is of another
    encoder; ResourceError if too few CPUs are free.
    """
    with runtime.CpuMeter() as meter:
        folder = registry.resolve_model(config.model, config.storage)
        fingerprint = read_manifest(folder).fingerprint
        plans = [_plan(suite, config, fingerprint) for suite in config.suites]
        stored = {plan.suite: _stored(plan) for plan in plans}
        todo = [plan for plan in plans if stored[plan.suite] is None]
        run_ids = [content["run_id"] for content in stored.values() if content is not None]
        if todo:
            num_cpus = config.num_actors * config.actor_cpus + READER_CPUS
            tags = {tracking.TAG_FINGERPRINT: fingerprint}
            with (
                tracking.job_run(
                    config.storage, config.name, "evaluate", dump_config(config), parent=parent_run_id, tags=tags
                ) as run,
                runtime.ray_cluster(num_cpus, "evaluate"),
            ):
                for plan in todo:
                    stored[plan.suite] = _run_suite(plan, config, fingerprint, run)
                run_ids.append(run.run_id)
                report = _report(meter, fingerprint, stored, run.run_id, reused=False)
                run.log_report(report)
        else:
            report = _report(meter, fingerprint, stored, run_ids[0], reused=True)
        for suite, content in stored.items():
            registry.attach_scores(config.storage, fingerprint, suite, content["scores"], content["run_id"])
    return report
