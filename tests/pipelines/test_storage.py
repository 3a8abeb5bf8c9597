from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import free_port, s3_server

from benchmarks.faulty_s3 import FAULTS, FaultyS3, faulty_s3
from nexusgen.errors import InputError, ModelError, ResourceError
from pipelines import registry, storage
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
    for name in ("b.x", "a.x", ".c.x.tmp-0123456789ab", "x.tmp-1", "deep/d.x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b.x").write_bytes(b"123")
    assert storage.list_files(str(tmp_path)) == [f"{tmp_path}/{name}" for name in ("a.x", "b.x", "x.tmp-1")]
    assert storage.list_sizes(str(tmp_path))[f"{tmp_path}/b.x"] == 3
    assert f"{tmp_path}/deep/d.x" in storage.list_files(str(tmp_path), recursive=True)
    assert storage.list_files(f"{tmp_path}/none") == []


def test_old_temporary_files_are_removed(tmp_path: Path) -> None:
    names = [".c.x.tmp-0123456789ab", ".d.x.tmp-0123456789ab", "c.x", "x.tmp-0123456789ab"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, ns=(1000, 3000 if name.startswith(".d") else 1000))
    storage.remove_temporary(str(tmp_path), before_ns=2000)
    assert sorted(path.name for path in tmp_path.iterdir()) == names[1:]
    storage.remove_temporary(f"{tmp_path}/none", before_ns=2000)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    fsync = os.fsync

    def watch(file: int) -> None:
        fsync(file)
        found.append((os.fstat(file).st_size, (tmp_path / "a").exists()))

    monkeypatch.setattr(os, "fsync", watch)
    storage.write_bytes_atomic(f"{tmp_path}/a", b"data")
    assert found == [(4, False)]
    assert (tmp_path / "a").read_bytes() == b"data"


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
    with pytest.raises(InputError):
        storage.read_bytes(storage.join(bucket, "none"))


