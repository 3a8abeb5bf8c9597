from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from test_shards import png, record, sample_members, tar_bytes

from nexusgen.errors import ConfigError, FingerprintError, InputError, ModelError, QuarantineError, ResourceError
from nexusgen.model.manifest import read_manifest
from pipelines import embedded, tracking
from pipelines.embed import CHECK_EVERY, EmbedConfig, _Tally, embed
from pipelines.runtime import RayCluster
from pipelines.slice_encoder import Plan, SliceEncoder
from pipelines.slices import shard_name

pytestmark = pytest.mark.usefixtures("no_server")


def a_config(folder: Path, base: Path, mode: str = "vision", **values: Any) -> EmbedConfig:
    settings = {"storage": f"{folder}/storage", "name": "n", "input": f"{folder}/tars", "model": str(base)}
    return EmbedConfig.model_validate({**settings, "mode": mode, "slice_samples": 2, **values})


def a_plan(folder: Path, base: Path, fingerprint: str = "f") -> Plan:
    return Plan(a_config(folder, base), f"{folder}/storage/embedded/n/vision", "c", fingerprint, frozenset())


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


def shape_of(folder: Path, mode: Any) -> list[tuple[str, int]]:
    """Slices and their numbers of rows, which are the same in every mode."""
    slices = embedded.read_manifest(f"{folder}/storage", "n", mode).slices
    return [(Path(info.uri).name, info.num_rows) for info in slices]


