"""The whole road with a handful of steps: tar shards -> embeddings -> three stages -> a version -> an HTTP answer."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from plain_libraries import open_with_plain_libraries
from servers import free_port
from test_serve import served
from tiny_training import make_tiny_model

from jobs import cli
from jobs.command import DEMO_CONFIGS
from nexusgen.model.manifest import demo_base
from nexusgen.model.weights import load_model
from nexusgen.schema import EmbedMode
from pipelines import embedded, serve, tracking

# Small enough for a minute, and still every job with its real work.
SETTINGS = (
    "name=road",
    "pack.counts={generation: 48, editing: 8, understanding: 16}",
    "pack.samples_per_shard=24",
    "embed_vision.num_encoders=1",
    "embed_latents.num_encoders=1",
    "train_ar.num_steps=6",
    "train_ar.batch_tokens=null",
    "train_ar.batch_samples=8",
    "train_ar.warmup_steps=1",
    "train_generation_decoder.num_steps=6",
    "train_generation_decoder.batch_samples=8",
    "train_generation_decoder.warmup_steps=1",
    "embed_predicted.num_encoders=1",
    "train_editing_decoder.num_steps=6",
    "train_editing_decoder.batch_samples=8",
    "train_editing_decoder.warmup_steps=1",
    "train_editing_decoder.num_workers=1",
    "evaluate.per_category=1",
    "evaluate.num_explicit=2",
    "evaluate.num_questions=4",
    "evaluate.num_edits=2",
    "evaluate.steps=2",
    "evaluate.num_actors=1",
    "promote.thresholds={}",
)
JOBS = [
    "pack",
    "embed vision",
    "embed latents",
    "train ar",
    "train generation_decoder",
    "register",
    "embed predicted",
    "train editing_decoder",
    "register with editing",
    "evaluate base",
    "evaluate",
    "promote",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped base, or one with random weights where it hasn't been made."""
    return demo_base() if demo_base().is_dir() else make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("road") / "storage"


def walk(folder: Path, base: Path, *settings: str) -> tuple[int, dict[str, Any]]:
    """Exit code of `nexusgen road --json` and what it printed."""
    out = io.StringIO()
    config = str(DEMO_CONFIGS / "road.yaml")
    with contextlib.redirect_stdout(out):
        code = cli.main(["road", config, f"storage={folder}", f"model={base}", *SETTINGS, *settings, "--json"])
    return code, json.loads(out.getvalue())


@pytest.fixture(scope="module")
def report(ray_cluster: Any, folder: Path, base: Path) -> dict[str, Any]:
    """What the first walk printed."""
    code, printed = walk(folder, base)
    assert code == 0
    return printed


@pytest.fixture(scope="module")
def client(report: dict[str, Any]) -> MlflowClient:
    """The mlflow client alone, without any of ours."""
    return MlflowClient(tracking_uri=report["mlflow"], registry_uri=report["mlflow"])


def test_every_job_did_its_work(report: dict[str, Any]) -> None:
    jobs = {job["job"]: job for job in report["jobs"]}
    assert list(jobs) == JOBS
    assert not any(job["reused"] for job in jobs.values())
    assert all(job["seconds"] > 0 for job in jobs.values())
    assert jobs["pack"]["samples"] == jobs["embed vision"]["samples"] == 72
    for stage in ("train ar", "train generation_decoder", "train editing_decoder"):
        assert jobs[stage]["samples"] == 48
        assert jobs[stage]["loss_last"] > 0
    assert jobs["train ar"]["loss_last"] < jobs["train ar"]["loss_first"]  # from random query embeddings: at once
    assert report["seconds"] >= max(job["seconds"] for job in jobs.values())
    assert report["cpu_seconds"] > 0


def test_scores_have_the_names_that_scripts_rely_on(report: dict[str, Any]) -> None:
    names = {"overall", "single", "two", "counting", "colours", "position", "attributes", "explicit_strict"}
    for scores in (report["scores"], report["scores"]["base"]):
        assert names <= scores["generation"].keys()
        assert {"overall", "majority"} <= scores["understanding"].keys()
        assert {"strict", "done", "unchanged"} <= scores["editing"].keys()


def test_every_sample_is_embedded_once_in_every_mode(report: dict[str, Any], folder: Path) -> None:
    modes: tuple[EmbedMode, ...] = ("vision", "latents", "predicted")
    first, *others = (rows_by_slice(folder, mode) for mode in modes)
    assert others == [first, first]
    assert sum(num_rows for _, num_rows in first) == 72


