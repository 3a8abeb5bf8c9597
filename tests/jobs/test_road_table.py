"""What `nexusgen road` prints at its end: commands to type here, or, of a submitted job, where it was submitted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from jobs import road
from jobs.chain import RoadResult
from jobs.command import DEMO_CONFIGS
from pipelines import runtime
from pipelines.runtime import JobReport

RESULT = RoadResult(
    storage="s3://bucket/demo",
    seconds=12.5,
    cpu_seconds=3.25,
    reports=(
        JobReport("embed vision", 1.0, 0.0, reused=True),
        JobReport("train ar", 11.5, 3.25, samples=23, loss_first=2.0, loss_last=0.5),
    ),
    base_scores={},
    scores={"generation": {"overall": 0.75}},
    model="s3://bucket/demo/models/f",
    fingerprint="f",
    version=2,
    samples="s3://bucket/demo/samples.png",
    refusal="",
)


def test_at_home_all_commands_can_be_typed_as_they_stand() -> None:
    lines = road.describe(RESULT, "sqlite:///x.db", is_submitted=False).splitlines()
    assert lines[1:6] == [
        "job           seconds  CPU s  samples/s  loss first -> last",
        "------------  -------  -----  ---------  ------------------",
        "embed vision  re-used",
        "train ar         11.5    3.2          2      2.000 -> 0.500",
        "total            12.5    3.2",
    ]
    nexusgen = Path(sys.executable).with_name("nexusgen")
    assert f"serve      {nexusgen} serve {DEMO_CONFIGS / 'serve.yaml'} storage=s3://bucket/demo" in lines


def test_a_submitted_road_tells_no_place_of_the_machine_that_it_ran_on() -> None:
    text = road.describe(RESULT, "http://mlflow:5000", is_submitted=True)
    lines = text.splitlines()
    assert lines[1] == "job           seconds  samples/s  loss first -> last"
    assert lines[5] == "total            12.5"
    assert str(Path(sys.executable).parent) not in text
    assert str(DEMO_CONFIGS) not in text
    serve = "submit serve jobs/configs/demo/serve.yaml storage=s3://bucket/demo host=0.0.0.0 --address ADDRESS"
    assert f"serve      nexusgen {serve}" in lines
    assert "MLflow     http://mlflow:5000" in lines


def test_the_driver_of_a_submitted_job_knows_that_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert not runtime.is_submitted()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # as Ray's job manager does
    assert runtime.is_submitted()
