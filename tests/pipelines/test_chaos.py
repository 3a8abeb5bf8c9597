from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import ray
from servers import free_port, s3_server
from test_shards import sample_members, tar_bytes
from tiny_training import make_tiny_model

from benchmarks.chaos_data import ROOT, Driver, Killer, LocalCluster, Result, count_samples, s3_environment
from benchmarks.faulty_s3 import FaultyS3, faulty_s3
from pipelines import storage
from pipelines.runtime import RayCluster


def test_a_killed_encoder_and_a_killed_driver_lose_nothing(
    tmp_path: Path, ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    storage_uri = f"s3://bucket/chaos-{port}"
    proxy = FaultyS3(port, 0.1, seed=1, faults=("500", "503", "reset", "reset after", "cut", "cut unannounced"))
    with s3_server(tmp_path, port, "bucket"), faulty_s3(proxy):
        for name, value in s3_environment(port).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tars = []
        for shard in range(3):
            members = [member for number in range(5) for member in sample_members(f"s{shard}{number}")]
            tars.append(tmp_path / f"{shard}.tar")
            tars[-1].write_bytes(tar_bytes([*members, ("bad.0.png", b"<html>"), ("bad.json", b"{")]))
            storage.write_bytes_atomic(f"s3://bucket/tars/{shard}.tar", tars[-1].read_bytes())
        settings = {"name": "n", "input": "s3://bucket/tars", "model": str(make_tiny_model(tmp_path / "model"))}
        settings |= {"mode": "vision", "slice_samples": "2", "max_quarantine_fraction": "1"}
        command = [sys.executable, "-m", "jobs.embed", str(ROOT / "jobs/configs/demo/embed_vision.yaml"), "--json"]
        command += [f"{key}={value}" for key, value in settings.items()] + ["num_encoders=1"]
        variables = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        calm = Driver([*command, f"storage={tmp_path}/calm"], variables, tmp_path / "calm.log")
        variables |= {**s3_environment(proxy.port), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
        driver = Driver([*command, f"storage={storage_uri}"], variables, tmp_path / "driver.log")
        killer = Killer(proxy, None, driver, seed=0)
        try:
            calm.start()
            driver.start()
            assert killer.kill_in_write("encoder", skip=0, drop=True) is not None
            assert killer.kill_in_write("driver", skip=5, drop=False) is not None
            last = driver.finish()
            calm.finish()
        finally:
            driver.close()
            calm.close()
        chaos = Result.read(f"{storage_uri}/embedded/n/vision")
        wanted = Result.read(f"{tmp_path}/calm/embedded/n/vision")
    assert driver.failures == 0, driver.log.read_text()
    assert "Traceback" not in driver.log.read_text()
    assert proxy.num_faults > 0
    assert last["outputs"]["slices_reused"] > 0
    assert chaos.samples == wanted.samples == count_samples(tars, "s3://bucket/tars")
    assert chaos.slices == wanted.slices
    assert chaos.manifest["digest"] == wanted.manifest["digest"]


class _Encoders:
    """Stands for a cluster whose encoders are between two lives when they are first looked for again."""

    def __init__(self, pid: int) -> None:
        self.answers = iter([[pid], [], [pid], [pid]])

    def encoders(self) -> list[int]:
        return next(self.answers)


def test_a_kill_counts_only_if_something_was_killed(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    driver = Driver(sleep, os.environ, tmp_path / "log")
    proxy = FaultyS3(0, 0.0)
    with subprocess.Popen(sleep) as encoder:
        killer = Killer(proxy, cast(LocalCluster, _Encoders(encoder.pid)), driver, seed=1)
        driver.start()
        try:
            killed = killer.kill_any_time("encoder", num_writes=0)
            assert killed is not None
            assert encoder.wait() == -signal.SIGKILL
        finally:
            driver.close()
            encoder.kill()
