"""What `nexusgen status` finds: in a storage alone, with MLflow, and of a server."""

from __future__ import annotations

import http.server
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from test_train import make_config
from tiny_training import make_embedded, make_tiny_model

from jobs import cli
from jobs.status import describe
from pipelines import checkpoint, storage, tracking
from pipelines.loop import Ranks, run_training
from pipelines.status import read_status


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A storage with embedded data, a finished training and one that has stopped half-way; no MLflow."""
    folder = tmp_path_factory.mktemp("status")
    model, uri = make_tiny_model(folder / "model"), str(folder / "storage")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        make_embedded(uri, "tiny", model)

        for name, stage in (("done", "ar"), ("half", "generation_decoder")):
            config = make_config(uri, model, name=name, stage=stage, num_steps=4, checkpoint_every=2)
            run_training(config, "0" * 32, Ranks(0, 1, torch.device("cpu")), None)
        yield Path(uri)


def test_a_storage_alone_tells_what_it_holds(place: Path) -> None:
    status = read_status(str(place))
    assert set(status.projects) == {"tiny", "done", "half"}
    assert {(one.name, one.finished, one.quarantine_rate) for one in status.embedded} == {("tiny", True, 0.0)}
    assert all(one.embedded for one in status.embedded)
    trainings = {one.name: one for one in status.trainings}
    assert (trainings["done"].state, trainings["done"].checkpoint_step) == ("finished", 4)
    assert trainings["done"].checkpoint.endswith("step-000004")
    assert "no job has run on this storage" in status.tracking_error
    assert not (place / "mlflow.db").exists()  # looking makes none
    text = describe(status)
    assert "done ar" in text
    assert "4/4" in text


def test_a_training_that_is_under_way_or_silent_is_told_from_a_finished_one(place: Path) -> None:
    folder = checkpoint.stage_folder(str(place), "half", "generation_decoder")
    progress = {"stage": "generation_decoder", "num_steps": 100, "step": 37, "losses": {}, "note": "saved at step 37"}
    storage.write_json(storage.join(folder, "progress.json"), progress)
    (half,) = [one for one in read_status(str(place)).trainings if one.name == "half"]
    assert (half.state, half.step, half.num_steps, half.checkpoint_step) == ("running", 37, 100, 4)
    assert half.note == "saved at step 37"

    old = time.time() - 3600
    os.utime(Path(folder) / "progress.json", (old, old))
    status = read_status(str(place))
    (half,) = [one for one in status.trainings if one.name == "half"]
    assert half.state == "silent"  # whether it has ended or loads for long, a storage can't tell
    assert "silent for 36" in describe(status)


def test_runs_versions_and_aliases_come_from_mlflow(place: Path) -> None:
    client = tracking.connect(str(place))
    with tracking.job_run(str(place), "done", "train", "stage: ar", stage="ar"):
        pass
    with pytest.raises(ValueError, match="boom"), tracking.job_run(str(place), "done", "evaluate", "{}"):
        raise ValueError("boom")
    version = publish(client, "f" * 12)
    client.set_registered_model_alias("nexusgen", "champion", version)
    status = read_status(str(place))
    assert {(run.run, run.status) for run in status.runs} == {("train ar", "FINISHED"), ("evaluate", "FAILED")}
    assert [run.note for run in status.runs if run.run == "evaluate"] == ["ValueError: boom"]
    assert [(one.version, one.fingerprint, one.aliases) for one in status.versions] == [(1, "f" * 12, ("champion",))]
    assert "champion" in describe(status)


def publish(client: MlflowClient, fingerprint: str) -> str:
    client.create_registered_model("nexusgen")
    tags = {tracking.TAG_FINGERPRINT: fingerprint}
    return str(client.create_model_version("nexusgen", "/nowhere", tags=tags).version)


def test_a_dead_tracking_server_and_endpoint_are_named_and_the_rest_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:word@127.0.0.1:1")
    words = ["status", "--storage", str(place), "--endpoint", "http://127.0.0.1:1/v1", "--json"]
    assert cli.main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert "doesn't answer" in printed["tracking_error"]
    assert "word" not in json.dumps(printed)
    assert printed["endpoint_error"] == "it doesn't answer (ConnectionError)"
    assert {one["name"] for one in printed["trainings"]} == {"done", "half"}
    assert printed["embedded"][0]["quarantine_rate"] == 0.0


def test_the_served_version_is_asked_for(place: Path) -> None:
    answer = {"status": "ok", "model": "nexusgen", "version": "3", "fingerprint": "abc", "refused": ""}

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        status = read_status(str(place), f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert status.serving == answer
    assert "serves nexusgen, version 3 (abc)" in describe(status)
