from __future__ import annotations

import json
import os
import signal
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from servers import free_port, s3_server
from test_shards import png

from benchmarks.faulty_s3 import FaultyS3, faulty_s3
from nexusgen import shapes
from nexusgen.config import dump_config, load_config, parse_config
from nexusgen.errors import ConfigError, InputError, QuarantineError, ResourceError
from nexusgen.images import decode_image
from nexusgen.schema import Sample
from pipelines import pack as pack_module
from pipelines import storage, tracking
from pipelines.pack import PackConfig, pack
from pipelines.runtime import JobReport
from pipelines.shards import ShardReader

PASSING = ("500", "503", "reset", "cut", "cut unannounced")

pytestmark = pytest.mark.usefixtures("no_server")


def config(folder: Path, **values: object) -> PackConfig:
    counts = {"understanding": 3, "generation": 5, "editing": 3}
    return PackConfig.model_validate(
        {"storage": str(folder), "name": "world", "counts": counts, "samples_per_shard": 2, **values}
    )


def test_the_world_is_packed_the_same_twice_and_read_back(tmp_path: Path) -> None:
    first = pack(config(tmp_path / "a"))
    second = pack(config(tmp_path / "b"))
    assert first.samples == 11
    assert first.outputs["digests"] == second.outputs["digests"]
    assert len(first.outputs["shards"]) == 2 + 3 + 2
    samples = [item for shard in first.outputs["shards"] for item in ShardReader(shard)]
    assert all(isinstance(sample, Sample) for sample in samples)
    drawn = [
        s
        for task, n in (("understanding", 3), ("generation", 5), ("editing", 3))
        for s in shapes.training_samples(task, 0, n, 0)
    ]
    for sample, made in zip(samples, drawn, strict=True):
        assert isinstance(sample, Sample)
        assert (sample.key, sample.task, sample.lang, sample.messages) == (
            made.key,
            made.task,
            made.lang,
            made.messages,
        )
        for data, pixels in zip(sample.images, made.images, strict=True):
            assert np.array_equal(np.asarray(decode_image(data)), pixels)


def test_finished_shards_are_kept_and_others_replaced(tmp_path: Path) -> None:
    first = pack(config(tmp_path))
    assert not first.reused
    again = pack(config(tmp_path))
    assert again.reused
    assert again.outputs["digests"] == first.outputs["digests"]
    folder = Path(first.outputs["tars"])
    (folder / "notes.tar").write_bytes(b"not ours")
    fewer = pack(config(tmp_path, counts={"generation": 5}))
    assert (fewer.samples, fewer.reused) == (0, False), "nothing is made, others are removed"
    assert fewer.outputs["digests"] == first.outputs["digests"][2:5]
    assert sorted(path.name for path in folder.glob("*.tar")) == [
        *(f"generation-{i:05d}.tar" for i in range(3)),
        "notes.tar",
    ]
    assert json.loads((folder / "run.json").read_text())["run_id"]
    assert pack(config(tmp_path, counts={"generation": 5})).reused
    (folder / "generation-00001.tar").unlink()
    assert pack(config(tmp_path, counts={"generation": 5})).samples == 2
    assert pack(config(tmp_path, counts={"generation": 5}, seed=1)).samples == 5


def test_what_a_killed_run_left_undone_is_done_by_the_next(tmp_path: Path) -> None:
    many, few = config(tmp_path, counts={"generation": 4}), config(tmp_path, counts={"generation": 2})
    folder = Path(pack(many).outputs["tars"])
    (folder / "_manifest" / "generation-00001.json").unlink()  # killed between a tar and its entry
    assert not pack(few).reused
    assert [path.name for path in folder.glob("*.tar")] == ["generation-00000.tar"]
    assert pack(few).reused
    (folder / "run.json").unlink()  # killed behind the last entry
    again = pack(few)
    assert (again.samples, again.reused) == (0, False)
    assert json.loads((folder / "run.json").read_text())["outputs"][0]["digest"] == again.outputs["digests"][0]
    assert pack(few).reused


