"""MLflow runs as jobs log them, read back with the mlflow client; one test kills and restarts a real server."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image
from servers import free_port, mlflow_server

from nexusgen.errors import ConfigError, InputError, ResourceError
from pipelines import tracking
from pipelines.runtime import JobReport

CONFIG = "name: shapes\nstorage: runs\noptimizer: {lr: 0.001, betas: [0.9, 0.95]}\n"


pytestmark = pytest.mark.usefixtures("no_server")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("storage"))


def client_of(storage: str) -> MlflowClient:
    return MlflowClient(tracking_uri=tracking.mlflow_uri(storage))


def test_nested_run_holds_all_that_was_logged(store: str) -> None:
    with tracking.road_run(store, "shapes", "name: shapes\n") as road:  # noqa: SIM117
        with tracking.job_run(store, "shapes", "train", CONFIG, stage="ar", parent=road.run_id) as run:
            for step in range(1500):  # more than one request holds
                run.log_metrics({"train/loss": 1.0 / (step + 1), "train/lr": 1e-3}, step)
            run.log_metrics({"data/quarantine/tar_truncated": 2})
            run.set_tags({tracking.TAG_FINGERPRINT: "f" * 64})
            run.log_dataset_input("vision", "/data/manifest", "sha256:" + "d" * 64, num_rows=7, run_id="embed-run")
            run.log_image(Image.new("RGB", (4, 4), "red"), "samples/step-10.png")
            run.log_report(JobReport("train", 3.0, 5.0, samples=9))
            with tracking.attach(store, run.run_id) as rank_zero:
                rank_zero.log_metrics({"train/ce": 0.5}, 3)
    client = client_of(store)
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert client.get_experiment(found.info.experiment_id).name == "shapes"
    assert found.data.tags["nexusgen.job"] == "train"
    assert found.data.tags["nexusgen.stage"] == "ar"
    assert found.data.tags["nexusgen.parent"] == found.data.tags["mlflow.parentRunId"] == road.run_id
    assert found.data.tags["nexusgen.fingerprint"] == "f" * 64
    assert found.data.params == {
        "name": "shapes",
        "storage": "runs",
        "optimizer.lr": "0.001",
        "optimizer.betas": "[0.9, 0.95]",
    }
    history = client.get_metric_history(run.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1500))
    assert found.data.metrics["train/ce"] == 0.5
    assert found.data.metrics["job/cpu_seconds"] == 5.0
    (given,) = found.inputs.dataset_inputs
    assert given.dataset.digest == "d" * 36  # as much as MLflow's field holds
    assert json.loads(given.dataset.source) == {"uri": "/data/manifest"}
    assert {tag.key: tag.value for tag in given.tags} == {
        "mlflow.data.context": "training",
        "nexusgen.digest": "d" * 64,
        "nexusgen.parent": "embed-run",
    }
    names = {item.path for folder in (None, "samples") for item in client.list_artifacts(run.run_id, folder)}
    assert names == {"config.yaml", "report.json", "samples", "samples/step-10.png"}
    assert (Path(store) / "mlartifacts" / run.run_id / "artifacts" / "config.yaml").read_text() == CONFIG
    assert client.get_run(road.run_id).info.status == "FINISHED"
    assert not list((Path(store) / "mlflow_spool").iterdir())


@pytest.mark.parametrize(("error", "status"), [(InputError("no such tar"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_status_tells_how_a_run_ended(store: str, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), tracking.job_run(store, "shapes", "embed", CONFIG) as run:
        raise error
    found = client_of(store).get_run(run.run_id)
    assert found.info.status == status
    if status == "FAILED":
        assert found.data.tags["mlflow.note.content"] == "InputError: no such tar"


def test_resumed_run_goes_on_in_the_same_run(store: str) -> None:
    with tracking.job_run(store, "shapes", "train", "steps: 2\n") as first:
        first.log_metrics({"train/loss": 2.0}, 0)
    with tracking.job_run(store, "shapes", "train", "steps: 4\nnew: 1\n", resume_run_id=first.run_id) as again:
        again.log_metrics({"train/loss": 1.0}, 1)
    assert again.run_id == first.run_id
    found = client_of(store).get_run(first.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"steps": "2", "new": "1"}
    assert [m.value for m in client_of(store).get_metric_history(first.run_id, "train/loss")] == [2.0, 1.0]


def test_run_to_resume_of_another_server_is_not_an_error(store: str, caplog: pytest.LogCaptureFixture) -> None:
    with tracking.job_run(store, "shapes", "train", CONFIG, resume_run_id="0" * 32) as run:
        pass
    assert run.run_id != "0" * 32
    assert "a new one begins" in caplog.text


def test_unknown_metric_is_a_programming_error(store: str) -> None:
    tracking.check_metric_names(["train/loss", "eval/demo_world/generation.overall", "data/quarantine/json_invalid"])
    for name in ("train/los", "loss", "data/quarantine/whatever", "eval/x"):
        with pytest.raises(ValueError, match="METRICS"):
            tracking.check_metric_names([name])
    with pytest.raises(ValueError, match="train/speed"), tracking.job_run(store, "shapes", "train", CONFIG) as run:
        run.log_metrics({"train/speed": 1.0})


def test_secrets_never_become_params() -> None:
    config = {"input": "s3://user:hunter2@host/x", "api_key": "k", "a": {"password": "p"}, "num_tokens": 3, "e": {}}
    assert tracking.flatten_params(config) == {
        "input": "s3://***@host/x",
        "api_key": "***",
        "a.password": "***",
        "num_tokens": "3",
        "e": "{}",
    }


def test_where_mlflow_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.mlflow_uri(str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        tracking.mlflow_uri("s3://bucket/x")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="can't be written"):
        tracking.configure(str(tmp_path / "file"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert tracking.mlflow_uri("s3://bucket/x") == "http://127.0.0.1:1"
    with pytest.raises(ResourceError, match="doesn't answer"), tracking.job_run(str(tmp_path), "p", "embed", CONFIG):
        pass


def test_fresh_database_survives_a_race(tmp_path: Path) -> None:
    script = f"from pipelines import tracking\ntracking.configure({str(tmp_path)!r})"
    racers = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) for _ in range(3)]
    for racer in racers:
        _, errors = racer.communicate(timeout=120)
        assert racer.returncode == 0, errors.decode()


def test_job_outlives_its_server_and_delivers_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    caplog.set_level(logging.WARNING)
    store = str(tmp_path / "storage")
    with mlflow_server(tmp_path, port):
        job = tracking.job_run(store, "shapes", "train", CONFIG)
        run = job.__enter__()
        run.log_metrics({"train/loss": 3.0}, 0)
        time.sleep(2.5)  # delivered while the server lives
    started = time.monotonic()
    for step in range(1, 200):
        run.log_metrics({"train/loss": 3.0 / step}, step)
    run.log_text("late", "late.txt")
    assert time.monotonic() - started < 1.0  # nobody waits for a dead server
    with monkeypatch.context() as impatient:
        impatient.setattr(tracking, "CLOSE_PATIENCE_S", 0.5)
        with tracking.attach(store, run.run_id) as rank_zero:
            rank_zero.log_metrics({"train/ce": 0.25}, 7)  # can't arrive before this process part ends
        assert "wait in" in caplog.text
    with mlflow_server(tmp_path, port):
        job.__exit__(None, None, None)
        client = client_of(store)
        assert [m.step for m in client.get_metric_history(run.run_id, "train/loss")] == list(range(200))
        assert client.get_run(run.run_id).info.status == "FINISHED"
        assert {item.path for item in client.list_artifacts(run.run_id)} == {"config.yaml", "late.txt"}
        assert client.get_run(run.run_id).data.metrics["train/ce"] == 0.25
    with monkeypatch.context() as impatient:
        impatient.setattr(tracking, "CLOSE_PATIENCE_S", 0.5)
        with tracking.attach(store, run.run_id) as late:
            late.log_metrics({"train/mse": 0.5}, 8)  # its job has ended: nobody is left to send it
    with mlflow_server(tmp_path, port):
        assert "train/mse" not in client.get_run(run.run_id).data.metrics
        with tracking.job_run(store, "shapes", "evaluate", CONFIG):
            pass  # the next job on this storage delivers what waited
        assert client.get_run(run.run_id).data.metrics["train/mse"] == 0.5
    (spool,) = (tmp_path / "storage").glob("mlflow_spool*")
    assert not list(spool.iterdir())


@pytest.mark.parametrize("storage", ["s3://bucket/x", "folder"])
def test_what_waits_for_one_server_is_not_sent_to_another(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = storage if storage.startswith("s3") else str(tmp_path / storage)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tracking, "CLOSE_PATIENCE_S", 0.1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with tracking.attach(store, "0" * 32) as run:
        run.log_metrics({"train/ce": 0.25}, 7)
    monkeypatch.setattr(tracking, "CLOSE_PATIENCE_S", 30.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    with tracking.job_run(store, "shapes", "evaluate", CONFIG):
        pass
    (waiting,) = tmp_path.glob("**/records.jsonl")
    assert "train/ce" in waiting.read_text()


def test_a_remote_storages_spool_is_one_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    first = tracking._spool_root("s3://bucket/x")
    assert str(os.getuid()) in first.name.split("_")
    assert tracking._spool_root("s3://bucket/x/") == first
    assert tracking._spool_root("s3://bucket/y") != first


def test_what_a_killed_worker_logged_arrives_with_the_end_of_its_job(tmp_path: Path) -> None:
    """A worker attaches, logs, and dies before anything is delivered."""
    storage = str(tmp_path)
    worker = """
import os, signal, sys
from pipelines import tracking
tracking._Outbox._work = lambda self: None  # its thread never delivers
with tracking.attach(sys.argv[1], sys.argv[2]) as run:
    run.log_metrics({"train/loss": 0.25}, step=7)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    with tracking.job_run(storage, "shapes", "train", CONFIG, stage="ar") as run:
        subprocess.run([sys.executable, "-c", worker, storage, run.run_id], check=False, timeout=120)
        assert not client_of(storage).get_metric_history(run.run_id, "train/loss")
    (metric,) = client_of(storage).get_metric_history(run.run_id, "train/loss")
    assert (metric.step, metric.value) == (7, 0.25)
