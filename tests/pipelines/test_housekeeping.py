"""`gc` on real storages, local and S3: what it lists, what it deletes, and what it never touches."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from servers import free_port, mlflow_server, s3_server
from test_registry import NAME, road_by_hand, score, score_base, train_by_hand
from tiny_training import make_embedded

from jobs import cli
from nexusgen.errors import InputError
from nexusgen.model.weights import load_model
from pipelines import checkpoint, embedded, registry, storage, tracking
from pipelines.embed import EmbedConfig, embed
from pipelines.housekeeping import Found, delete_garbage, find_garbage
from pipelines.pack import PackConfig, pack
from pipelines.promote import PromoteConfig, promote
from pipelines.register import RegisterConfig, register

DAY_S = 86400.0


def kinds(found: list[Found]) -> list[tuple[str, str]]:
    return [(one.kind, storage.name_of(one.uri)) for one in found]


def later(found_at: str, days: float = 2.0, older_than_s: float = DAY_S) -> list[Found]:
    """What would be found in some days, if nothing was written until then."""
    return find_garbage(found_at, older_than_s, now_s=time.time() + days * DAY_S)


def two_versions(uri: str, base: Path) -> tuple[str, str]:
    """Version 1, trained on the base, and version 2, with an editing decoder trained on version 1, as the champion.

    Gives their fingerprints.
    """
    make_embedded(uri, NAME, base, num_samples=12)
    inputs = [
        checkpoint.DataInput(name=f"{NAME}/{mode}", uri="/e", digest="d", run_id="r")
        for mode in ("vision", "latents", "predicted")
    ]
    for stage in ("ar", "generation_decoder"):
        train_by_hand(uri, base, stage, inputs[:2], 0.1)
    first = register(RegisterConfig(storage=uri, name=NAME, model=str(base))).outputs
    drawing = registry.resolve_model("models:/nexusgen/1", uri)
    train_by_hand(uri, drawing, "editing_decoder", inputs, 0.0)
    config = RegisterConfig(
        storage=uri,
        name=NAME,
        model="models:/nexusgen/1",
        ar=None,
        generation_decoder=None,
        editing_decoder="latest",
    )
    second = register(config).outputs
    score_base(uri, base)
    score(uri, second["fingerprint"], 0.9)
    promote(PromoteConfig(storage=uri, version=2))
    return first["fingerprint"], second["fingerprint"]


def leave_garbage(uri: str) -> None:
    """What killed and abandoned jobs leave behind."""
    folder = storage.join(uri, "embedded", NAME, "vision")
    for name, content in (
        ("gone-0123abcd-00000.parquet", b"rows" * 100),
        ("_manifest/gone-0123abcd-00000.json", b"{}"),
        ("quarantine/gone-0123abcd-00000.parquet", b"row"),
    ):
        storage.write_bytes_atomic(storage.join(folder, name), content)
    begun = storage.join(uri, "embedded", "abandoned", "latents")
    storage.write_bytes_atomic(storage.join(begun, "x-0123abcd-00000.parquet"), b"rows" * 50)
    stage = checkpoint.stage_folder(uri, NAME, "ar")
    storage.write_bytes_atomic(storage.join(stage, "step-000003", "__0_0.distcp"), b"part" * 10)
    meta = json.loads(storage.read_bytes(storage.join(stage, "step-000005", "meta.json")))
    for step, run_id in ((4, "another"), (9, meta["run_id"]), (2, meta["run_id"])):
        place = storage.join(stage, f"step-{step:06d}")
        storage.write_json(storage.join(place, "meta.json"), meta | {"step": step, "run_id": run_id})
    storage.write_bytes_atomic(storage.join(uri, "models", "0123456789abcdef", "part.safetensors"), b"half")


GARBAGE = [
    ("checkpoint", "step-000003"),  # without meta.json
    ("checkpoint", "step-000004"),  # of another run
    ("checkpoint", "step-000009"),  # of later steps; step 2 is of the same run, and stays
    ("data", "latents"),
    ("half-written", "0123456789abcdef"),
    ("slice", "gone-0123abcd-00000.parquet"),
]


def check_the_champion(uri: str, base: Path, fingerprints: tuple[str, str]) -> None:
    """All that the champion was made of can be used."""
    first, second = fingerprints
    assert load_model(registry.resolve_model("models:/nexusgen@champion", uri)).manifest.fingerprint == second
    assert load_model(registry.resolve_model("models:/nexusgen/1", uri)).manifest.fingerprint == first
    for stage in ("ar", "generation_decoder", "editing_decoder"):
        found = checkpoint.latest(checkpoint.stage_folder(uri, NAME, stage))
        assert found is not None
        assert checkpoint._stored_tensors(found.uri)
    for mode in ("vision", "latents", "predicted"):
        slices = embedded.list_slices(uri, NAME, mode)  # type: ignore[arg-type]
        assert sum(embedded.read_slice(info).num_rows for info in slices) == 12


@pytest.mark.usefixtures("no_server")
def test_garbage_goes_and_nothing_that_the_champion_needs(tmp_path: Path, base: Path) -> None:
    uri = str(tmp_path / "storage")
    fingerprints = two_versions(uri, base)
    assert later(uri) == []  # version 1 has no alias, but version 2 was trained on it
    leave_garbage(uri)
    vision, stage = tmp_path / "storage/embedded/shapes/vision", tmp_path / "storage/checkpoints/shapes/ar"
    (vision / ".x.parquet.tmp-0123456789ab").write_bytes(b"half")
    (stage / ".step-000007-abc").mkdir()
    (stage / ".step-000007-abc" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "storage/models/.assembling-x").mkdir()
    (tmp_path / "storage/models/.assembling-x/ar.safetensors").write_bytes(b"half")
    assert find_garbage(uri, DAY_S) == []  # all of it is young

    found = later(uri)
    extra = [("half-written", name) for name in (".step-000007-abc", ".x.parquet.tmp-0123456789ab", ".assembling-x")]
    assert sorted(kinds(found)) == sorted(GARBAGE + extra)
    orphan = next(one for one in found if one.kind == "slice")
    assert (len(orphan.files), orphan.num_bytes) == (3, 405)
    before = {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    freed = delete_garbage(uri, found)
    after = {path for path in tmp_path.rglob("*") if path.is_file()}
    gone = {str(path) for path in before.keys() - after}
    assert gone == {file for one in found for file in one.files}
    assert freed == sum(size for path, size in before.items() if str(path) in gone)
    assert not (stage / ".step-000007-abc").exists()
    assert (stage / "step-000002/meta.json").exists()
    assert later(uri) == []
    check_the_champion(uri, base, fingerprints)


@pytest.mark.usefixtures("no_server")
def test_models_without_an_alias_go_with_their_versions(tmp_path: Path, base: Path) -> None:
    uri = str(tmp_path)
    numbers = []
    for shift in (0.1, 0.2, 0.3, 0.4):
        road_by_hand(uri, base, shift)
        numbers.append(register(RegisterConfig(storage=uri, name=NAME, model=str(base))).outputs["fingerprint"])
    score_base(uri, base)
    for number, fingerprint in ((2, numbers[1]), (3, numbers[2])):
        score(uri, fingerprint, 0.9)
        promote(PromoteConfig(storage=uri, version=number))
    with tracking.job_run(uri, NAME, "evaluate", "model: models:/nexusgen/4\n") as run:
        while "model" not in tracking.connect(uri).get_run(run.run_id).data.params:
            time.sleep(0.1)  # delivered by a thread
        found = later(uri)
        assert [(one.kind, one.reason) for one in found] == [
            ("model", "version 1 has no alias")
        ]  # 4 is being evaluated
    found = later(uri)
    assert sorted(one.versions for one in found) == [("1",), ("4",)]  # 2 is what a rollback returns to

    client = MlflowClient(tracking_uri=f"sqlite:///{uri}/mlflow.db", registry_uri=f"sqlite:///{uri}/mlflow.db")
    client.set_registered_model_alias("nexusgen", "candidate", "4")  # since it was listed
    delete_garbage(uri, found)
    left = sorted(int(version.version) for version in client.search_model_versions("name = 'nexusgen'"))
    assert left == [2, 3, 4]
    assert {path.name for path in (tmp_path / "models").iterdir()} == set(numbers[1:])
    promote(PromoteConfig(storage=uri, rollback=True))
    assert load_model(registry.resolve_model("models:/nexusgen@champion", uri)).manifest.fingerprint == numbers[1]


@pytest.mark.usefixtures("no_server")
def test_what_a_stopped_training_goes_on_from_stays(tmp_path: Path, base: Path) -> None:
    uri = str(tmp_path)
    road_by_hand(uri, base)
    fingerprint = register(RegisterConfig(storage=uri, name=NAME, model=str(base))).outputs["fingerprint"]
    assert kinds(later(uri)) == [("model", fingerprint)]
    listed = later(uri)
    version = registry.resolve_model("models:/nexusgen/1", uri)
    train_by_hand(uri, version, "editing_decoder", [], 0.0)  # its run has ended, and no alias leads to the version
    assert later(uri) == []
    assert delete_garbage(uri, listed) == 0  # begun since it was listed
    stage = Path(checkpoint.stage_folder(uri, NAME, "editing_decoder"))
    (stage / "latest.json").rename(stage / "best.json")
    assert later(uri) == []
    assert load_model(registry.resolve_model("models:/nexusgen/1", uri)).manifest.fingerprint == fingerprint
    checkpoint.forget(str(stage))
    assert ("model", fingerprint) in kinds(later(uri))


@pytest.mark.usefixtures("no_server")
def test_an_imported_base_stays(tmp_path: Path, base: Path) -> None:
    uri = str(tmp_path)
    shutil.copytree(base, tmp_path / "models" / "imported")
    assert later(uri) == []
    road_by_hand(uri, tmp_path / "models" / "imported")
    register(RegisterConfig(storage=uri, name=NAME, model=str(tmp_path / "models" / "imported")))
    assert "imported" not in [name for _, name in kinds(later(uri))]


@pytest.mark.usefixtures("no_server")
def test_what_somebody_works_at_is_left_alone(tmp_path: Path, base: Path) -> None:
    uri = str(tmp_path)
    two_versions(uri, base)
    leave_garbage(uri)
    old = time.time() - 3 * DAY_S
    for path in tmp_path.rglob("*"):
        os.utime(path, (old, old))
    assert {one.kind for one in find_garbage(uri, DAY_S)} == {"checkpoint", "data", "half-written", "slice"}
    for place in ("embedded/shapes/vision/x-0123abcd-00001.parquet", "checkpoints/shapes/ar/progress.json"):
        (tmp_path / place).write_bytes(b"{}")  # jobs under way write
    assert {one.kind for one in find_garbage(uri, DAY_S)} == {"data", "half-written"}


@pytest.mark.parametrize("registry_at_hand", ["missing", "empty", "another"])
def test_a_registry_that_knows_no_model_deletes_nothing(
    registry_at_hand: str,
    tmp_path: Path,
    no_server: None,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri = str(tmp_path / "storage")
    road_by_hand(uri, base)
    fingerprint = register(RegisterConfig(storage=uri, name=NAME, model=str(base))).outputs["fingerprint"]
    elsewhere = f"sqlite:///{tmp_path}/elsewhere.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", elsewhere)
    if registry_at_hand != "missing":
        client = tracking.connect(uri)
    if registry_at_hand == "another":
        client.create_registered_model(registry.MODEL_NAME)
        run = client.create_run("0")
        tags = {tracking.TAG_FINGERPRINT: "f" * 16}
        client.create_model_version(registry.MODEL_NAME, str(tmp_path), run.info.run_id, tags)
    before = storage.list_stats(uri)
    held = "1 versions of nexusgen, of other models" if registry_at_hand == "another" else "no version of nexusgen"
    message = (
        rf"models holds 1 models, first {fingerprint}, but the registry {elsewhere} holds {held}.*nothing was dele"
    )
    with pytest.raises(InputError, match=message):
        later(uri)
    assert cli.main(["gc", "--storage", uri, "--older-than", "0m"]) == 1
    assert "set MLFLOW_TRACKING_URI to where they were registered" in capsys.readouterr().err
    assert storage.list_stats(uri) == before
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert kinds(later(uri)) == [("model", fingerprint)]


@pytest.mark.timeout(900)
def test_an_embed_job_that_was_stopped_goes_on_after_gc(
    tmp_path: Path, base: Path, no_server: None, ray_cluster: Any
) -> None:
    uri = str(tmp_path / "storage")
    pack(PackConfig(storage=uri, name=NAME, counts={"generation": 9}, samples_per_shard=3))
    tars = sorted(storage.list_files(f"{uri}/tars/{NAME}"))
    shards = [tar for tar in tars if tar.endswith(".tar")]
    config = EmbedConfig(storage=uri, name=NAME, input=shards[:2], mode="latents", model=str(base))
    assert embed(config).outputs["slices_reused"] == 0
    folder = tmp_path / "storage/embedded/shapes/latents"
    (folder / "manifest.json").unlink()  # the next one had begun with a shard more, and was killed
    (folder / ".x.parquet.tmp-0123456789ab").write_bytes(b"half")
    found = later(uri)
    assert kinds(found) == [("half-written", ".x.parquet.tmp-0123456789ab")]
    delete_garbage(uri, found)
    again = embed(config.model_copy(update={"input": shards}))
    assert (again.outputs["slices"], again.outputs["slices_reused"]) == (3, 2)


def test_data_that_a_training_has_read_stays(tmp_path: Path, base: Path, no_server: None) -> None:
    uri = str(tmp_path)
    make_embedded(uri, NAME, base, num_samples=6)
    modes = ("vision", "latents", "predicted")
    read = [checkpoint.DataInput(name=f"{NAME}/{mode}", uri="/e", digest="d", run_id="r") for mode in modes]
    train_by_hand(uri, base, "ar", read[:1], 0.0)
    begun = storage.join(checkpoint.stage_folder(uri, NAME, "generation_decoder"), "run.json")
    storage.write_json(begun, {"run_id": "r", "inputs": [read[1].model_dump()]})
    for mode in modes:
        (tmp_path / "embedded" / NAME / mode / "manifest.json").unlink()
    found = later(uri)
    assert kinds(found) == [("data", "predicted")]
    entry = tmp_path / "embedded" / NAME / "predicted" / embedded.ENTRIES_FOLDER / "shard-00000000-00000.json"
    storage.write_json(str(entry), {})
    assert (later(uri), delete_garbage(uri, found)) == ([], 0)  # somebody has gone on since it was listed


def test_a_damaged_manifest_deletes_nothing(tmp_path: Path, no_server: None, base: Path) -> None:
    make_embedded(str(tmp_path), "n", base, num_samples=6)
    (tmp_path / "embedded/n/vision/manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"vision/manifest.json can't be read .* embed it again"):
        later(str(tmp_path))


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A storage on S3, with a tracking server."""
    s3_port, mlflow_port = free_port(), free_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mlflow_port}",
    }.items():
        monkeypatch.setenv(name, value)
    with s3_server(tmp_path, s3_port, "bucket"), mlflow_server(tmp_path, mlflow_port):
        yield "s3://bucket/storage"


