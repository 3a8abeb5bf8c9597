"""`nexusgen plan --calibrate` against what a road then took: wall and CPU seconds of each job.

Walks a road at a tenth of its size or less, predicts every job at full size from that, then walks the road and
compares. `--quick` does so at a small size, where what is measured are mostly starts of processes; without it the road
is the demo's, a quarter of an hour on two idle cores. With `--tars` the road starts from tars of your own. Wall seconds
tell little on a machine that others use: wanted are 30 % in CPU seconds, and with `--wall` of the wall clock, too.
Jobs that take less than MIN_SECONDS are told only.

    python benchmarks/plan.py [--quick] [--json] [--wall] [--tars INPUT --samples N] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "pipelines")]

from benchmarks.report import Report  # noqa: E402 (the project's own folders come first)
from jobs.chain import load_road, run_road  # noqa: E402
from jobs.command import DEMO_CONFIGS  # noqa: E402
from jobs.planning import request_of, walk_small  # noqa: E402
from pipelines.plan import make_plan  # noqa: E402
from pipelines.plan_rates import parse_devices  # noqa: E402

ALLOWED = 0.30
MIN_SECONDS = 10.0
# A road of some minutes: every job has its real work.
QUICK = (
    "pack.counts={generation: 1200, editing: 1200, understanding: 600}",
    "pack.samples_per_shard=100",
    "embed_vision.slice_samples=50",
    "embed_latents.slice_samples=50",
    "embed_predicted.slice_samples=50",
    "train_ar.num_steps=300",
    "train_generation_decoder.num_steps=300",
    "train_editing_decoder.num_steps=200",
    "evaluate.per_category=10",
    "evaluate.num_explicit=20",
    "evaluate.num_questions=60",
    "evaluate.num_edits=20",
    "evaluate.batch_size=10",
    "promote.thresholds={}",
)
NUM_QUICK = 3000


def main() -> int:
    """Predict, walk, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small road")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--wall", action="store_true", help="ask 30 %% of wall seconds, too: on an idle machine")
    parser.add_argument("--tars", help="own tars to start from, in place of the demo world")
    parser.add_argument("--samples", type=int, help="in those tars")
    parser.add_argument("--measured", type=Path, help="jobs.json of a road that was walked: compare with that")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the road")
    arguments = parser.parse_args()
    if (arguments.tars is None) != (arguments.samples is None):
        parser.error("--tars and --samples go together: the latter says how many samples the former hold")
    report = Report()
    with tempfile.TemporaryDirectory(prefix="nexusgen-plan-") as folder:
        overrides = [f"storage={folder}/storage", *(QUICK if arguments.quick else ()), *arguments.overrides]
        if arguments.tars is not None:
            overrides.append(f"input={json.dumps(arguments.tars)}")
        road = load_road(DEMO_CONFIGS / "road.yaml", overrides)
        samples = arguments.samples or sum(road.pack.counts.values())
        request = request_of(road, samples, parse_devices("1xCPU"), None)
        calibrations = walk_small(road, samples, lambda text: print(text, file=sys.stderr, flush=True))
        planned = {row.job: row for row in make_plan(replace(request, calibrations=calibrations)).jobs}
        if arguments.measured is not None:
            measured = json.loads(arguments.measured.read_text(encoding="utf-8"))
        else:
            measured = [one.to_json() for one in run_road(road).reports]
        report.tell("samples of the small road, share", sum(_small(calibrations)) / samples)
        compare(report, planned, measured, wall=arguments.wall)
    return report.finish(arguments.json)


def compare(report: Report, planned: dict[str, Any], measured: list[dict[str, Any]], *, wall: bool) -> None:
    """Note the ratio of predicted and measured seconds of each job and of all."""
    both = [(planned[one["job"]], one) for one in measured if one["job"] in planned and not one["reused"]]
    for name, is_wanted in (("seconds", wall), ("cpu_seconds", True)):
        sums = [0.0, 0.0]
        for row, one in both:
            ours, theirs = getattr(row, name), one[name]
            sums = [sums[0] + ours, sums[1] + theirs]
            told = f"{row.job}: predicted over measured {name} ({ours:.1f} / {theirs:.1f})"
            _note(report, told, ours / max(theirs, 1e-9), is_wanted and theirs >= MIN_SECONDS)
        told = f"all jobs: predicted over measured {name} ({sums[0]:.1f} / {sums[1]:.1f})"
        _note(report, told, sums[0] / sums[1], is_wanted)


def _note(report: Report, told: str, ratio: float, is_wanted: bool) -> None:
    if not is_wanted:
        report.tell(told, ratio)
    elif ratio >= 1:
        report.at_most(told, ratio, 1 + ALLOWED)
    else:
        report.at_least(told, ratio, 1 - ALLOWED)


def _small(calibrations: Any) -> list[float]:
    found = calibrations.get("embed vision")
    return [found.rates["samples"].units] if found is not None else [0.0]


if __name__ == "__main__":
    sys.exit(main())
