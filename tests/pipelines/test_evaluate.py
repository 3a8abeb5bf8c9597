"""The job: rows, scores and sheets in the storage, metrics in MLflow, nothing done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tiny_training import make_embedded, make_tiny_model

from nexusgen.config import parse_config
from nexusgen.errors import ConfigError, ModelError
from nexusgen.model.manifest import read_manifest
from pipelines import registry, tracking
from pipelines.evaluate import EvaluateConfig, evaluate


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def config_for(storage: Path, model: Path, **changes: Any) -> EvaluateConfig:
    values: dict[str, Any] = {
        "storage": str(storage),
        "name": "test",
        "model": str(model),
        "suites": ["demo_world", "retrieval"],
        "data": "held-out",
        "per_category": 1,
        "num_explicit": 2,
        "num_questions": 2,
        "num_pictures": 3,
        "num_targets": 4,
        "batch_size": 4,
        "steps": 2,
        "actor_cpus": 0.5,
    }
    return EvaluateConfig(**(values | changes))


def test_scores_land_in_storage_and_mlflow_and_are_used_again(ray_cluster: Any, model: Path, tmp_path: Path) -> None:
    make_embedded(str(tmp_path), "held-out", model, num_samples=12)
    config = config_for(tmp_path, model)
    report = evaluate(config)
    assert not report.reused
    assert report.samples == 6 + 2 + 2 + 8
    fingerprint = read_manifest(model).fingerprint
    folder = tmp_path / "evaluations" / fingerprint / "demo_world"
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    assert [(row["kind"], row["index"]) for row in rows] == [
        *(("generation", index) for index in range(6)),
        *(("explicit", index) for index in range(2)),
        *(("understanding", index) for index in range(2)),
    ]
    content = json.loads(Path(registry.scores_uri(str(tmp_path), fingerprint, "demo_world")).read_text())
    assert content["fingerprint"] == fingerprint
    assert content["scores"] == report.outputs["scores"]["demo_world"]
    assert (folder / "samples.png").exists()
    assert (folder / "config.yaml").exists()

    client = tracking.connect(str(tmp_path))
    run = client.get_run(report.outputs["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/demo_world/generation/overall"] == content["scores"]["generation"]["overall"]
    assert "eval/retrieval/held-out/recall_at_1" in run.data.metrics
    assert run.data.tags[tracking.TAG_FINGERPRINT] == fingerprint
    assert "demo_world/samples.png" in [file.path for file in client.list_artifacts(run.info.run_id, "demo_world")]

    again = evaluate(config)
    assert again.reused
    assert again.outputs == report.outputs
    assert again.seconds < 5


def test_retrieval_without_data_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data=NAME"):
        parse_config(EvaluateConfig, {"storage": str(tmp_path), "model": "demo-base", "suites": ["retrieval"]}, "test")


def test_a_folder_that_isnt_a_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a model folder"):
        evaluate(config_for(tmp_path, tmp_path, suites=["demo_world"]))
    assert not (tmp_path / "mlflow.db").exists()
