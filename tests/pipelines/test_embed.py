from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from test_shards import png, record, sample_members, tar_bytes
from tiny_training import make_tiny_model

from nexusgen.errors import ConfigError, InputError, ModelError, QuarantineError, ResourceError
from nexusgen.model.manifest import read_manifest
from pipelines import embedded, tracking
from pipelines.embed import CHECK_EVERY, EmbedConfig, _Tally, embed
from pipelines.runtime import RayCluster
from pipelines.slices import shard_name


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def a_config(folder: Path, base: Path, mode: str = "vision", **values: Any) -> EmbedConfig:
    settings = {"storage": f"{folder}/storage", "name": "n", "input": f"{folder}/tars", "model": str(base)}
    return EmbedConfig.model_validate({**settings, "mode": mode, "slice_samples": 2, **values})


def write_tars(folder: Path) -> None:
    edit = record("<image> Redder", "<image>", ("0.png", "1.png"))
    bad = [("bad.0.png", b"<html>"), ("bad.json", record())]
    (folder / "tars").mkdir(parents=True)
    members = [*sample_members("a0"), *bad, ("a2.0.png", png()), ("a2.1.png", png("blue")), ("a2.json", edit)]
    members += [("a3.0.png", png("green", (20, 10))), ("a3.json", record("<image> What?", "A box."))]
    members += [("none.json", record())]
    (folder / "tars" / "a.tar").write_bytes(tar_bytes(members))
    (folder / "tars" / "b.tar").write_bytes(
        tar_bytes([*sample_members("b0"), *sample_members("b1"), *sample_members("b2")])
    )
    (folder / "tars" / "c.tar").write_bytes(b"no tar")


def keys_of(folder: Path, mode: Any) -> list[str]:
    slices = embedded.list_slices(f"{folder}/storage", "n", mode)
    return [key for info in slices for key in embedded.read_slice(info, ["key"]).column("key").to_pylist()]