def rows_by_slice(folder: Path, mode: EmbedMode) -> list[tuple[str, int]]:
    return [(Path(info.uri).name, info.num_rows) for info in embedded.list_slices(str(folder), "road", mode)]


def test_published_folder_is_whole_and_shown(report: dict[str, Any], folder: Path) -> None:
    model = load_model(Path(report["model"]))
    assert model.manifest.fingerprint == report["fingerprint"]
    assert set(model.manifest.parts) == {"autoregressive", "generation_decoder", "editing_decoder", "vae"}
    assert report["promoted"]
    with Image.open(folder / "samples.png") as sheet:
        assert sheet.width > 500


def test_published_folder_opens_in_plain_libraries(report: dict[str, Any], tmp_path: Path) -> None:
    open_with_plain_libraries(Path(report["model"]), tmp_path)


def test_mlflow_leads_from_the_alias_to_the_tars(report: dict[str, Any], client: MlflowClient, folder: Path) -> None:
    version = client.get_model_version_by_alias("nexusgen", "champion")
    assert int(version.version) == report["version"]
    tars = set()
    for stage in ("ar", "generation_decoder", "editing_decoder"):
        trained = client.get_run(version.tags[f"nexusgen.run.{stage}"])
        assert trained.data.tags["nexusgen.stage"] == stage
        assert "train/loss" in trained.data.metrics
        for embed_run in made_by(trained, client):
            assert embed_run.data.tags["nexusgen.job"] == "embed"
            for read in embed_run.inputs.dataset_inputs:
                tags = {tag.key: tag.value for tag in read.tags}
                tars.add(tags["nexusgen.digest"])
    on_disk = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "tars" / "road").glob("*.tar")}
    assert len(on_disk) == 4
    assert tars == on_disk


def made_by(run: Run, client: MlflowClient) -> Iterator[Run]:
    """The runs that made what a run has read."""
    for read in run.inputs.dataset_inputs:
        tags = {tag.key: tag.value for tag in read.tags}
        yield client.get_run(tags["nexusgen.parent"])


def test_all_runs_are_nested_in_the_roads(report: dict[str, Any], client: MlflowClient) -> None:
    experiment = client.get_experiment_by_name("road")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if run.info.run_name == "road")
    runs.remove(parent)
    assert len(runs) == len(JOBS)
    for run in runs:
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == "FINISHED"


def test_a_second_walk_reuses_everything(
    report: dict[str, Any], ray_cluster: Any, folder: Path, base: Path, client: MlflowClient
) -> None:
    code, printed = walk(folder, base)
    assert code == 0
    assert all(job["reused"] for job in printed["jobs"])
    assert printed["seconds"] < 60
    for key in ("scores", "model", "version"):
        assert printed[key] == report[key]
    assert len(client.search_model_versions("name = 'nexusgen'")) == 2  # without the editing decoder, and with it


def test_a_model_that_the_gate_refuses_is_shown_and_fails(
    report: dict[str, Any], ray_cluster: Any, folder: Path, base: Path
) -> None:
    code, printed = walk(folder, base, "promote.thresholds={generation.overall: 1.1}")
    assert code == 1
    assert not printed["promoted"]
    assert printed["scores"] == report["scores"]


@pytest.fixture(scope="module")
def url(report: dict[str, Any], ray_cluster: Any, folder: Path) -> Iterator[str]:
    config = serve.ServeConfig(storage=str(folder), model="models:/nexusgen@champion", port=free_port())
    with served(config) as address:
        yield address


def test_champion_answers_over_http(url: str, report: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    assert httpx.get(f"{url}/health", timeout=30).status_code == 200
    body = {"prompt": "a red circle", "seed": 5}
    answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)
    assert answer.status_code == 200
    served = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    out = tmp_path / "x.png"
    assert cli.main(["generate", "a red circle", "--seed", "5", "-o", str(out), "--storage", str(folder)]) == 0
    assert np.array_equal(np.asarray(served), np.asarray(Image.open(out)))


def test_the_storage_holds_what_it_should(report: dict[str, Any], folder: Path) -> None:
    found = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "ml"))}
    assert found == {"tars", "embedded", "checkpoints", "models", "evaluations", "roads", "accounts"}
    assert tracking.mlflow_uri(str(folder)) == report["mlflow"]
