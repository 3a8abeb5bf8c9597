"""The job: rows, scores and sheets in the storage, metrics in MLflow, nothing done twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from tiny_training import make_embedded, make_tiny_model

from nexusgen.config import dump_config, parse_config
from nexusgen.errors import ConfigError, ModelError, UsageError
from nexusgen.model.manifest import read_manifest
from pipelines import registry, tracking
from pipelines.accounting import account_uri, read_attempts
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.evaluation_report import shown_number
from pipelines.storage import write_json
from pipelines.suite_demo_world import DemoWorldSuite
from pipelines.suites import Unit
from pipelines.unit_rows import UnitRows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def config_for(storage: Path, model: Path, **changes: Any) -> EvaluateConfig:
    values: dict[str, Any] = {
        "storage": str(storage),
        "name": "test",
        "model": str(model),
        "suites": ["demo_world", "held_out"],
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
    assert report.samples == 6 + 2 + 2 + 12
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
    intervals = content["intervals"]
    assert intervals["generation/overall"]["n"] == 6
    assert intervals["generation/overall"]["value"] == content["scores"]["generation"]["overall"]
    assert intervals["generation/overall"]["low"] < intervals["generation/overall"]["high"]
    assert not list(folder.glob("parts-*"))
    assert (folder / "samples.png").exists()
    assert (folder / "config.yaml").exists()

    client = tracking.connect(str(tmp_path))
    run = client.get_run(report.outputs["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/demo_world/generation/overall"] == content["scores"]["generation"]["overall"]
    assert "eval/held_out/held-out/recall_at_1" in run.data.metrics
    bounds = [run.data.metrics[f"eval/demo_world/generation/overall.{bound}"] for bound in ("low", "high", "n")]
    assert bounds == [intervals["generation/overall"][bound] for bound in ("low", "high", "n")]
    assert run.data.tags[tracking.TAG_FINGERPRINT] == fingerprint
    files = [file.path for file in client.list_artifacts(run.info.run_id, "demo_world")]
    assert {"demo_world/samples.png", "demo_world/report.html"} <= set(files)
    page = (folder / "report.html").read_text("utf-8")
    assert f"to {shown_number(intervals['generation/overall']['high'])}</td>" in page
    assert (folder.parent / "held_out" / "held-out" / "report.html").exists()

    again = evaluate(config)
    assert again.reused
    assert again.outputs == report.outputs
    assert again.seconds < 5

    # As one that was killed after its first suite leaves it: started again, it tells what both attempts used.
    uri = account_uri(str(tmp_path), "evaluate", fingerprint)
    (attempt,) = read_attempts(uri)
    write_json(uri, {"attempts": [attempt | {"finished": False, "samples": 10}]})
    shutil.rmtree(folder.parent / "held_out")
    evaluate(config)
    first, second = read_attempts(uri)
    assert first["finished"]
    assert second["samples"] > 0
    metrics = client.get_run(second["run_id"]).data.metrics
    assert metrics["job/samples"] == 10 + second["samples"]
    assert metrics["job/cpu_hours"] == pytest.approx((first["cpu_seconds"] + second["cpu_seconds"]) / 3600)


def test_held_out_without_data_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data=NAME"):
        parse_config(EvaluateConfig, {"storage": str(tmp_path), "model": "demo-base", "suites": ["held_out"]}, "test")


def test_a_folder_that_isnt_a_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a model folder"):
        evaluate(config_for(tmp_path, tmp_path, suites=["demo_world"]))
    assert not (tmp_path / "mlflow.db").exists()


def suite_of(config: EvaluateConfig) -> DemoWorldSuite:
    return DemoWorldSuite(**{name: getattr(config, name) for name in DemoWorldSuite.model_fields})


def test_finished_units_are_not_made_again(ray_cluster: Any, model: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path, model, suites=["demo_world"])
    folder = tmp_path / "evaluations" / read_manifest(model).fingerprint / "demo_world"
    kept = UnitRows.of(suite_of(config), str(folder))
    unit = Unit("generation", 0, 4)
    row = dict.fromkeys(kept.schema.names) | {"kind": "generation", "prompt": "kept from before", "lang": "en"}
    categories = ("single", "two", "counting", "colours")
    drawn = [row | {"index": i, "category": name, "score": 1.0, "strict": 1.0} for i, name in enumerate(categories)]
    picture = (Path(__file__).parents[2] / "jobs/configs/demo/samples.png").read_bytes()
    kept.write(unit, [one | {"png": picture, "expected": ""} for one in drawn])
    assert evaluate(config).outputs["scores"]["demo_world"]["generation"]["colours"] == 1
    prompts = pq.read_table(folder / "results.parquet")["prompt"].to_pylist()
    assert [index for index, prompt in enumerate(prompts) if prompt == "kept from before"] == [0, 1, 2, 3]
    made = json.loads((folder / "run.json").read_text())
    assert (made["items"], made["items_made"]) == (10, 6)


@pytest.mark.timeout(900)  # three evaluations, one of them with a Ray of its own
def test_killed_in_the_middle_it_repeats_nothing_and_gives_the_same_numbers(
    ray_cluster: Any, model: Path, tmp_path: Path, no_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"suites": ["demo_world"], "per_category": 3, "num_edits": 8, "batch_size": 2, "num_actors": 1}
    config = config_for(tmp_path / "killed", model, **settings, steps=10)
    file = tmp_path / "evaluate.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    folder = tmp_path / "killed" / "evaluations" / read_manifest(model).fingerprint / "demo_world"
    parts = Path(UnitRows.of(suite_of(config), str(folder)).parts)
    command = [sys.executable, "-m", "jobs.cli", "evaluate", str(file)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
    try:
        while len(list(parts.glob("*.parquet"))) < 3:
            assert driver.poll() is None
            time.sleep(0.02)
    finally:
        workers = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
        driver.kill()
        driver.wait()
        for worker in workers:
            if worker.is_running():
                worker.kill()
        psutil.wait_procs(workers, timeout=30)
    kept = list(parts.glob("*.parquet"))
    num_kept = sum(pq.read_metadata(part).num_rows for part in kept)
    total = 18 + 2 + 8 + 2
    assert 6 <= num_kept < total
    assert not (folder / "scores.json").exists()

    evaluate(config)
    assert f"evaluate demo_world: {num_kept}/{total} were made before" in capsys.readouterr().err
    made = json.loads((folder / "run.json").read_text())
    assert (made["items"], made["items_made"]) == (total, total - num_kept)
    assert not parts.exists()

    unhurt = evaluate(config_for(tmp_path / "unhurt", model, **settings, steps=10))
    other = tmp_path / "unhurt" / "evaluations" / folder.parent.name / "demo_world"
    contents = [json.loads((one / "scores.json").read_text()) for one in (folder, other)]
    assert contents[0]["scores"] == contents[1]["scores"] == unhurt.outputs["scores"]["demo_world"]
    assert contents[0]["intervals"] == contents[1]["intervals"]
    assert pq.read_table(folder / "results.parquet").equals(pq.read_table(other / "results.parquet"))


def test_two_models_are_compared_item_by_item(ray_cluster: Any, model: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    storage = tmp_path / "storage"
    config = config_for(storage, model, suites=["demo_world"], against=str(other), num_edits=3)
    report = evaluate(config)
    ours, theirs = (read_manifest(folder).fingerprint for folder in (model, other))
    folder = storage / "evaluations" / ours / "demo_world"
    assert (storage / "evaluations" / theirs / "demo_world" / "scores.json").exists()
    entry = json.loads((folder / "scores.json").read_text())["against"][theirs]
    assert entry["differences"] == report.outputs["against"]["differences"]["demo_world"]
    found = entry["differences"]["understanding/overall"]
    scores = [
        json.loads((storage / "evaluations" / one / "demo_world" / "scores.json").read_text())["scores"]
        for one in (ours, theirs)
    ]
    assert found["value"] == scores[0]["understanding"]["overall"] - scores[1]["understanding"]["overall"]
    assert found["low"] <= found["value"] <= found["high"]
    sheets = {path.name for path in folder.glob("against-*.png")}
    assert sheets == {f"against-{theirs}-{kind}.png" for kind in ("generation", "explicit", "editing")}
    client = tracking.connect(str(storage))
    run = client.get_run(entry["run_id"])
    assert run.data.tags[tracking.TAG_AGAINST] == theirs
    assert (
        run.data.metrics["against/demo_world/generation/overall"] == entry["differences"]["generation/overall"]["value"]
    )
    assert "against/demo_world/generation/overall.low" in run.data.metrics
    again = evaluate(config)
    assert again.reused
    assert again.outputs == report.outputs


def test_a_model_isnt_compared_with_itself(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="are the same weights"):
        evaluate(config_for(tmp_path, model, suites=["demo_world"], against=str(model)))
