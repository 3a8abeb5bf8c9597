"""A training whose workers are killed: Ray Train starts them again, and the result is the undisturbed one's."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from test_loop import run_ranks, weights_of
from test_train import make_config
from tiny_training import make_embedded, make_tiny_model

from nexusgen.losses import AUTOREGRESSIVE_WEIGHTS
from pipelines import checkpoint
from pipelines.tracking import connect
from pipelines.train import train

NUM_STEPS = 200
CHECKPOINT_EVERY = 40


def kill_a_worker(place: Path, after_step: int) -> list[int]:
    """SIGKILL one training worker once the training has passed a step; gives the step that it had reached."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        time.sleep(0.05)
        progress = place / "progress.json"
        step = json.loads(progress.read_text())["step"] if progress.is_file() else 0
        if step <= after_step:
            continue
        workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in p.name()]
        os.kill(random.Random(after_step).choice(workers).pid, signal.SIGKILL)
        return [step]
    return []


def test_a_killed_worker_costs_steps_but_changes_no_bit(tmp_path: Path, ray_cluster: Any) -> None:
    """Two workers; every step's loss and the final weights equal those of a training that nobody disturbed."""
    model = make_tiny_model(tmp_path / "model")
    storage_uri = str(tmp_path / "storage")
    make_embedded(storage_uri, "tiny", model)
    common = {"num_steps": NUM_STEPS, "checkpoint_every": CHECKPOINT_EVERY, "num_workers": 2}
    (undisturbed,) = run_ranks([make_config(storage_uri, model, name="calm", **common)], 2, tmp_path)

    config = make_config(storage_uri, model, name="killed", **common)
    place = Path(checkpoint.stage_folder(storage_uri, "killed", "ar"))
    killed_at: list[int] = []
    killer = threading.Thread(target=lambda: killed_at.extend(kill_a_worker(place, CHECKPOINT_EVERY + 5)))
    killer.start()
    report = train(config)
    killer.join()
    assert killed_at, "the training ended before anybody was killed"
    assert report.outputs["step"] == NUM_STEPS

    history: dict[int, list[float]] = {}
    for metric in connect(storage_uri).get_metric_history(report.outputs["run_id"], "train/loss"):
        history.setdefault(metric.step, []).append(metric.value)
    expected = {
        record[0] + 1: sum(w * record[1][n] for n, w in AUTOREGRESSIVE_WEIGHTS.items()) for record in undisturbed
    }
    assert history.keys() == expected.keys()
    num_replayed = sum(len(values) > 1 for values in history.values())
    print(f"killed at step {killed_at[0]}, {num_replayed} steps replayed")
    assert num_replayed > 0
    assert all(value == expected[step] for step, values in history.items() for value in values)
    calm = weights_of(make_config(storage_uri, model, name="calm", **common), tmp_path)
    found = checkpoint.latest(str(place))
    assert found is not None
    checkpoint.export_weights(found, tmp_path / "killed.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "killed.safetensors"), calm, rtol=0, atol=0)
