"""Training under fire: workers of all three stages are killed at random steps; not a bit of the result may differ.

A tiny model, two workers (gloo), checkpoints every 20 steps. Each stage is trained once undisturbed, on two plain
processes, and once on Ray Train, where a worker drawn from a seed is killed (SIGKILL) at steps drawn from the seed.
Compared are the losses of every step, those that were replayed included, as MLflow has them, and the final weights.
Then the tracking server is killed for a minute in the middle of a training; its history is compared with the local log.

    python benchmarks/chaos_train.py [--quick] [--json] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "pipelines")]

import psutil  # noqa: E402 (the project's own folders come first)
import torch  # noqa: E402
from test_loop import run_ranks, weights_of  # noqa: E402
from test_outage import train_through_outage  # noqa: E402
from test_train import make_config  # noqa: E402
from tiny_training import make_embedded, make_tiny_model  # noqa: E402

from benchmarks.report import Report  # noqa: E402
from pipelines import checkpoint  # noqa: E402
from pipelines.runtime import ray_cluster  # noqa: E402
from pipelines.stages import STAGES, StageName  # noqa: E402
from pipelines.tracking import connect  # noqa: E402
from pipelines.train import train  # noqa: E402

NUM_WORKERS = 2
CHECKPOINT_EVERY = 20
STEPS_PER_KILL = 60
OUTAGE_S, QUICK_OUTAGE_S = 60.0, 5.0


class Killer(threading.Thread):
    """Kills a training worker whenever the training passes one of the chosen steps."""

    def __init__(self, place: Path, steps: list[int], chance: random.Random) -> None:
        super().__init__(daemon=True)
        self.killed_at: list[int] = []
        self.is_over = threading.Event()
        self._place, self._steps, self._chance = place, steps, chance

    def run(self) -> None:
        for wanted in self._steps:
            while not self.is_over.wait(0.02):
                if self._step() < wanted:
                    continue
                workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in p.name()]
                if len(workers) == NUM_WORKERS:
                    os.kill(self._chance.choice(workers).pid, signal.SIGKILL)
                    self.killed_at.append(self._step())
                    time.sleep(1.0)  # the one that was killed must have gone
                    break

    def _step(self) -> int:
        try:
            return int(json.loads((self._place / "progress.json").read_text())["step"])
        except (OSError, ValueError):
            return 0


def run_stage(report: Report, stage: StageName, folder: Path, num_kills: int, chance: random.Random) -> int:
    """Train a stage with and without kills, compare; gives the number of kills."""
    model, storage_uri = folder / "model", str(folder / "storage")
    num_steps = STEPS_PER_KILL * (num_kills + 1)
    common = {
        "stage": stage,
        "num_steps": num_steps,
        "checkpoint_every": CHECKPOINT_EVERY,
        "num_workers": NUM_WORKERS,
        "max_restarts": num_kills + 2,
    }
    calm = make_config(storage_uri, model, name=f"calm-{stage}", **common)
    (undisturbed,) = run_ranks([calm], NUM_WORKERS, folder)
    config = make_config(storage_uri, model, name=f"killed-{stage}", **common)
    place = Path(checkpoint.stage_folder(storage_uri, config.name, stage))
    steps = [STEPS_PER_KILL * number + chance.randrange(5, STEPS_PER_KILL - 5) for number in range(num_kills)]
    killer = Killer(place, steps, chance)
    killer.start()
    started = time.monotonic()
    outcome = train(config)
    seconds = time.monotonic() - started
    killer.is_over.set()
    killer.join()
    history: dict[int, list[float]] = {}
    for metric in connect(storage_uri).get_metric_history(outcome.outputs["run_id"], "train/loss"):
        history.setdefault(metric.step, []).append(metric.value)
    weights = STAGES[stage].weights
    expected = {
        step + 1: sum(weight * losses[name] for name, weight in weights.items()) for step, losses, _, _ in undisturbed
    }
    differing = sum(any(value != expected[step] for value in values) for step, values in history.items())
    ours, theirs = weights_of(config, folder), weights_of(calm, folder)
    report.at_least(f"{stage}: workers killed", len(killer.killed_at), num_kills)
    report.at_least(f"{stage}: steps replayed", sum(len(values) - 1 for values in history.values()), 1)
    report.at_most(f"{stage}: steps whose loss is missing", len(expected.keys() - history.keys()), 0)
    report.at_most(f"{stage}: steps whose loss differs in a bit", differing, 0)
    report.at_most(
        f"{stage}: weights that differ in a bit", sum(not torch.equal(ours[name], theirs[name]) for name in theirs), 0
    )
    report.tell(f"{stage}: seconds, {num_steps} steps", seconds)
    return len(killer.killed_at)


def run_outage(report: Report, folder: Path, outage_s: float) -> None:
    """Train while the tracking server is away, and compare what it has afterwards with the worker's own log."""
    outage = train_through_outage(folder, outage_s)
    what = f"MLflow killed for {outage_s:g} s"
    report.tell(f"{what}: steps of the training", outage.num_steps)
    report.at_least(f"{what}: steps while it was away", outage.back_at - outage.killed_at, 1)
    report.at_least(f"{what}: steps after it was back", outage.num_steps - outage.back_at, 1)
    report.at_most(f"{what}: runs beside the one that finished", len(outage.statuses) - 1, 0)
    report.at_least(f"{what}: runs that finished", outage.statuses.count("FINISHED"), 1)
    report.at_most(f"{what}: steps whose loss is missing", len(outage.missing_steps), 0)
    report.tell(f"{what}: metrics compared", len(outage.logged))
    report.at_most(f"{what}: metrics that differ from the local log in a step", len(outage.differing), 0)


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one kill, stage ar alone; the server is away for 5 s")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    arguments = parser.parse_args()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    report, chance = Report(), random.Random(arguments.seed)
    kills: dict[StageName, int] = (
        {"ar": 1} if arguments.quick else {"ar": 4, "generation_decoder": 3, "editing_decoder": 3}
    )
    with tempfile.TemporaryDirectory(prefix="nexusgen-chaos-") as name, ray_cluster(NUM_WORKERS, "the benchmark"):
        folder = Path(name)
        make_tiny_model(folder / "model")
        make_embedded(str(folder / "storage"), "tiny", folder / "model")
        killed = sum(run_stage(report, stage, folder, count, chance) for stage, count in kills.items())
    report.at_least("workers killed in all", killed, sum(kills.values()))
    with tempfile.TemporaryDirectory(prefix="nexusgen-outage-") as name:
        run_outage(report, Path(name), QUICK_OUTAGE_S if arguments.quick else OUTAGE_S)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