def test_nothing_to_pack_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to pack"):
        pack(config(tmp_path, counts={"generation": 0}))


# ---- the user's own files ----


def own(folder: Path | str, **values: object) -> PackConfig:
    settings = {"storage": str(folder), "name": "own", "format": "jsonl", **values}
    return parse_config(PackConfig, settings, "the test")


def write_jsonl(folder: Path, count: int = 7, *, side: int = 8) -> str:
    """`count` samples of two images each, in two files; every image is another one."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for number in range(count):
        names = [f"images/{number}-甲.PNG", f"images/{number}-b.png"]
        for index, name in enumerate(names):
            (folder / name).write_bytes(png("red", (side + number, side + index)))
        messages = [
            {"role": "user", "content": "<image> 把它变成红色"},
            {"role": "assistant", "content": "好的：<image>"},
        ]
        line = {"id": f"样本/{number}.x", "source": "own", "images": names, "messages": messages, "licence": "CC0"}
        lines.append(json.dumps(line, ensure_ascii=False))
    half = count // 2
    (folder / "a.jsonl").write_text("\n".join(lines[:half]) + "\n", encoding="utf-8")
    (folder / "b.jsonl").write_text("\n".join(lines[half:]), encoding="utf-8")
    return str(folder)


def samples_of(report: JobReport) -> list[Sample]:
    found = [item for shard in report.outputs["shards"] for item in ShardReader(shard)]
    assert all(isinstance(item, Sample) for item in found), found
    return [item for item in found if isinstance(item, Sample)]


def quarantine_of(report: JobReport) -> list[tuple[str, str, str, str]]:
    rows = []
    for uri in storage.list_files(storage.join(report.outputs["tars"], "quarantine")):
        with storage.open_random(uri) as file:
            rows += pq.read_table(file).to_pylist()
    return [(Path(row["shard"]).name, row["key"], row["reason_code"], row["reason"]) for row in rows]


def test_jsonl_is_packed_the_same_anywhere_and_read_back(tmp_path: Path) -> None:
    first = pack(own(tmp_path / "s1", input=write_jsonl(tmp_path / "one"), samples_per_shard=3))
    second = pack(own(tmp_path / "s2", input=write_jsonl(tmp_path / "two"), samples_per_shard=3))
    assert first.outputs["digests"] == second.outputs["digests"]
    assert [Path(uri).name for uri in first.outputs["shards"]] == [f"samples-{n:06d}.tar" for n in range(3)]
    samples = samples_of(first)
    assert [sample.key for sample in samples] == [f"样本_{number}_x" for number in range(7)]
    for number, sample in enumerate(samples):
        names = (f"{number}-甲.PNG", f"{number}-b.png")
        assert sample.images == tuple((tmp_path / "one" / "images" / name).read_bytes() for name in names)
        assert (sample.task, sample.lang, sample.meta["source"], sample.meta["licence"]) == (
            "editing",
            "zh",
            "own",
            "CC0",
        )
        assert sample.meta["id"] == f"样本/{number}.x"
    with tarfile.open(first.outputs["shards"][0]) as tar:
        assert tar.getnames()[:3] == ["样本_0_x.0.PNG", "样本_0_x.1.png", "样本_0_x.json"]
        assert {(info.uid, info.mtime, info.mode) for info in tar} == {(0, 0, 0o444)}


def test_pairs_and_parquet_are_read_back(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pictures = [png("red", (8, 8 + number)) for number in range(3)]
    texts = ["A circle", "一个圆", "A square"]
    for number, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        (tmp_path / "in" / f"{number}.PNG").write_bytes(picture)
        (tmp_path / "in" / f"{number}.txt").write_text(text, encoding="utf-8")
    pq.write_table(pa.table({"image": pictures, "caption": texts, "id": ["x", "y", "z"]}), tmp_path / "p.parquet")
    for settings in (
        {"format": "pairs", "input": f"{tmp_path}/in"},
        {"format": "parquet", "input": f"{tmp_path}/p.parquet"},
    ):
        report = pack(own(tmp_path / str(settings["format"]), samples_per_shard=2, **settings))
        samples = samples_of(report)
        assert [sample.images for sample in samples] == [(picture,) for picture in pictures]
        assert [sample.lang for sample in samples] == ["en", "zh", "en"]
        assert all(sample.task == "generation" for sample in samples)
        assert [text in sample.messages[0].content for text, sample in zip(texts, samples, strict=True)] == [True] * 3
        assert [sample.meta["caption"] for sample in samples] == texts


def test_a_shard_ends_before_it_is_too_large(tmp_path: Path) -> None:
    input = write_jsonl(tmp_path / "in")
    for limit in (40_960, 1):
        report = pack(own(tmp_path / "s", input=input, shard_bytes=limit))
        sizes = [Path(uri).stat().st_size for uri in report.outputs["shards"]]
        assert len(samples_of(report)) == 7
        assert len(sizes) == (2 if limit > 1 else 7), "at least one sample in each"
        assert max(sizes) == max(limit, 10_240)
    assert len(list((tmp_path / "s" / "tars" / "own").glob("*.tar"))) == 7


def test_finished_shards_of_files_are_kept(tmp_path: Path) -> None:
    config = own(tmp_path / "s", input=write_jsonl(tmp_path / "in"), samples_per_shard=2)
    first = pack(config)
    assert (first.samples, first.reused) == (7, False)
    folder = Path(first.outputs["tars"])
    assert pack(config).reused
    (folder / "samples-000001.tar").unlink()
    kept = (folder / "samples-000002.tar").stat().st_mtime_ns
    repaired = pack(config)
    assert (repaired.samples, repaired.outputs["digests"]) == (2, first.outputs["digests"])
    assert (folder / "samples-000002.tar").stat().st_mtime_ns == kept
    assert parse_config(PackConfig, json.loads(json.dumps(config.model_dump())), "again") == config
    assert load_config(PackConfig, folder / "config.yaml") == config
    os.utime(tmp_path / "in" / "b.jsonl", ns=(1, 1))
    assert pack(config).samples == 7, "a changed file is packed anew"
    fewer = pack(config.model_copy(update={"input": f"{tmp_path}/in/a.jsonl"}))
    assert fewer.outputs["samples"] == 3
    assert sorted(path.name for path in folder.glob("*.tar")) == ["samples-000000.tar", "samples-000001.tar"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt; a shell's background job begins with it ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


# The signal may come inside `open`, before its `with` begins: Python then closes the file when it is collected.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_job_that_was_interrupted_goes_on(tmp_path: Path, interruptible: None) -> None:
    input = write_jsonl(tmp_path / "in", 400)
    whole = pack(own(tmp_path / "whole", input=input, samples_per_shard=5))
    config = own(tmp_path / "s", input=input, samples_per_shard=5)
    entry = tmp_path / "s" / "tars" / "own" / "_manifest" / "samples-000002.json"

    def interrupt() -> None:
        while not entry.exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        pack(config)
    watcher.join()
    again = pack(config)
    assert 0 < (again.samples or 0) <= 400 - 15
    assert again.outputs["digests"] == whole.outputs["digests"]


def test_ids_that_come_again_are_told_apart_over_shards_and_runs(tmp_path: Path) -> None:
    input = tmp_path / "in" / "x.jsonl"
    input.parent.mkdir()
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    ids: list[object] = ["a", "a-2", "a", "a", None, "a/"]
    input.write_text("\n".join(json.dumps({"id": id, "messages": messages}) for id in ids))
    report = pack(own(tmp_path / "s", input=str(input), samples_per_shard=2))
    keys = ["a", "a-2", "a-3", "a-4", "x-00000005", "a-5"]
    assert [sample.key for sample in samples_of(report)] == keys
    Path(report.outputs["shards"][2]).unlink()
    assert [
        sample.key for sample in samples_of(pack(own(tmp_path / "s", input=str(input), samples_per_shard=2)))
    ] == keys


def test_bad_samples_are_set_aside_counted_and_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    input = write_jsonl(tmp_path / "in")
    (tmp_path / "in" / "images" / "1-b.png").unlink()
    (tmp_path / "in" / "images" / "4-b.png").write_bytes(b"<html>")
    with (tmp_path / "in" / "b.jsonl").open("a") as file:
        file.write("\n{not json\n")
    settings = {"input": input, "samples_per_shard": 2}
    with pytest.raises(QuarantineError, match=r"3 of 8 samples are bad \(37.5%; at most 5.0% are allowed\)"):
        pack(own(tmp_path / "s", **settings))
    with pytest.raises(QuarantineError):
        pack(own(tmp_path / "s", **settings))  # all is packed, and as bad as before
    report = pack(own(tmp_path / "s", max_quarantine_fraction=1, **settings))
    assert (report.samples, report.reused) == (0, False), "all was packed, but by no run that came to its end"
    assert report.outputs["quarantined"] == {"member_missing": 1, "image_undecodable": 1, "json_invalid": 1}
    assert [sample.key for sample in samples_of(report)] == [f"样本_{number}_x" for number in (0, 2, 3, 5, 6)]
    rows = quarantine_of(report)
    assert [row[:3] for row in rows] == [
        ("a.jsonl", "样本_1_x", "member_missing"),
        ("b.jsonl", "样本_4_x", "image_undecodable"),
        ("b.jsonl", "b-00000005", "json_invalid"),
    ]
    assert rows[0][3].startswith("line 2: ")
    client = MlflowClient(tracking.mlflow_uri(str(tmp_path / "s")))
    (run, *_) = client.search_runs([e.experiment_id for e in client.search_experiments()], "metrics.`data/samples` = 8")
    assert run.data.metrics["data/quarantine/json_invalid"] == 1
    monkeypatch.setattr(pack_module, "CHECK_EVERY", 2)
    with pytest.raises(QuarantineError, match="1 of 2 samples"):
        pack(own(tmp_path / "early", **settings))
    assert quarantine_of(report)[0][1] == "样本_1_x", "what was found is there to be read"
    (tmp_path / "in" / "images" / "1-b.png").write_bytes(png())
    (tmp_path / "in" / "images" / "4-b.png").write_bytes(png())
    (tmp_path / "in" / "b.jsonl").write_text("")
    mended = pack(own(tmp_path / "s", **settings))
    assert (mended.outputs["samples"], quarantine_of(mended)) == (3, [])


def test_an_input_without_a_good_sample_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("{\n")
    with pytest.raises(InputError, match="holds no sample that can be packed"):
        pack(own(tmp_path / "s", input=f"{tmp_path}/x.jsonl", max_quarantine_fraction=1))
    with pytest.raises(InputError, match=r"absent\.jsonl"):
        pack(own(tmp_path / "s", input=f"{tmp_path}/absent.jsonl"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "jsonl"}, "input = None: format jsonl needs"),
        (
            {"format": "jsonl", "input": "x", "seed": 3},
            "seed = 3: no key of format jsonl, but of demo_world; remove it",
        ),
        ({"format": "demo_world", "shard_bytes": 5}, "shard_bytes = 5: no key of format demo_world, but of jsonl"),
        ({"format": "pairs", "input": "x", "text_column": "t"}, "text_column = 't': no key of format pairs"),
        ({"format": "tsv", "input": "x"}, "format = 'tsv'"),
    ],
)
def test_keys_of_another_format_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        own("unused", **values)


def test_a_dumped_configuration_holds_its_formats_keys_alone() -> None:
    assert "counts" not in dump_config(own("unused", input="x"))
    assert "shard_bytes" not in dump_config(own("unused", format="demo_world"))


def test_the_shipped_configuration_for_own_data_is_valid() -> None:
    path = Path(__file__).parents[2] / "jobs" / "configs" / "demo" / "pack_jsonl.yaml"
    assert load_config(PackConfig, path).format == "jsonl"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    with pytest.MonkeyPatch.context() as patch, s3_server(tmp_path_factory.mktemp("s3"), port, "bucket"):
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        yield "s3://bucket"


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow that tests on S3 share: making its database takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.mark.parametrize("format", ["jsonl", "pairs", "parquet"])
def test_an_s3_that_fails_makes_no_bad_samples(
    format: str, bucket: str, tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    monkeypatch.setattr(storage, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(storage, "MAX_DELAY_S", 0.01)
    source = f"{bucket}/faulty-{format}"
    for number in range(6):
        line = {"images": [f"{number}.png"], "messages": [{"role": "user", "content": "<image>?"}]}
        line["messages"].append({"role": "assistant", "content": "!"})  # type: ignore[attr-defined]
        storage.write_bytes_atomic(f"{source}/{number}.png", png(size=(40 + number, 40)))
        storage.write_bytes_atomic(f"{source}/{number}.txt", b"a text")
        storage.write_bytes_atomic(f"{source}/{number}.jsonl", json.dumps(line).encode())
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": [png()] * 6, "text": ["a text"] * 6}), buffer)
    storage.write_bytes_atomic(f"{source}/x.parquet", buffer.getvalue())
    config = own(tmp_path / "s", format=format, input=source, samples_per_shard=100)
    proxy = FaultyS3(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]), 0.3, faults=PASSING)
    with faulty_s3(proxy), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        report = pack(config)
        assert (report.samples, report.outputs["quarantined"]) == (6, {})
        assert proxy.num_faults > 1
        patch.setattr(storage, "MAX_ATTEMPTS", 2)
        proxy.share = 1.0
        with pytest.raises(ResourceError, match=r"gave up after 2 attempts"):
            pack(config)


def test_an_outage_while_pictures_are_read_ends_the_job(
    bucket: str, tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 1)
    write_jsonl(tmp_path / "in", 4)
    for path in (tmp_path / "in" / "images").iterdir():
        storage.write_bytes_atomic(f"{bucket}/outage/images/{path.name}", path.read_bytes())
    proxy = FaultyS3(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]), 1.0, faults=("503",))
    with faulty_s3(proxy), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        settings = {"input": str(tmp_path / "in"), "images": f"{bucket}/outage", "max_quarantine_fraction": 1}
        with pytest.raises(ResourceError, match=r"cannot read s3://bucket/outage/images/0-.*start the job again"):
            pack(own(tmp_path / "s", **settings))
    assert pack(own(tmp_path / "s", **settings)).outputs["quarantined"] == {}


def test_s3_to_s3_is_the_same_as_folder_to_folder(
    bucket: str, tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    local = Path(write_jsonl(tmp_path / "in", 4))
    for path in local.rglob("*.*"):
        filesystem, base = storage.open_filesystem(f"{bucket}/in")
        with filesystem.open_output_stream(f"{base}/{path.relative_to(local)}") as stream:
            stream.write(path.read_bytes())
    here = pack(own(tmp_path / "s", input=str(local), samples_per_shard=3))
    there = pack(own(f"{bucket}/out", input=f"{bucket}/in", samples_per_shard=3))
    assert there.outputs["digests"] == here.outputs["digests"]
    assert there.outputs["shards"][0] == "s3://bucket/out/tars/own/samples-000000.tar"
    assert [sample.images for sample in samples_of(there)] == [sample.images for sample in samples_of(here)]
    assert pack(own(f"{bucket}/out", input=f"{bucket}/in", samples_per_shard=3)).reused
    texts = storage.join(bucket, "pairs", "a")
    storage.write_bytes_atomic(f"{texts}/1.png", png())
    storage.write_bytes_atomic(f"{texts}/1.txt", "一个圆".encode())
    (sample,) = samples_of(pack(own(f"{bucket}/out", name="pairs", format="pairs", input=f"{bucket}/pairs")))
    assert (sample.key, sample.lang) == ("a_1", "zh")