def test_a_job_embeds_or_accounts_for_every_sample_and_redoes_only_what_changed(
    tmp_path: Path, base: Path, ray_cluster: RayCluster, capsys: pytest.CaptureFixture[str]
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
    assert (report.reused, report.outputs["embedded"], report.outputs["slices_reused"]) == (False, 6, 6)
    assert report.outputs["quarantined"] == {"image_undecodable": 1, "member_missing": 1, "tar_not_a_tar": 1}
    assert report.outputs["by_task"] == {"generation": 4, "editing": 1, "understanding": 1}
    assert keys_of(tmp_path, "vision") == ["a0", "a2", "a3", "b0", "b1", "b2"]

    # The account of what was lost stands beside the data, with the shard's name.
    folder = Path(report.outputs["data"])
    lost = pq.read_table(folder / "quarantine")
    assert sorted((row["key"], row["reason_code"]) for row in lost.to_pylist()) == [
        ("", "tar_not_a_tar"), ("bad", "image_undecodable"), ("none", "member_missing"),
    ]  # fmt: skip
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
    assert shape_of(tmp_path, "latents") == shape_of(tmp_path, "vision")
    assert keys_of(tmp_path, "latents") == keys_of(tmp_path, "vision")

    # The third mode, in int8: a trained model's predictions of edited pictures, and how well they are stored.
    predicted = embed(a_config(tmp_path, base, "predicted", max_quarantine_fraction=1, dtype="int8", decode_threads=2))
    assert shape_of(tmp_path, "predicted") == shape_of(tmp_path, "vision")
    first_two = embedded.list_slices(storage_uri, "n", "predicted")[:2]
    rows = [row for info in first_two for row in embedded.read_slice(info).to_pylist()]
    assert [(row["reference_index"], row["predicted_index"]) for row in rows] == [([], []), ([0], [1]), ([], [])]
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
    killed = [place / f".x.parquet.tmp-{number:012x}" for number, place in enumerate((folder, folder / "_manifest"))]
    under_way = folder / ".y.parquet.tmp-0123456789ab"
    for path in (*killed, under_way):
        path.write_bytes(b"half")
    os.utime(under_way, ns=(2**62, 2**62))  # of a write that begins after this job
    again = embed(config)
    assert (again.reused, again.samples) == (False, 2)
    assert again.outputs["slices_reused"] == 4
    assert keys_of(tmp_path, "vision") == ["a0", "a2", "a3", "b0", "b1", "b3", "d0"]
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert sum(before.get(name) == time for name, time in after.items()) == 3
    assert not list((folder / "quarantine").glob("c-*"))
    assert [path for path in folder.rglob("*") if ".tmp-" in path.name] == [under_way]
    assert again.outputs["digest"] != report.outputs["digest"]
    assert "removed" not in capsys.readouterr().err

    # Data that goes because its shard isn't listed any more is told.
    (tars / "a.tar").unlink()
    embed(config)
    assert keys_of(tmp_path, "vision") == ["b0", "b1", "b3", "d0"]
    assert "removed 2 slices of 'n' that the input no longer makes" in capsys.readouterr().err


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
        deadline = time.monotonic() + 10
        while [path for path in disk.rglob("*") if ".tmp-" in path.name]:  # another slice may be under way still
            assert time.monotonic() < deadline
            time.sleep(0.1)
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        report = embed(a_config(tmp_path, base))
        assert report.outputs["slices_reused"] > 0
        assert sorted(keys_of(tmp_path, "vision")) == sorted(f"s{shard}{i}" for shard in range(3) for i in range(6))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_quarantined_fraction_is_looked_at_along_the_way(tmp_path: Path, base: Path) -> None:
    tally = _Tally(a_plan(tmp_path, base), num_shards=20)
    entry = {"num_rows": CHECK_EVERY - 1, "quarantined": {}, "tasks": {}, "fidelity": None, "dropped": []}
    tally.add(entry)
    assert not tally.check()
    tally.add({**entry, "num_rows": 0, "quarantined": {"json_invalid": 50}})
    assert tally.check()
    tally.add({**entry, "num_rows": 0, "quarantined": {"json_invalid": 5}})
    assert not tally.check()
    with pytest.raises(QuarantineError, match="json_invalid 55"):
        tally.check(is_final=True)
    # An absent shard is one row, but may have held any number of samples.
    tally.add({**entry, "num_rows": 9 * CHECK_EVERY, "quarantined": {"tar_unreadable": 1}})
    tally.unreadable.append("s3://b/007.tar")
    assert tally.check()
    tally.unreadable.append("s3://b/008.tar")
    with pytest.raises(QuarantineError, match=r"2 of 20 shards can't be read \(10.0%.*first s3://b/007.tar"):
        tally.check(is_final=True)


def test_unreadable_shards_count_as_shards(tmp_path: Path, base: Path, ray_cluster: RayCluster) -> None:
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").write_bytes(tar_bytes([m for i in range(9) for m in sample_members(f"a{i}")]))
    (tmp_path / "tars" / "b.tar").symlink_to("/proc/self/mem")  # a file that can be opened, but gives an error
    with pytest.raises(QuarantineError, match=r"1 of 2 shards can't be read \(50.0%; at most 20.0% .*b.tar"):
        embed(a_config(tmp_path, base, max_quarantine_fraction=0.2))  # of 10 samples, one is bad
    report = embed(a_config(tmp_path, base, max_quarantine_fraction=0.5))
    assert report.outputs["quarantined"] == {"tar_unreadable": 1}
    assert not embed(a_config(tmp_path, base, max_quarantine_fraction=0.5)).reused  # it may be there by now


def test_finished_data_is_held_to_the_limit_and_to_its_files(
    tmp_path: Path, base: Path, ray_cluster: RayCluster
) -> None:
    write_tars(tmp_path)
    config = a_config(tmp_path, base, max_quarantine_fraction=1)
    folder = Path(embed(config).outputs["data"])
    with pytest.raises(QuarantineError, match="3 of 9 samples are bad"):
        embed(a_config(tmp_path, base))

    def content() -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}

    before = content()
    # A slice and a table of quarantine that lost their ends, and a manifest: what training refuses is made again.
    for damaged in (next(folder.glob("b-*.parquet")), next(folder.glob("quarantine/a-*.parquet"))):
        os.truncate(damaged, damaged.stat().st_size // 2)
    again = embed(config)
    assert (again.reused, again.outputs["slices"] - again.outputs["slices_reused"]) == (False, 2)
    assert content() == before
    os.truncate(folder / "manifest.json", 100)
    again = embed(config)
    assert (again.reused, again.samples) == (False, 0)
    assert embed(config).reused


def test_shards_whose_slices_would_have_the_same_names_are_refused(tmp_path: Path, base: Path) -> None:
    known: dict[str, int] = {}
    for number in itertools.count():
        first = known.setdefault(shard_name(f"{tmp_path}/{number}/s.tar"), number)
        if first != number:
            break
    for folder in (first, number):
        (tmp_path / f"{folder}").mkdir()
        (tmp_path / f"{folder}" / "s.tar").write_bytes(tar_bytes(sample_members("k")))
    shards = [f"{tmp_path}/{first}/s.tar", f"{tmp_path}/{number}/s.tar"]
    with pytest.raises(InputError, match=f"{shards[0]} and {shards[1]} .*rename one of them"):
        embed(a_config(tmp_path, base, input=shards))


def test_an_encoder_refuses_a_model_that_has_changed(tmp_path: Path, base: Path) -> None:
    fingerprint = read_manifest(base).fingerprints["vision"]
    model = shutil.copytree(base, tmp_path / "model")
    encoder = SliceEncoder(a_plan(tmp_path, model, "0" * 64))
    with pytest.raises(FingerprintError, match=f"vision is {fingerprint} .*{'0' * 64} when the job began"):
        encoder._load()
    SliceEncoder(a_plan(tmp_path, model, fingerprint))._load()


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