@pytest.mark.timeout(900)  # two servers and two registrations
def test_the_same_on_s3(s3: str, base: Path) -> None:
    fingerprints = two_versions(s3, base)
    leave_garbage(s3)
    assert find_garbage(s3, DAY_S) == []
    found = later(s3)
    assert sorted(kinds(found)) == sorted(GARBAGE)
    before = storage.list_stats(s3)
    delete_garbage(s3, found)
    assert before.keys() - storage.list_stats(s3).keys() == {file for one in found for file in one.files}
    assert later(s3) == []
    check_the_champion(s3, base, fingerprints)


# --- the command ---


@pytest.mark.usefixtures("no_server")
def test_the_command_lists_then_deletes(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = str(tmp_path / "storage")
    make_embedded(uri, NAME, base, num_samples=6)
    orphan = tmp_path / "storage/embedded/shapes/vision/gone-0123abcd-00000.parquet"
    orphan.write_bytes(b"rows")
    old = time.time() - 2 * DAY_S
    for path in tmp_path.rglob("*"):
        os.utime(path, (old, old))

    def gc(*options: str) -> dict[str, Any]:
        assert cli.main(["gc", "--storage", uri, *options, "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    assert gc("--older-than", "3d", "--dry-run")["found"] == []
    listed = gc("--dry-run")
    assert [(one["kind"], one["bytes"]) for one in listed["found"]] == [("slice", 4)]
    assert (listed["freed"], orphan.exists()) == (0, True)
    assert (gc()["freed"], orphan.exists()) == (4, False)
    assert cli.main(["gc", "--storage", uri]) == 0
    assert "nothing that nobody needs" in capsys.readouterr().out


@pytest.mark.parametrize("age", ["24", "h", "-3h", "2w", ""])
def test_a_wrong_age_is_refused(age: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gc", f"--older-than={age}", "--dry-run"]) == 2
    assert f"--older-than {age}: wanted a number of minutes, hours or days" in capsys.readouterr().err


def test_no_such_storage(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"storage=.*/none: there is no such folder.*correct --storage"):
        find_garbage(str(tmp_path / "none"), DAY_S)
