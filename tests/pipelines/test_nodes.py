"""Trainings on a cluster of three nodes on this machine, whose nodes are drained, lost and added in mid-training."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster
from test_loop import run_ranks
from test_restarts import (
    assert_same_weights,
    losses_in_mlflow,
    losses_of,
    progress_of,
    wait_for,
    wait_for_step,
    watched,
)
from test_train import make_config

from pipelines import checkpoint
from pipelines.train import TrainConfig

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(1500)]

DRAIN_S = 30  # from the notice until the node is taken away
BATCH_SAMPLES = 60  # of the tiny model: some ten steps a second on an idle machine
NODE = {"object_store_memory": 80_000_000, "include_dashboard": False}
# The driver: looks for room for more workers more often than once a minute.
DRIVER = """
import sys
from pipelines import train
train.RESIZE_EVERY_S = 5.0
config = train.TrainConfig.model_validate_json(sys.argv[1])
print(train.train(config).outputs["run_id"])
"""


@contextlib.contextmanager
def cluster_of(num_nodes: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cluster, list[Any]]]:
    """A head without CPUs and nodes of one CPU each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    # Ray Train may believe for a while that a lost node is there; it waits less long for its workers then.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **NODE})
    try:
        yield cluster, [cluster.add_node(num_cpus=1, **NODE) for _ in range(num_nodes)]
    finally:
        cluster.shutdown()


class Driver:
    """A training of its own process on a cluster."""

    def __init__(self, config: TrainConfig, cluster: Cluster, folder: Path) -> None:
        self._log = folder / "driver.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, config.model_dump_json()],
                env=os.environ | {"RAY_ADDRESS": str(cluster.address)},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def finish(self) -> str:
        """The MLflow run, once the training has ended well."""
        out, _ = self.process.communicate(timeout=600)
        assert self.process.returncode == 0, self.log()
        return str(out.split()[-1])  # Ray may say before that a node is gone

    def log(self) -> str:
        """What it has told."""
        return self._log.read_text()

    def close(self) -> None:
        """Kill it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def workers_on(node: Any) -> list[psutil.Process]:
    """The training workers of one node."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [process for process in raylet.children(recursive=True) if "RayTrainWorker" in process.name()]


def trained_calmly(config: TrainConfig, folder: Path) -> tuple[TrainConfig, Mapping[int, float]]:
    """The same training on two plain processes, undisturbed, and its losses."""
    calm = config.model_copy(update={"name": f"{config.name}-calm", "num_workers": 2})
    (records,) = run_ranks([calm], 2, folder)
    return calm, losses_of(records)


def test_workers_of_a_drained_node_save_before_they_go_and_no_step_is_computed_again(
    tmp_path: Path, storage_uri: str, model: Path, no_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both workers are on one node, which is preempted; no checkpoint is due before the last step."""
    common = {"num_steps": 150, "checkpoint_every": 150, "batch_samples": BATCH_SAMPLES, "num_workers": 2}
    config = make_config(storage_uri, model, name="drained", max_restarts=0, **common)
    calm, expected = trained_calmly(config, tmp_path)
    with (
        cluster_of(2, monkeypatch) as (cluster, nodes),
        contextlib.closing(Driver(config, cluster, tmp_path)) as driver,
        watched(config) as seen,
    ):
        wait_for_step(config, 10)
        (drained,) = [node for node in nodes if workers_on(node)]
        command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", str(cluster.address)]
        command += ["--node-id", drained.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "spot", "--deadline-remaining-seconds", str(DRAIN_S)]
        subprocess.run(command, check=True, capture_output=True)
        time.sleep(DRAIN_S)
        cluster.remove_node(drained, allow_graceful=False)
        run_id = driver.finish()
    notes = [progress["note"] for progress in seen if "note" in progress]
    print(notes)
    assert "taken away" in notes[0]
    assert "replaced" in notes[-1]
    assert "ended early" not in driver.log()  # a notice is no failure
    assert losses_in_mlflow(config, run_id) == {step: [loss] for step, loss in expected.items()}
    assert_same_weights(config, calm, tmp_path)


def test_a_training_shrinks_when_a_node_is_lost_and_grows_when_one_comes(
    tmp_path: Path, storage_uri: str, model: Path, no_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two nodes one loses power: the other goes on alone; every step is that of two workers, within rounding.

    The training is as long as it takes: it is told to end, and the undisturbed one, whose learning rate doesn't depend
    on the number of steps, gets as many.
    """
    common = {"num_steps": 100_000, "final_lr_fraction": 1.0, "batch_samples": BATCH_SAMPLES, "checkpoint_every": 10}
    config = make_config(storage_uri, model, name="elastic", cpus_per_worker=1.0, max_restarts=1, **common)
    config = config.model_copy(update={"num_workers": (1, 2)})
    with (
        cluster_of(2, monkeypatch) as (cluster, nodes),
        contextlib.closing(Driver(config, cluster, tmp_path)) as driver,
        watched(config) as seen,
    ):
        wait_for(lambda: progress_of(config)["workers"] == 2 and progress_of(config)["step"] > 12, "two workers")
        lost_at = progress_of(config)["step"]
        cluster.remove_node(nodes[0], allow_graceful=False)
        wait_for(lambda: progress_of(config)["workers"] == 1, "training with one worker")
        cluster.add_node(num_cpus=1, **NODE)
        wait_for(lambda: progress_of(config)["workers"] == 2, "training with two workers")
        driver.process.terminate()
        assert driver.process.wait(600) != 0
    found = checkpoint.latest(checkpoint.stage_folder(storage_uri, "elastic", "ar"))
    assert found is not None
    assert found.meta.world_size == 2
    assert "told to end" in seen[-1]["note"]
    _, expected = trained_calmly(config.model_copy(update={"num_steps": found.meta.step}), tmp_path)
    history = losses_in_mlflow(config, found.meta.run_id)
    assert history.keys() == expected.keys()
    for step, values in history.items():
        assert values == pytest.approx([expected[step]] * len(values), rel=1e-4)
    again = [step for step, values in history.items() if len(values) > 1]
    alone = [progress for progress in seen if progress["workers"] == 1]
    grown_at = alone[-1]["step"]
    print(f"{len(history)} steps; a node lost at {lost_at}, one added by {grown_at}; computed again: {again}")
    assert "replaced" in alone[-1]["note"]
    assert max(again) < grown_at, "steps were computed again when it grew"
