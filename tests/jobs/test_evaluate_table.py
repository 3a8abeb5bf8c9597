"""What `nexusgen evaluate` prints: every score with its interval and n, and paired differences beside them."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from jobs import evaluate
from jobs.command import DEMO_CONFIGS
from pipelines.runtime import JobReport

INTERVAL = {"value": 0.75, "low": 0.5, "high": 0.875, "n": 24}


def report(**outputs: Any) -> JobReport:
    scores = {"n": 28, "generation": {"overall": 0.75}, "understanding": {"majority": 0.375}}
    found = {
        "model": "models:/nexusgen/2",
        "fingerprint": "ours",
        "scores": {"demo_world": scores},
        "intervals": {"demo_world": {"generation/overall": INTERVAL}},
        "sheets": ["storage/evaluations/ours/demo_world"],
        "run_id": "run",
    }
    return JobReport("evaluate", 12.34, 20.0, samples=28, outputs=found | outputs)


def test_each_score_has_its_interval_and_n() -> None:
    assert evaluate.describe(report()).splitlines() == [
        "evaluate: done in 12.3 s, 28 items",
        "  model models:/nexusgen/2 (ours)",
        "",
        "demo_world              score   95 % interval   n",
        "----------------------  -----  --------------  --",
        "generation/overall      0.750  0.500 to 0.875  24",
        "understanding/majority  0.375",
        "  storage/evaluations/ours/demo_world",
    ]


@pytest.mark.parametrize(("low", "mark"), [(0.01, "*"), (-0.01, "")])
def test_a_difference_beyond_chance_is_marked(low: float, mark: str) -> None:
    difference = {"value": 0.1, "low": low, "high": 0.2, "n": 24}
    differences = {"demo_world": {"generation/overall": difference}}
    against = {"model": "models:/nexusgen/1", "fingerprint": "theirs", "differences": differences}
    lines = evaluate.describe(report(against=against)).splitlines()
    assert lines[2] == "  against models:/nexusgen/1 (theirs), on the same items"
    (line,) = [line for line in lines if line.startswith("generation/overall")]
    assert line.endswith(f"24      +0.100  {low:+.3f} to +0.200 {mark}".rstrip())


def test_against_on_the_command_line_is_the_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(config: Any) -> JobReport:
        asked.append(config.against)
        return report()

    monkeypatch.setattr("pipelines.evaluate.evaluate", run)
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    for arguments in (["--against", "models:/nexusgen/1"], ["against=models:/nexusgen/1"], []):
        evaluate.run(parser.parse_args([str(DEMO_CONFIGS / "evaluate.yaml"), *arguments]))
    assert asked == ["models:/nexusgen/1", "models:/nexusgen/1", None]
