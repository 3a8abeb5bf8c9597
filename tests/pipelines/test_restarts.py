"""Trainings whose workers end early: Ray Train starts them again, and the result is the undisturbed one's."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file
from test_loop import run_ranks, weights_of
from test_train import make_config

from jobs.command import EXIT_INTERRUPTED
from nexusgen.config import dump_config
from nexusgen.errors import NexusgenError, ResourceError
from nexusgen.losses import AUTOREGRESSIVE_WEIGHTS
from pipelines import checkpoint
from pipelines.runtime import RayCluster
from pipelines.tracking import connect
from pipelines.train import TrainConfig, train

pytestmark = pytest.mark.timeout(600)

PATIENCE_S = 500.0
NUM_STEPS = 200
CHECKPOINT_EVERY = 40
WORKERS = {"num_workers": 2}


def place_of(config: TrainConfig) -> Path:
    return Path(checkpoint.stage_folder(config.storage, config.name, config.stage))


def progress_of(config: TrainConfig) -> dict[str, Any]:
    """What progress.json says; step 0 before there is one."""
    try:
        return dict(json.loads((place_of(config) / "progress.json").read_text()))
    except FileNotFoundError:
        return {"step": 0, "workers": 0}


def wait_for_step(config: TrainConfig, step: int) -> None:
    """Return when a training has passed a step."""
    wait_for(lambda: progress_of(config)["step"] > step, f"step {step} in {place_of(config)}")


def wait_for(is_so: Callable[[], bool], what: str) -> None:
    """Return when something is so."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S:g} s"
        time.sleep(0.05)


@contextlib.contextmanager
def watched(config: TrainConfig) -> Iterator[list[dict[str, Any]]]:
    """All that progress.json says while the body runs."""
    seen: list[dict[str, Any]] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.02):
            progress = progress_of(config)
            if progress not in seen[-1:]:
                seen.append(progress)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        is_over.set()
        watcher.join()


def worker_processes() -> list[psutil.Process]:
    """The training workers of Rays that this process has started."""
    return [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in p.name()]


def signal_a_worker(config: TrainConfig, number: signal.Signals, after_step: int) -> None:
    """Send a signal to one training worker once the training has passed a step."""
    wait_for_step(config, after_step)
    os.kill(random.Random(after_step).choice(worker_processes()).pid, number)


def losses_in_mlflow(config: TrainConfig, run_id: str) -> dict[int, list[float]]:
    """The losses of each step; of a step that was computed again, several."""
    history: dict[int, list[float]] = {}
    for metric in connect(config.storage).get_metric_history(run_id, "train/loss"):
        history.setdefault(metric.step, []).append(metric.value)
    return history


def losses_of(records: list[Any]) -> dict[int, float]:
    """The losses of each step of a training on plain processes."""
    return {record[0] + 1: sum(w * record[1][n] for n, w in AUTOREGRESSIVE_WEIGHTS.items()) for record in records}


def assert_same_weights(ours: TrainConfig, theirs: TrainConfig, folder: Path) -> None:
    """Bit for bit."""
    calm = weights_of(theirs, folder)
    found = checkpoint.latest(str(place_of(ours)))
    assert found is not None
    checkpoint.export_weights(found, folder / "disturbed.safetensors")
    torch.testing.assert_close(load_file(folder / "disturbed.safetensors"), calm, rtol=0, atol=0)


@pytest.fixture(scope="module")
def calm(
    tmp_path_factory: pytest.TempPathFactory, storage_uri: str, model: Path
) -> tuple[TrainConfig, dict[int, float]]:
    """A training on two plain processes that nobody disturbs, and its losses."""
    config = make_config(
        storage_uri, model, name="calm", num_steps=NUM_STEPS, checkpoint_every=CHECKPOINT_EVERY, **WORKERS
    )
    (records,) = run_ranks([config], 2, tmp_path_factory.mktemp("calm"))
    return config, losses_of(records)


