"""The Ray cluster, its CPU budget and the meter; a cluster of our own lives in another process than the shared one."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from nexusgen.errors import ResourceError
from pipelines import runtime
from pipelines.runtime import CpuMeter, JobReport, RayCluster

OWN_CLUSTER = """
import json, os, sys
from nexusgen.errors import ResourceError
from pipelines.runtime import CpuMeter, ray_cluster, require_cpus

seen = {}
try:
    with ray_cluster(3, "train with 2 workers", local_cpus=2):
        pass
except ResourceError as error:
    seen["too_small"] = str(error)
seen["refused_without_ray"] = "ray" not in sys.modules

with CpuMeter() as meter, ray_cluster(2, "outer", local_cpus=2) as cluster:
    import ray

    @ray.remote(num_cpus=1)
    class Busy:
        def environment(self):
            return os.environ["OMP_NUM_THREADS"], os.environ["AWS_DEFAULT_REGION"]

        def work(self, seconds):
            import time
            end = time.process_time() + seconds
            while time.process_time() < end:
                pass

    busy = Busy.remote()
    seen["environment"] = ray.get(busy.environment.remote())
    ray.get(busy.work.remote(1.5))
    try:
        require_cpus(2, "the next job", patience_s=0.5)
    except ResourceError as error:
        seen["busy"] = str(error)
    with ray_cluster(1, "inner") as inner:
        seen["inner_is_local"] = inner.is_local
    seen["still_up"] = ray.is_initialized()
    ray.kill(busy)
    seen["free_later"] = require_cpus(2, "after it", patience_s=20)[1]
    seen["cluster"] = [cluster.total_cpus, cluster.is_local]
seen["stopped"] = not ray.is_initialized()
seen["cpu_seconds"] = meter.cpu_seconds
print(json.dumps(seen))
"""


def test_own_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-test-1")
    done = subprocess.run([sys.executable, "-c", OWN_CLUSTER], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["too_small"].startswith("train with 2 workers needs 3 CPUs, but only 2 of Ray's 2 are free: use fewer")
    assert seen["refused_without_ray"]
    assert seen["environment"] == ["1", "eu-test-1"]
    assert seen["busy"].startswith("the next job needs 2 CPUs, but only 1 of Ray's 2 are free")
    assert not seen["inner_is_local"]
    assert seen["still_up"]
    assert seen["free_later"] == 2
    assert seen["cluster"] == [2, True]
    assert seen["stopped"]
    assert seen["cpu_seconds"] > 1.5  # the actor is a grandchild of the driver


def test_dead_address_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "from nexusgen.errors import ResourceError\nfrom pipelines.runtime import ray_cluster\n"
        "try:\n    with ray_cluster(1, 'a job'):\n        pass\nexcept ResourceError as error:\n    print(error)\n"
    )
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1"), done.stderr


def test_meter_counts_children_and_not_the_past() -> None:
    spin = "import time\nwhile time.process_time() < 1.0: pass\ntime.sleep(1.5)"
    with CpuMeter() as meter:
        subprocess.run([sys.executable, "-c", spin], check=True)
    assert 0.9 < meter.cpu_seconds < meter.seconds + 0.5
    end = meter.seconds
    time.sleep(0.01)
    assert meter.seconds == end


def test_idle_meter_is_near_zero() -> None:
    with CpuMeter() as meter:
        pass
    assert meter.cpu_seconds < 0.2


def test_job_report_round_trip() -> None:
    report = JobReport("train", 4.0, 7.5, samples=100, loss_first=2.0, loss_last=0.5, outputs={"step": 3})
    assert JobReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert report.samples_per_s == 25
    assert JobReport("register", 1.0, 1.0).samples_per_s is None


def test_a_submitted_job_waits_for_its_nodes_and_tells(
    ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setattr(runtime, "JOIN_PATIENCE_S", 0.6)
    with pytest.raises(ResourceError, match="the road needs 1000 CPUs, but only"):
        runtime.require_cpus(1000, "the road")
    assert "are free: asking for more, waiting" in capsys.readouterr().err


def test_a_submitted_jobs_driver_passes_on_addresses_but_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "held by the node")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-test-1")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", "held by the node, too")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert runtime._worker_environment()["AWS_SECRET_ACCESS_KEY"] == "held by the node"
    carried = {"runtime_env": {"env_vars": {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(carried))
    passed = runtime._worker_environment()
    assert passed["AWS_DEFAULT_REGION"] == "eu-test-1"
    assert "MLFLOW_TRACKING_URI" not in passed  # the job gives it, and Ray refuses it twice
    assert "held by the node" not in str(passed)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert runtime._worker_environment()["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    for held in ("http://user:word@mlflow:5000", "postgresql://db/mlflow?user=mlflow&password=word"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", held)
        assert "word" not in str(runtime._worker_environment())
        monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
        assert runtime._worker_environment()["MLFLOW_TRACKING_URI"] == held  # a cluster of one's own has it from here
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
