from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_embed import a_config, keys_of, write_tars
from tiny_training import make_tiny_model

from nexusgen.errors import InputError
from pipelines import embedded, takedowns
from pipelines.embed import embed
from pipelines.runtime import RayCluster
from pipelines.slices import shard_name


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def test_dropped_samples_leave_every_mode_for_good_and_nothing_else_changes(
    tmp_path: Path, base: Path, ray_cluster: RayCluster
) -> None:
    write_tars(tmp_path)
    storage_uri = f"{tmp_path}/storage"

    def run(mode: str, **values: Any) -> Any:
        return embed(a_config(tmp_path, base, mode, max_quarantine_fraction=0.4, **values))

    def rows_of(mode: Any) -> dict[str, dict[str, Any]]:
        slices = embedded.list_slices(storage_uri, "n", mode)
        return {row["key"]: row for info in slices for row in embedded.read_slice(info).to_pylist()}

    run("vision")
    run("latents")
    before = {mode: rows_of(mode) for mode in ("vision", "latents")}
    folder = Path(embedded.folder_of(storage_uri, "n", "vision"))
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    (tmp_path / "keys.txt").write_text("# asked for by their author\nb1\n\nnobody\na3\n", encoding="utf-8")

    report = run("vision", drop_keys=f"{tmp_path}/keys.txt")
    assert (report.outputs["slices_rewritten"], report.samples) == (2, 0)
    assert report.outputs["quarantined"]["taken_down"] == 2
    assert keys_of(tmp_path, "vision") == ["a0", "a2", "b0", "b2"]
    # Only the slices that held them were written anew, and what is left in these kept every bit.
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert sum(after.get(name) != time for name, time in times.items()) == 2
    assert rows_of("vision") == {key: row for key, row in before["vision"].items() if key not in ("a3", "b1")}
    lost = embedded.read_quarantine(storage_uri, "n", "vision")
    assert lost is not None
    assert {row["key"] for row in lost.to_pylist() if row["reason_code"] == "taken_down"} == {"a3", "b1"}
    recorded = json.loads((tmp_path / "storage/embedded/n" / takedowns.RECORD_NAME).read_text("utf-8"))
    assert sorted(recorded) == ["a3", "b1", "nobody"]

    # The other mode follows without being told again, and so does data that is read from the tars once more.
    run("latents")
    embedded.check_modes_agree(storage_uri, "n", ["vision", "latents"])
    for path in (folder / "_manifest").glob(f"{shard_name(f'{tmp_path}/tars/b.tar')}*"):
        path.unlink()
    again = run("vision")
    assert (again.outputs["slices_reused"], again.outputs["slices_rewritten"]) == (3, 0)
    assert rows_of("vision") == {key: row for key, row in before["vision"].items() if key not in ("a3", "b1")}
    assert run("vision").reused


def test_a_list_of_keys_must_be_readable(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        takedowns.record(str(tmp_path), "n", f"{tmp_path}/none.txt")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(InputError, match="names no key"):
        takedowns.record(str(tmp_path), "n", f"{tmp_path}/empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="UTF-8"):
        takedowns.record(str(tmp_path), "n", f"{tmp_path}/latin.txt")
    record = tmp_path / "embedded" / "n" / takedowns.RECORD_NAME
    record.parent.mkdir(parents=True)
    record.write_text("{")
    with pytest.raises(InputError, match="record of dropped keys"):
        takedowns.record(str(tmp_path), "n", None)