def test_a_killed_worker_costs_steps_but_changes_no_bit(
    tmp_path: Path,
    calm: tuple[TrainConfig, Mapping[int, float]],
    ray_cluster: RayCluster,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """No restart is allowed, and yet it goes on from the checkpoint that was saved before."""
    undisturbed, expected = calm
    config = undisturbed.model_copy(update={"name": "killed", "max_restarts": 0})

    def kill_after_a_checkpoint() -> None:
        wait_for(lambda: checkpoint.latest(str(place_of(config))) is not None, "checkpoint")
        signal_a_worker(config, signal.SIGKILL, CHECKPOINT_EVERY + 5)

    killer = threading.Thread(target=kill_after_a_checkpoint)
    killer.start()
    report = train(config)
    killer.join()
    told = r"train ar: its workers ended early 1 time\(s\), but step \d+ is saved: they are started again"
    assert re.search(told, capfd.readouterr().err)
    assert report.outputs["step"] == NUM_STEPS
    history = losses_in_mlflow(config, report.outputs["run_id"])
    assert history.keys() == expected.keys()
    num_replayed = sum(len(values) > 1 for values in history.values())
    print(f"{num_replayed} steps computed again")
    assert num_replayed > 0
    assert all(value == expected[step] for step, values in history.items() for value in values)
    assert_same_weights(config, undisturbed, tmp_path)


def test_a_training_whose_workers_die_before_a_step_is_saved_ends(
    calm: tuple[TrainConfig, Mapping[int, float]], ray_cluster: RayCluster
) -> None:
    update = {"name": "hopeless", "max_restarts": 0, "checkpoint_every": NUM_STEPS}
    config = calm[0].model_copy(update=update)
    killer = threading.Thread(target=signal_a_worker, args=(config, signal.SIGKILL, 2))
    killer.start()
    told = r"ended early 1 time\(s\) \(max_restarts=0\) and saved no step meanwhile, the last is 0"
    with pytest.raises(ResourceError, match=told):
        train(config)
    killer.join()


def test_what_a_worker_finds_wrong_ends_a_training_though_steps_are_saved(
    calm: tuple[TrainConfig, Mapping[int, float]], ray_cluster: RayCluster
) -> None:
    update = {"name": "faulty", "max_restarts": 0, "checkpoint_every": 5}
    update |= {"max_gradient_ratio": 1.0001, "max_skipped_steps": 0}
    config = calm[0].model_copy(update=update)
    with pytest.raises(NexusgenError, match=r"steps were skipped.*max_gradient_ratio"):
        train(config)
    assert checkpoint.latest(str(place_of(config))) is not None


def test_a_worker_that_is_told_to_end_saves_first_and_no_step_is_computed_again(
    tmp_path: Path, calm: tuple[TrainConfig, Mapping[int, float]], ray_cluster: RayCluster
) -> None:
    """SIGTERM to the process of one of two workers, when no checkpoint is due."""
    undisturbed, expected = calm
    config = undisturbed.model_copy(update={"name": "terminated", "checkpoint_every": NUM_STEPS})
    teller = threading.Thread(target=signal_a_worker, args=(config, signal.SIGTERM, 20))
    teller.start()
    with watched(config) as seen:
        report = train(config)
    teller.join()
    assert any("as a worker was told to end" in progress.get("note", "") for progress in seen)
    history = losses_in_mlflow(config, report.outputs["run_id"])
    assert history == {step: [loss] for step, loss in expected.items()}
    assert_same_weights(config, undisturbed, tmp_path)


def test_a_driver_that_is_told_to_end_has_its_workers_save_first(
    tmp_path: Path, calm: tuple[TrainConfig, Mapping[int, float]], ray_cluster: RayCluster
) -> None:
    """SIGTERM to `nexusgen train`, as by `ray job stop`, when no checkpoint is due; then the command is run again."""
    undisturbed, expected = calm
    config = undisturbed.model_copy(update={"name": "stopped", "checkpoint_every": NUM_STEPS})
    (tmp_path / "train.yaml").write_text(dump_config(config))
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "train", str(tmp_path / "train.yaml")],
            env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
            stdout=log,
            stderr=log,
        )
    try:
        wait_for_step(config, 20)
        driver.terminate()
        assert driver.wait(PATIENCE_S) == EXIT_INTERRUPTED, (tmp_path / "log").read_text()
    finally:
        driver.kill()
    assert "saves after this step" in (tmp_path / "log").read_text()
    found = checkpoint.latest(str(place_of(config)))
    assert found is not None
    assert 20 < found.meta.step < NUM_STEPS
    assert connect(config.storage).get_run(found.meta.run_id).info.status == "KILLED"
    report = train(config)
    assert (report.outputs["resumed_from"], report.outputs["run_id"]) == (found.meta.step, found.meta.run_id)
    assert losses_in_mlflow(config, found.meta.run_id) == {step: [loss] for step, loss in expected.items()}
    assert_same_weights(config, undisturbed, tmp_path)
