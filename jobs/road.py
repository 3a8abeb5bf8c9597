"""`nexusgen road CONFIG [key=value ...]`: tar shards to a promoted model, and tables of what it cost and can do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.command import (
    EXIT_DONE,
    EXIT_FAILED,
    Outcome,
    add_config_arguments,
    add_json_argument,
    format_table,
    main_of,
)

if TYPE_CHECKING:
    from jobs.chain import RoadResult
    from pipelines.runtime import JobReport

NAME = "road"
HELP = "Run every job from tar shards to a promoted model."

SCORES = ("overall", "single", "two", "counting", "colours", "position", "attributes", "explicit_strict")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] [--json]; a job's own settings are JOB.key=value, as in train_ar.num_steps=100."""
    add_config_arguments(parser)
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Read the configuration and walk the road."""
    return walk(arguments.config, arguments.overrides)


def walk(config: Path, overrides: Sequence[str]) -> Outcome:
    """Walk the road of a configuration file. Exit code 1 if the model didn't pass the gate."""
    from jobs.chain import load_road, run_road
    from pipelines.runtime import is_submitted
    from pipelines.tracking import mlflow_uri, redact

    result = run_road(load_road(config, overrides))
    uri = redact(mlflow_uri(result.storage))
    told = describe(result, uri, is_submitted=is_submitted())
    return Outcome(told, to_json(result, uri), EXIT_FAILED if result.refusal else EXIT_DONE)


def to_json(result: RoadResult, mlflow_uri: str) -> dict[str, Any]:
    """The object that `--json` prints; its keys are a contract with scripts."""
    return {
        "seconds": result.seconds,
        "cpu_seconds": result.cpu_seconds,
        "jobs": [report.to_json() for report in result.reports],
        "scores": {"base": _scores(result.base_scores), **_scores(result.scores)},
        "model": result.model,
        "mlflow": mlflow_uri,
        "fingerprint": result.fingerprint,
        "version": result.version,
        "promoted": not result.refusal,
        "samples": result.samples,
    }


def describe(result: RoadResult, mlflow_uri: str, is_submitted: bool) -> str:
    """The tables, and where to look: from here, or, of a submitted job, from where it was submitted.

    CPU seconds are this machine's, so a submitted job, which works on others, doesn't tell them; MLflow does.
    """
    jobs = [["job", "seconds", "CPU s", "samples/s", "loss first -> last"], *map(_job_row, result.reports)]
    jobs.append(["total", f"{result.seconds:.1f}", f"{result.cpu_seconds:.1f}", "", ""])
    if is_submitted:
        for row in jobs:
            del row[2]
    lines = ["", format_table(jobs[0], jobs[1:]), ""]
    rows = [_score_row("base", result.base_scores), _score_row(f"version {result.version}", result.scores)]
    header = ["held-out prompts", *SCORES[:-1], "explicit", "editing", "understanding", "(majority)"]
    lines += [format_table(header, rows), ""]
    if is_submitted:
        command = Path("nexusgen")
        serve = f"submit serve jobs/configs/demo/serve.yaml storage={result.storage} host=0.0.0.0 --address ADDRESS"
        mlflow = mlflow_uri
    else:
        command = Path(sys.executable).with_name("nexusgen")
        serve = f"serve {Path(__file__).parent / 'configs/demo/serve.yaml'} storage={result.storage}"
        mlflow = f"{command.with_name('mlflow')} ui --backend-store-uri {mlflow_uri}"
    lines += [
        f"pictures   {result.samples}",
        f"model      {result.model}",
        f"draw       {command} generate 'a red circle' -o circle.png --storage {result.storage}",
        f"serve      {command} {serve}",
        f"MLflow     {mlflow}",
    ]
    if result.refusal:
        lines += ["", f"NOT PROMOTED: {result.refusal}"]
    return "\n".join(lines)


def _job_row(report: JobReport) -> list[str]:
    has_loss = report.loss_first is not None and report.loss_last is not None
    loss = f"{report.loss_first:.3f} -> {report.loss_last:.3f}" if has_loss else ""
    if report.reused:
        return [report.job, "re-used", "", "", loss]
    speed = f"{report.samples_per_s:.0f}" if report.samples_per_s else ""
    return [report.job, f"{report.seconds:.1f}", f"{report.cpu_seconds:.1f}", speed, loss]


def _score_row(label: str, scores: Mapping[str, Any]) -> list[str]:
    generation, understanding = scores.get("generation", {}), scores.get("understanding", {})
    values = [generation.get(name) for name in SCORES]
    values += [scores.get("editing", {}).get("strict")]
    values += [understanding.get("overall"), understanding.get("majority")]
    return [label, *("" if value is None else f"{value:.3f}" for value in values)]


def _scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {name: dict(value) for name, value in scores.items() if isinstance(value, Mapping)}


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
