"""What a run logs is what Prometheus reads from Ray's agent, and the module's table says so."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from pipelines import exported, tracking


def scrape() -> str:
    """What the metrics agent of this machine's node says."""
    import ray

    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def samples(text: str, metric: str, /, **labels: str) -> list[float]:
    """Values of the series of a metric that bear these labels."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    lines = [line for line in text.splitlines() if line.startswith(f"{metric}{{")]
    return [float(line.rpartition(" ")[2]) for line in lines if all(one in line for one in wanted)]


def test_table_names_every_metric() -> None:
    told = set(re.findall(r"^\| .* \| (nexusgen_\w+) \|", exported.__doc__ or "", re.M))
    assert told == {one.name for one in exported.ALL}
    tracking.check_metric_names(exported.EXPORTED)
    units = ("_total", "_ratio", "_seconds", "_per_second", "_loss", "_norm")
    assert all(one.name.endswith(units) for one in exported.ALL)
    assert all(one.name.endswith("_total") == (one.kind == "counter") for one in exported.ALL)


def test_run_tells_prometheus(ray_cluster: Any, tmp_path: Path, no_server: None) -> None:
    with tracking.job_run(str(tmp_path), "watched", "embed", "a: 1", makes="vision") as run:
        run.log_metrics({"data/samples": 1000, "data/embedded": 998, "data/quarantine/image_truncated": 2}, 1000)
        run.log_metrics({"data/samples": 1500, "data/embedded": 1498, "data/quarantine/image_truncated": 2}, 1500)
    with tracking.job_run(str(tmp_path), "watched", "train", "a: 1", stage="ar") as run:
        for step in (10, 20):
            run.log_metrics({"train/loss": 2.0 / step, "train/ce": 1.0, "train/data_wait_fraction": 0.25}, step)
        run.log_metrics({"train/checkpoint_s": 0.5}, 20)
        run.log_metrics({"eval/validation/loss": 0.75, "train/lr": 1e-3}, 20)
    deadline = time.monotonic() + 60
    while not samples(text := scrape(), "ray_nexusgen_validation_loss", name="watched"):
        assert time.monotonic() < deadline, "Ray's agent doesn't show what was logged"
        time.sleep(1)
    data = {"name": "watched", "stage": "vision"}
    assert samples(text, "ray_nexusgen_data_samples_total", **data) == [1500]
    assert samples(text, "ray_nexusgen_data_embedded_samples_total", **data) == [1498]
    assert samples(text, "ray_nexusgen_data_quarantined_samples_total", code="image_truncated", **data) == [2]
    train = {"name": "watched", "stage": "ar"}
    assert samples(text, "ray_nexusgen_train_loss", part="loss", **train) == [pytest.approx(0.1)]
    assert samples(text, "ray_nexusgen_train_loss", part="ce", **train) == [1]
    assert samples(text, "ray_nexusgen_train_steps_total", **train) == [20]
    assert samples(text, "ray_nexusgen_train_data_wait_ratio", **train) == [0.25]
    assert samples(text, "ray_nexusgen_train_checkpoint_seconds_count", **train) == [1]
    assert samples(text, "ray_nexusgen_train_checkpoint_seconds_bucket", le="0.3", **train) == [0]
    assert samples(text, "ray_nexusgen_train_checkpoint_seconds_bucket", le="1.0", **train) == [1]
    assert samples(text, "ray_nexusgen_validation_loss", **train) == [0.75]
    assert "nexusgen_train_lr" not in text
