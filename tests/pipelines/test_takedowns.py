from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from test_embed import a_config, keys_of, shape_of, write_tars

from nexusgen.errors import InputError
from pipelines import embedded, takedowns
from pipelines.embed import embed
from pipelines.runtime import RayCluster
from pipelines.slices import shard_name

pytestmark = pytest.mark.usefixtures("no_server")


def test_dropped_samples_leave_every_mode_for_good_and_nothing_else_changes(
    tmp_path: Path,
    base: Path,
    ray_cluster: RayCluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
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
    assert report.outputs["keys_unmatched"] == 1
    assert "1 of 3 keys to drop match no sample of this data: nobody\n" in capsys.readouterr().err
    assert keys_of(tmp_path, "vision") == ["a0", "a2", "b0", "b2"]
    # Only the slices that held them were written anew, and what is left in these kept every bit.
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert sum(after.get(name) != time for name, time in times.items()) == 2
    assert rows_of("vision") == {key: row for key, row in before["vision"].items() if key not in ("a3", "b1")}
    lost = pq.read_table(folder / "quarantine")
    assert {row["key"] for row in lost.to_pylist() if row["reason_code"] == "taken_down"} == {"a3", "b1"}
    recorded = json.loads((tmp_path / "storage/embedded/n" / takedowns.RECORD_NAME).read_text("utf-8"))
    assert sorted(recorded) == ["a3", "b1", "nobody"]

    # The other mode follows without being told again, and so does data that is read from the tars once more.
    run("latents")
    assert shape_of(tmp_path, "latents") == shape_of(tmp_path, "vision")
    for path in (folder / "_manifest").glob(f"{shard_name(f'{tmp_path}/tars/b.tar')}*"):
        path.unlink()
    again = run("vision")
    assert (again.outputs["slices_reused"], again.outputs["slices_rewritten"]) == (4, 0)
    assert rows_of("vision") == {key: row for key, row in before["vision"].items() if key not in ("a3", "b1")}
    # As long as no key is new, no slice is looked at; that one is misspelt is said again.
    num_read = 0
    read_slice = embedded.read_slice

    def count(*arguments: Any) -> Any:
        nonlocal num_read
        num_read += 1
        return read_slice(*arguments)

    monkeypatch.setattr(embedded, "read_slice", count)
    last = run("vision")
    assert (last.reused, last.outputs["keys_unmatched"], num_read) == (True, 1, 0)
    takedowns.rewrite(str(folder), frozenset({"nobody else"}))
    assert num_read == 4  # those with rows


def test_a_takedown_outlives_damage_and_a_sudden_end(tmp_path: Path, base: Path, ray_cluster: RayCluster) -> None:
    write_tars(tmp_path)

    def run(**values: Any) -> Any:
        return embed(a_config(tmp_path, base, max_quarantine_fraction=0.5, **values))

    folder = Path(run().outputs["data"])
    # A slice, and what another has in quarantine, have lost their ends: both are made again from the tars.
    b = shard_name(f"{tmp_path}/tars/b.tar")
    for damaged in (folder / f"{b}-00001.parquet", next(folder.glob("quarantine/a-*-00000.parquet"))):
        os.truncate(damaged, damaged.stat().st_size // 2)
    (tmp_path / "keys.txt").write_text("a0\nb1\n")
    report = run(drop_keys=f"{tmp_path}/keys.txt")
    assert (report.outputs["slices_rewritten"], report.outputs["slices_reused"]) == (1, 4)
    assert report.outputs["quarantined"]["taken_down"] == 2
    assert keys_of(tmp_path, "vision") == ["a2", "a3", "b0", "b2"]
    assert run().reused

    # As if the job ended between rewriting and entering: no manifest tells what isn't so.
    (tmp_path / "keys.txt").write_text("b2\n")
    takedowns.rewrite(str(folder), takedowns.record(f"{tmp_path}/storage", "n", f"{tmp_path}/keys.txt"))
    with pytest.raises(InputError, match="hasn't finished"):
        embedded.read_manifest(f"{tmp_path}/storage", "n", "vision")
    assert not run().reused
    assert keys_of(tmp_path, "vision") == ["a2", "a3", "b0"]


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