def test_a_model_on_s3_is_fetched_once_until_it_changes(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    uri = storage.join(bucket, "model")
    (tmp_path / "model" / "part").mkdir(parents=True)

    def upload(content: bytes) -> None:
        for name in ("part/w", "nexusgen.json"):
            (tmp_path / "model" / name).write_bytes(content)
        storage.upload_folder(tmp_path / "model", uri)

    upload(b"1")
    first = storage.fetch_folder(uri)
    assert (first / "part" / "w").read_bytes() == b"1"
    assert first.parent.name.endswith(f"-{os.getuid()}")
    assert storage.fetch_folder(uri) == first
    upload(b"2")
    second = storage.fetch_folder(uri)
    assert [(folder / "part" / "w").read_bytes() for folder in (first, second)] == [b"1", b"2"]
    storage.delete(storage.join(uri, "nexusgen.json"))
    with pytest.raises(InputError, match=r"cannot read .*/model/nexusgen.json"):
        storage.fetch_folder(uri)
    # What keeps the copy from being begun is told like what keeps it from being finished.
    upload(b"3")
    monkeypatch.setattr(tempfile, "tempdir", f"{first}/part/w")
    with pytest.raises(ResourceError, match="check rights and space there"):
        storage.fetch_folder(uri)


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


# ---- a store that fails ---------------------------------------------------------------------------------------------


@pytest.fixture
def faulty(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """The same S3 behind a proxy whose share of failing requests a test sets; patience is short, silence longer."""
    monkeypatch.setattr(storage, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(storage, "REQUEST_ATTEMPTS", 1)  # all that is repeated is repeated by us
    monkeypatch.setattr(storage, "REQUEST_TIMEOUT_S", 1.0)
    target_port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    with faulty_s3(FaultyS3(target_port, 0.0, silence_s=5.0)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_on_s3_is_tried_again(
    fault: str, bucket: str, faulty: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = storage.join(bucket, f"faulty-{fault.replace(' ', '-')}")
    uri, parquet, up = (storage.join(folder, name) for name in ("a.bin", "t.parquet", "up"))
    data = os.urandom(100_000)
    table = pa.table({"x": list(range(1000))})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "b.bin").write_bytes(data)
    (tmp_path / "source" / "nexusgen.json").write_bytes(b"{}")
    (tmp_path / "source" / "empty").write_bytes(b"")

    def read_table() -> pa.Table:
        with storage.open_random(parquet) as file:
            return pq.read_table(file)

    def delete() -> bool:
        storage.delete(uri)
        return storage.exists(uri)

    # What is done, what it gives, and the requests of it that fail.
    operations: list[tuple[Callable[[], Any], Any, str]] = [
        (lambda: storage.write_bytes_atomic(uri, data), None, "PUT"),
        (lambda: storage.write_bytes_atomic(parquet, sink.getvalue()), None, "PUT"),
        (lambda: storage.upload_folder(tmp_path / "source", up), None, "PUT"),
        (lambda: storage.read_bytes(uri), data, "HEAD GET"),
        (read_table, table, "GET"),
        (lambda: storage.stat(uri).size, len(data), "HEAD"),
        (lambda: storage.list_files(up), [f"{up}/{name}" for name in ("b.bin", "empty", "nexusgen.json")], "GET"),
        (lambda: (storage.fetch_folder(up) / "b.bin").read_bytes(), data, "GET"),
        (delete, False, "DELETE"),
    ]
    if fault == "silence":
        operations = [operations[0], operations[3]]  # each takes seconds
    for operation, wanted, methods in operations:
        failing = [(fault, method) for method in methods.split() if method == "GET" or not fault.startswith("cut")]
        before = faulty.counts[fault]
        faulty.fail_next(*failing)
        assert operation() == wanted
        assert faulty.counts[fault] - before == len(failing)


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_an_upload_in_parts_is_begun_again(method: str, bucket: str, faulty: FaultyS3) -> None:
    uri = storage.join(bucket, "parts", f"{method}.bin")
    data = os.urandom(24 << 20)
    for fault in ("500", "reset after"):  # the second of two POSTs completes the upload: its answer gets lost
        faulty.fail_next((fault, method))
        storage.write_bytes_atomic(uri, data)
        assert storage.read_bytes(uri) == data
    answers = iter([None, "reset after"])
    if method == "POST":
        faulty.fail_next()
        faulty.draw = lambda of: next(answers, None) if of == "POST" else None  # type: ignore[method-assign]
        storage.write_bytes_atomic(uri, data[::-1])
        assert storage.read_bytes(uri) == data[::-1]


def test_a_stream_goes_on_where_it_broke_off(bucket: str, faulty: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = storage.join(bucket, "stream.bin")
    data = os.urandom(1_000_000)
    storage.write_bytes_atomic(uri, data)
    monkeypatch.setattr(storage, "READ_BUFFER_BYTES", 64 << 10)
    faulty.share = 0.5
    faulty.faults = ("500", "reset", "cut", "cut unannounced")
    for seed in range(3):
        faulty.seed(seed)
        with storage.open_input(uri) as stream:
            chunks = iter(lambda: stream.read(50_000), b"")
            assert b"".join(chunks) == data
    assert faulty.counts["cut"] > 2
    assert faulty.counts["cut unannounced"] > 2


def test_a_read_after_the_end_is_empty_and_places_count_from_anywhere(bucket: str) -> None:
    uri = storage.join(bucket, "places.bin")
    storage.write_bytes_atomic(uri, bytes(range(100)))
    with storage.open_random(uri) as file:
        assert file.size() == 100
        file.seek(-10, 2)
        assert file.read(5) == bytes(range(90, 95))
        assert file.read() == bytes(range(95, 100))
        assert file.read(1) == b""


def test_an_outage_ends_with_its_account(bucket: str, faulty: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = storage.join(bucket, "outage.bin")
    storage.write_bytes_atomic(uri, b"data")
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 3)
    faulty.share, faulty.faults = 1.0, ("503",)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("read", lambda: storage.read_bytes(uri)),
        ("read", lambda: storage.open_random(uri)),
        ("write", lambda: storage.write_bytes_atomic(uri, b"new")),
        ("list", lambda: storage.list_files(uri)),
        ("delete", lambda: storage.delete(uri)),
        ("reach", lambda: storage.exists(uri)),
    ]
    for what, call in calls:
        before = faulty.num_faults
        message = rf"cannot {what} {uri}: .*(503|SLOW_DOWN).*after 3 attempts in \d+\.\d s"
        with pytest.raises(ResourceError, match=message):
            call()
        assert faulty.num_faults - before == 3
    # A shard isn't taken for damaged where the store fails.
    with pytest.raises(ResourceError, match="after 3 attempts"):
        list(ShardReader(uri))
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 1000)
    monkeypatch.setattr(storage, "RETRY_BUDGET_S", 0.2)
    with pytest.raises(ResourceError, match=r"gave up after \d+ attempts in 0\.\d s"):
        storage.read_bytes(uri)
    faulty.share = 0.0
    assert storage.read_bytes(uri) == b"data"


def test_what_does_not_pass_is_not_tried_again(bucket: str, faulty: FaultyS3) -> None:
    with pytest.raises(InputError, match="none"):
        storage.read_bytes(storage.join(bucket, "none"))
    with pytest.raises(ResourceError, match="NO_SUCH_BUCKET"):
        storage.write_bytes_atomic("s3://no-such-bucket/x", b"")
    assert faulty.counts["HEAD"] + faulty.counts["PUT"] <= 3
    for uri in ("s3://", "s3://key:secret@bucket/x"):
        with pytest.raises(InputError, match="no bucket is named, or credentials"):
            storage.exists(uri)


# ---- folders fetched in ranges --------------------------------------------------------------------------------------

FETCH = """
import logging, sys, tempfile
from pipelines import storage
logging.basicConfig(level=logging.INFO)
tempfile.tempdir, storage.RANGE_BYTES, storage.READ_BUFFER_BYTES = sys.argv[2], 1 << 20, 1 << 18
print(storage.fetch_folder(sys.argv[1]))
"""


@pytest.fixture
def large(bucket: str, faulty: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A folder on S3 whose weights are some ranges long, and its files; copies lie in `tmp_path / cache`."""
    monkeypatch.setattr(storage, "RANGE_BYTES", 1 << 20)
    monkeypatch.setattr(storage, "READ_BUFFER_BYTES", 1 << 18)
    monkeypatch.setattr(storage, "REQUEST_TIMEOUT_S", 10.0)
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "cache"))
    source = tmp_path / "source"
    (source / "part").mkdir(parents=True)
    (source / "part" / "weights").write_bytes(os.urandom((5 << 20) + 123))
    (source / "part" / "empty").write_bytes(b"")
    (source / "nexusgen.json").write_bytes(os.urandom(16))
    uri = storage.join(bucket, f"large-{tmp_path.name}")
    storage.upload_folder(source, uri)
    faulty.reads.clear()
    faulty.most_reads_at_once = 0
    return uri, source


def assert_same_files(ours: Path, theirs: Path) -> None:
    names = sorted(path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file())
    assert sorted(path.relative_to(ours) for path in ours.rglob("*") if path.is_file()) == names
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def fetching(uri: str, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, uri, str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_large_file_is_read_by_several_ranges_at_once(
    large: tuple[str, Path], faulty: FaultyS3, caplog: pytest.LogCaptureFixture
) -> None:
    uri, source = large
    faulty.bytes_per_s = 4 << 20
    with caplog.at_level("INFO", logger="pipelines.storage"):
        folder = storage.fetch_folder(uri)
    assert_same_files(folder, source)
    ranges = [of_range for path, of_range in faulty.reads if path.endswith("/part/weights")]
    # A quarter of a range at a time, through one buffer; a read that breaks off adds one.
    assert len(ranges) == len(set(ranges)) >= 5 * 4 + 1
    print(f"{faulty.most_reads_at_once} at once; {caplog.messages[-1]}")
    assert faulty.most_reads_at_once >= 4
    told = rf"{uri}: 0\.005 GB fetched in \d+\.\d s, \d+ MB/s; checked and in place after \d+\.\d s"
    assert re.fullmatch(told, caplog.messages[-1])


def test_ranges_survive_a_store_that_fails(large: tuple[str, Path], faulty: FaultyS3) -> None:
    uri, source = large
    faulty.share = 0.3
    faulty.faults = ("500", "503", "reset", "cut", "cut unannounced")
    assert_same_files(storage.fetch_folder(uri), source)
    assert min(faulty.counts["cut"], faulty.counts["cut unannounced"]) > 0


def test_a_killed_reader_leaves_nothing_that_counts_and_the_next_one_reads_again(
    large: tuple[str, Path], faulty: FaultyS3, tmp_path: Path
) -> None:
    uri, source = large
    cache = tmp_path / "cache"
    faulty.bytes_per_s = 100_000
    reader = fetching(uri, cache)
    deadline = time.monotonic() + 120
    while not sum(path.stat().st_blocks for path in cache.rglob("weights")):  # some of it is there
        assert reader.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    reader.kill()
    reader.communicate()
    (root,) = cache.iterdir()
    left = [path.name for path in root.iterdir() if path.is_dir()]
    assert len(left) == 1
    assert left[0].startswith(".")
    faulty.bytes_per_s = None
    folder = storage.fetch_folder(uri)
    assert_same_files(folder, source)
    assert [path for path in root.iterdir() if path.is_dir()] == [folder]


def test_of_several_processes_one_copies_and_the_others_wait(
    large: tuple[str, Path], faulty: FaultyS3, tmp_path: Path
) -> None:
    uri, source = large
    faulty.bytes_per_s = 400_000
    readers = [fetching(uri, tmp_path / "cache") for _ in range(3)]
    told = [reader.communicate(timeout=200) for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0, 0], told
    (folder,) = {out.strip() for out, _ in told}
    assert_same_files(Path(folder), source)
    assert sum(errors.count("GB fetched in") for _, errors in told) == 1
    ranges = [of_range for path, of_range in faulty.reads if path.endswith("/part/weights")]
    assert len(ranges) == len(set(ranges))


def test_a_copy_that_is_refused_has_no_name(large: tuple[str, Path], tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        assert_same_files(folder, large[1])
        raise ModelError("other weights")

    with pytest.raises(ModelError, match="other weights"):
        storage.fetch_folder(large[0], refuse)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and path.parent.name != "cache"]


def test_weights_that_were_damaged_on_the_way_are_told(
    bucket: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    uri = storage.join(bucket, "whole-model")
    storage.upload_folder(copy, uri)
    assert_same_files(registry.resolve_model(uri), copy)
    weights = copy / "autoregressive" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    uri = storage.join(bucket, "damaged-model")
    storage.upload_folder(copy, uri)
    with pytest.raises(ModelError, match=r"weights of autoregressive in .* aren't those of its nexusgen.json"):
        registry.resolve_model(uri)
    assert not list(tmp_path.glob("nexusgen-cache-*/*damaged-model*/"))


def test_a_full_disk_leaves_nothing_half_written(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        uri = f"{disk}/rows/a.bin"
        storage.write_bytes_atomic(uri, b"old")
        source = tmp_path / "source"
        source.mkdir()
        (source / "w").write_bytes(bytes(2 << 20))
        with pytest.raises(ResourceError, match=f"cannot write {uri}: No space left on device"):
            storage.write_bytes_atomic(uri, bytes(2 << 20))
        with pytest.raises(ResourceError, match=r"cannot write .*No space left on device"):
            storage.upload_folder(source, f"{disk}/model")
        assert [path.name for path in disk.rglob("*") if path.is_file()] == ["a.bin"]
        assert storage.read_bytes(uri) == b"old"
        (source / "nexusgen.json").write_bytes(b"{}")
        storage.upload_folder(source, f"{bucket}/too-large")
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        with pytest.raises(ResourceError, match=r"it takes 0.002 GB, and 0.001 GB are free there: make room, or"):
            storage.fetch_folder(f"{bucket}/too-large")
        assert not list(disk.rglob("w*"))
    finally:
        subprocess.run(["umount", disk], check=True)
