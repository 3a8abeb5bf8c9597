"""A tracking server that dies in mid-training and comes back: MLflow ends up with every step's metrics, in one run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from servers import free_port, mlflow_server
from test_train import make_config, recorded
from tiny_training import make_embedded, make_tiny_model

from nexusgen.config import dump_config
from pipelines.loop import Ranks, run_training
from pipelines.train import TrainConfig

OUTAGE_S = 15.0  # benchmarks/chaos_train.py makes it 60
SERVER_START_S = 25.0  # what a server may take to come back, on a busy machine
BATCH_SAMPLES = 180  # of the tiny model: some two steps a second
STEP_S = 0.5  # of an idle machine
MIN_STEPS_OF_OUTAGE = 10


@dataclass(frozen=True)
class Outage:
    """What became of a training whose tracking server was away: MLflow's history beside the local log of metrics."""

    num_steps: int
    killed_at: int  # the training's step when the server died
    back_at: int  # when it answered again
    statuses: tuple[str, ...]  # of the runs in MLflow
    logged: Mapping[str, list[tuple[int, float, int]]]  # by metric: step, value and time (ms), as the worker logged it
    arrived: Mapping[str, list[tuple[int, float, int]]]  # the same, as MLflow has it
    has_report: bool
    has_spool: bool  # something is left that wasn't delivered

    @property
    def differing(self) -> list[str]:
        """Metrics of which MLflow has more, less or other points than the log."""
        return sorted(
            name for name in self.logged.keys() | self.arrived.keys() if self.logged.get(name) != self.arrived.get(name)
        )

    @property
    def missing_steps(self) -> set[int]:
        """Steps without a loss in MLflow."""
        return set(range(1, self.num_steps + 1)) - {step for step, _, _ in self.arrived.get("train/loss", ())}


def train_through_outage(folder: Path, outage_s: float) -> Outage:
    """Train; kill the tracking server with SIGKILL in mid-training, for so many seconds; compare."""
    model = make_tiny_model(folder / "model")
    storage_uri = str(folder / "storage")
    make_embedded(storage_uri, "tiny", model, num_samples=240, rows_per_slice=64)
    config = make_config(storage_uri, model, name="outage", batch_samples=BATCH_SAMPLES, checkpoint_every=20)
    config = config.model_copy(update={"num_steps": num_steps_that_outlast(config, outage_s)})
    port = free_port()
    with contextlib.ExitStack() as stack:
        with mlflow_server(folder, port):
            trainer = stack.enter_context(contextlib.closing(Trainer(config, folder, port)))
            trainer.wait_for_step(config.num_steps // 8)
        killed_at = trainer.step()
        time.sleep(outage_s)
        stack.enter_context(mlflow_server(folder, port))
        back_at = trainer.step()
        trainer.finish()
        client = MlflowClient(tracking_uri=f"http://127.0.0.1:{port}")
        experiment = client.get_experiment_by_name("outage")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        logged = trainer.history()
        arrived = {}
        for name in {name for name in runs[0].data.metrics if name.startswith("train/")} | logged.keys():
            history = client.get_metric_history(runs[0].info.run_id, name)
            arrived[name] = sorted((point.step, point.value, point.timestamp) for point in history)
        has_report = "report.json" in {item.path for item in client.list_artifacts(runs[0].info.run_id)}
    return Outage(
        num_steps=config.num_steps,
        killed_at=killed_at,
        back_at=back_at,
        statuses=tuple(run.info.status for run in runs),
        logged=logged,
        arrived=arrived,
        has_report=has_report,
        has_spool=any(True for spools in Path(storage_uri).glob("mlflow_spool_*") for _ in spools.iterdir()),
    )


def num_steps_that_outlast(config: TrainConfig, outage_s: float) -> int:
    """So many that there is a training before the outage, and after it: by the speed of this machine."""
    short = config.model_copy(update={"name": "calibration", "num_steps": 5})
    with pytest.MonkeyPatch.context() as patch, recorded(patch) as records:
        run_training(short, "r", Ranks(), None)
    seconds = min(STEP_S, *(record.seconds for record in records))  # it may be slow at the moment, and fast later
    return int((2 * outage_s + SERVER_START_S) / seconds)


class Trainer:
    """`nexusgen train` in a process and on a Ray of its own, and its local log of metrics.

    The log is the worker's spool file, into which every metric goes before it is sent. It is removed when all has
    arrived, so it is kept here under a second name.
    """

    def __init__(self, config: TrainConfig, folder: Path, port: int) -> None:
        self._spools, self._log = Path(config.storage), folder / "log.jsonl"
        self._output = folder / "train.log"
        (folder / "train.yaml").write_text(dump_config(config))
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", "train", str(folder / "train.yaml")],
                env=environment | {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"},
                stdout=output,
                stderr=output,
            )

    def wait_for_step(self, wanted: int) -> None:
        """Return when the log has a step."""
        deadline = time.monotonic() + 400
        while self.step() < wanted:
            assert self.process.poll() is None, self._output.read_text()
            assert time.monotonic() < deadline, f"no step {wanted} in {self._log}"
            time.sleep(0.1)

    def step(self) -> int:
        """The last step in the log; 0 before it has one."""
        history = self.history()
        return history["train/loss"][-1][0] if history else 0

    def history(self) -> dict[str, list[tuple[int, float, int]]]:
        """Step, value and time (ms) of every metric that the worker logged, in the order of logging."""
        if not self._log.exists():
            for path in self._spools.glob("mlflow_spool_*/*/records.jsonl"):
                if '"train/loss"' in path.read_text():  # the driver has a spool, too
                    self._log.hardlink_to(path)
        history: dict[str, list[tuple[int, float, int]]] = defaultdict(list)
        whole_lines = self._log.read_text().rpartition("\n")[0].splitlines() if self._log.exists() else []
        for line in whole_lines:
            for name, value, logged_at, step in json.loads(line).get("metrics", ()):
                history[name].append((step, value, logged_at))
        return history

    def finish(self) -> None:
        """Wait until the job has ended well."""
        assert self.process.wait(600) == 0, self._output.read_text()

    def close(self) -> None:
        """End the job if it still runs, as Ctrl-C does, so that Ray ends with it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)


@pytest.mark.timeout(1200)
def test_every_step_of_an_outage_is_in_mlflow_afterwards(tmp_path: Path) -> None:
    outage = train_through_outage(tmp_path, OUTAGE_S)
    print(f"{outage.num_steps} steps; the server was down from step {outage.killed_at} to step {outage.back_at}")
    assert outage.back_at - outage.killed_at >= MIN_STEPS_OF_OUTAGE
    assert outage.back_at < outage.num_steps, "the training ended while the server was down"
    assert outage.statuses == ("FINISHED",)
    train_metrics = {name for name in outage.logged if name.startswith("train/")}
    assert {"train/loss", "train/ce", "train/mse", "train/cosine", "train/grad_norm", "train/lr"} <= train_metrics
    assert outage.differing == []  # those of validation, too
    for name in train_metrics - {"train/checkpoint_s"}:  # which only some steps have
        assert [step for step, _, _ in outage.logged[name]] == list(range(1, outage.num_steps + 1)), name
    assert outage.missing_steps == set()
    assert outage.has_report
    assert not outage.has_spool