def test_a_job_embeds_or_accounts_for_every_sample_and_redoes_only_what_changed(
    tmp_path: Path, base: Path, ray_cluster: RayCluster
) -> None:
    write_tars(tmp_path)
    config = a_config(tmp_path, base, max_quarantine_fraction=1)
    storage_uri = config.storage

    # Too many bad samples stop the job and leave no data to read, but what is finished isn't made again.
    with pytest.raises(QuarantineError, match=r"3 of 9 samples are bad \(33.3%; at most 5.0% are allowed\)"):
        embed(a_config(tmp_path, base))
    with pytest.raises(InputError, match="hasn't finished"):
        embedded.read_manifest(storage_uri, "n", "vision")
    report = embed(config)
    assert (report.reused, report.outputs["embedded"], report.outputs["slices_reused"]) == (False, 6, 5)
    assert report.outputs["quarantined"] == {"image_undecodable": 1, "member_missing": 1, "tar_not_a_tar": 1}
    assert report.outputs["by_task"] == {"generation": 4, "editing": 1, "understanding": 1}
    assert keys_of(tmp_path, "vision") == ["a0", "a2", "a3", "b0", "b1", "b2"]

    # The account of what was lost stands beside the data, with the shard's name.
    lost = embedded.read_quarantine(storage_uri, "n", "vision")
    assert lost is not None
    assert sorted((row["key"], row["reason_code"]) for row in lost.to_pylist()) == [
        ("", "tar_not_a_tar"), ("bad", "image_undecodable"), ("none", "member_missing"),
    ]  # fmt: skip
    folder = Path(report.outputs["data"])
    assert json.loads((folder / "run.json").read_text())["run_id"] == report.outputs["run_id"]
    assert (folder / "config.yaml").read_text().startswith("storage:")

    # MLflow holds the counts and one dataset input per tar.
    client = MlflowClient(tracking_uri=tracking.mlflow_uri(storage_uri))
    run = client.get_run(report.outputs["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["data/embedded"] == 6
    assert run.data.metrics["data/quarantine/member_missing"] == 1
    assert {Path(i.dataset.name).name for i in run.inputs.dataset_inputs} == {"a.tar", "b.tar", "c.tar"}

    # The other mode has the same files and rows.
    embed(a_config(tmp_path, base, "latents", max_quarantine_fraction=1))
    embedded.check_modes_agree(storage_uri, "n", ["vision", "latents"])
    assert keys_of(tmp_path, "latents") == keys_of(tmp_path, "vision")

    # The third mode, in int8: a trained model's predictions of what the assistant draws, and how well they are stored.
    predicted = embed(a_config(tmp_path, base, "predicted", max_quarantine_fraction=1, dtype="int8", decode_threads=2))
    embedded.check_modes_agree(storage_uri, "n", ["vision", "predicted"])
    first_two = embedded.list_slices(storage_uri, "n", "predicted")[:2]
    rows = [row for info in first_two for row in embedded.read_slice(info).to_pylist()]
    assert [(row["reference_index"], row["predicted_index"]) for row in rows] == [([], [0]), ([0], [1]), ([], [])]
    assert predicted.outputs["fingerprint"] == read_manifest(base).fingerprints["autoregressive"]
    assert predicted.outputs["data/int8_cosine"] > 0.9999
    assert client.get_run(predicted.outputs["run_id"]).data.metrics["data/int8_mse"] > 0

    # Nothing changed: nothing is done. One shard changed, one is new, one is gone: only the changed slices are made.
    assert embed(config).reused
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    tars = tmp_path / "tars"
    (tars / "b.tar").write_bytes(
        tar_bytes([*sample_members("b0"), *sample_members("b1"), *sample_members("b3", "blue")])
    )
    (tars / "d.tar").write_bytes(tar_bytes(sample_members("d0")))
    (tars / "c.tar").unlink()
    for record_file in (folder / "_manifest").glob("a-*[0-9a-f].json"):
        if record_file.stem == shard_name(f"{tars}/a.tar"):
            record_file.unlink()  # as if the job had been killed before it knew the shard's end
    again = embed(config)
    assert (again.reused, again.samples) == (False, 2)
    assert again.outputs["slices_reused"] == 3
    assert keys_of(tmp_path, "vision") == ["a0", "a2", "a3", "b0", "b1", "b3", "d0"]
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert sum(before.get(name) == time for name, time in after.items()) == 3
    assert not list((folder / "quarantine").glob("c-*"))
    assert not [path for path in folder.rglob("*") if ".tmp-" in path.name]
    assert again.outputs["digest"] != report.outputs["digest"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_stops_the_job_with_one_clear_error_and_a_larger_one_lets_it_go_on(
    tmp_path: Path, base: Path, ray_cluster: RayCluster
) -> None:
    (tmp_path / "tars").mkdir()
    for shard in range(3):
        members = [member for number in range(6) for member in sample_members(f"s{shard}{number}")]
        (tmp_path / "tars" / f"{shard}.tar").write_bytes(tar_bytes(members))
    disk = tmp_path / "storage" / "embedded"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], check=True)
    try:
        with pytest.raises(ResourceError, match="No space left"):
            embed(a_config(tmp_path, base))
        assert not [path for path in disk.rglob("*") if ".tmp-" in path.name]
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        report = embed(a_config(tmp_path, base))
        assert report.outputs["slices_reused"] > 0
        assert sorted(keys_of(tmp_path, "vision")) == sorted(f"s{shard}{i}" for shard in range(3) for i in range(6))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_quarantined_fraction_is_looked_at_along_the_way(tmp_path: Path, base: Path) -> None:
    tally = _Tally(a_config(tmp_path, base))
    entry = {"num_rows": CHECK_EVERY - 1, "quarantined": {}, "tasks": {}}
    tally.add(entry)
    assert not tally.check()
    tally.add({**entry, "num_rows": 0, "quarantined": {"json_invalid": 50}})
    assert tally.check()
    tally.add({**entry, "num_rows": 0, "quarantined": {"json_invalid": 5}})
    assert not tally.check()
    with pytest.raises(QuarantineError, match="json_invalid 55"):
        tally.check(is_final=True)


def test_latents_are_not_quantised(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ValueError, match="latents have no tokens"):
        a_config(tmp_path, base, "latents", dtype="int8")


def test_wrong_settings_are_refused_before_anything_starts(tmp_path: Path, base: Path) -> None:
    with pytest.raises(InputError, match="doesn't exist"):
        embed(a_config(tmp_path, base))
    write_tars(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        embed(a_config(tmp_path, tmp_path / "none"))
    with pytest.raises(ModelError, match="not a model folder"):
        embed(a_config(tmp_path, tmp_path))
    with pytest.raises(ConfigError, match="no input"):
        embed(a_config(tmp_path, base, input=[]))
    (tmp_path / "storage").write_bytes(b"a file")
    with pytest.raises(ResourceError, match="cannot write"):
        embed(a_config(tmp_path, base))
    (tmp_path / "storage").unlink()
    with pytest.raises(ResourceError, match=r"needs 1000\.5 CPUs"):
        embed(a_config(tmp_path, base, num_encoders=1000))
