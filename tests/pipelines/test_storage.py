from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from servers import free_port, s3_server

from nexusgen.errors import InputError, ResourceError
from pipelines import storage
from pipelines.shards import ShardReader, list_shards


def test_write_makes_folders_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    uri = storage.join(str(tmp_path), "a", "b/c.bin")
    storage.write_bytes_atomic(uri, b"one")
    storage.write_bytes_atomic(uri, pa.py_buffer(b"two"))
    assert storage.read_bytes(uri) == b"two"
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["c.bin"]
    assert storage.stat(uri).size == 3


def test_failed_write_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResourceError, match=f"cannot write {tmp_path}/file/x"):
        storage.write_bytes_atomic(f"{tmp_path}/file/x", b"")
    with pytest.raises(ResourceError):
        storage.check_writable(f"{tmp_path}/file/x")
    storage.check_writable(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_listing_is_sorted_and_hides_temporary_files(tmp_path: Path) -> None:
    for name in ("b.x", "a.x", ".c.x.tmp-123", "deep/d.x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert storage.list_files(str(tmp_path)) == [f"{tmp_path}/a.x", f"{tmp_path}/b.x"]
    assert f"{tmp_path}/deep/d.x" in storage.list_files(str(tmp_path), recursive=True)
    assert storage.list_files(f"{tmp_path}/none") == []


def test_exists_folder_and_delete(tmp_path: Path) -> None:
    uri = f"{tmp_path}/f"
    assert not storage.exists(uri)
    storage.write_bytes_atomic(uri, b"x")
    assert storage.exists(uri)
    assert not storage.is_folder(uri)
    assert storage.is_folder(str(tmp_path))
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_missing_things_are_input_errors(tmp_path: Path) -> None:
    for call in (storage.read_bytes, storage.stat, storage.fetch_folder, storage.open_random):
        with pytest.raises(InputError, match="none"):
            call(f"{tmp_path}/none")
    with pytest.raises(InputError, match="expected a path"):
        storage.open_filesystem("ftp7://host/x")


def test_folders_are_uploaded_whole_and_fetched_in_place(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "part").mkdir(parents=True)
    (source / "part" / "w").write_bytes(b"1")
    target = f"{tmp_path}/out/model"
    storage.upload_folder(source, target)
    (source / "part" / "w").write_bytes(b"2")
    storage.upload_folder(source, target)
    assert (storage.fetch_folder(target) / "part" / "w").read_bytes() == b"2"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    with pytest.MonkeyPatch.context() as patch, s3_server(tmp_path_factory.mktemp("s3"), port, "bucket"):
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        yield "s3://bucket"


def test_s3_is_read_and_written_like_a_folder(bucket: str, tmp_path: Path) -> None:
    uri = storage.join(bucket, "a", "b.bin")
    assert not storage.exists(uri)
    storage.write_bytes_atomic(uri, b"data")
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b"data"
    assert storage.stat(uri).size == 4
    assert storage.list_files(storage.join(bucket, "a")) == [uri]
    storage.delete(uri)
    assert storage.list_files(storage.join(bucket, "a")) == []
    (tmp_path / "model" / "part").mkdir(parents=True)
    (tmp_path / "model" / "part" / "w").write_bytes(b"1")
    storage.upload_folder(tmp_path / "model", storage.join(bucket, "model"))
    fetched = storage.fetch_folder(storage.join(bucket, "model"), tmp_path / "cache")
    assert (fetched / "part" / "w").read_bytes() == b"1"
    with pytest.raises(InputError):
        storage.read_bytes(storage.join(bucket, "none"))


def test_shards_on_s3_are_listed_and_read(bucket: str) -> None:
    names = [storage.join(bucket, "tars", f"s-{number:03d}.tar") for number in range(3)]
    for name in names:
        storage.write_bytes_atomic(name, b"no tar")
    assert list_shards(storage.join(bucket, "tars")) == names
    assert list_shards(storage.join(bucket, "tars", "s-00[12].tar")) == names[1:]
    assert list_shards(storage.join(bucket, "tars", "s-{000..002}.tar")) == names
    (row,) = ShardReader(names[0])
    assert row.shard == names[0]
    (row,) = ShardReader(storage.join(bucket, "tars", "none.tar"))
    assert getattr(row, "reason_code", "") == "tar_unreadable"


def test_a_folder_that_another_process_has_put_in_place_stays(tmp_path: Path) -> None:
    for name in ("ours", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w").write_text(name)
    storage.put_in_place(tmp_path / "ours", tmp_path / "target")
    assert (tmp_path / "target" / "w").read_text() == "target"
    storage.put_in_place(tmp_path / "ours", tmp_path / "new")
    assert (tmp_path / "new" / "w").read_text() == "ours"
    with pytest.raises(FileNotFoundError):
        storage.put_in_place(tmp_path / "ours", tmp_path / "again")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "more").write_text("")
    with pytest.raises(ResourceError, match="lacks more; remove it"):
        storage.put_in_place(tmp_path / "ours", tmp_path / "new")
