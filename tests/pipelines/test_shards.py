from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from nexusgen.errors import ConfigError, InputError, SampleError
from nexusgen.images import decode_image
from nexusgen.schema import REASON_CODES, QuarantineRow, Sample
from pipelines.shards import ReadOptions, ShardReader, expand_braces, list_shards, split_name, stem_of

Member = tuple[str, bytes]


def png(colour: str = "red", size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def record(
    user: str = "Draw a circle", assistant: str = "Here: <image>", images: tuple[str, ...] = ("0.png",), **meta: object
) -> bytes:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return json.dumps({"id": "x", "images": images, "messages": messages, **meta}).encode()


def sample_members(key: str, colour: str = "red") -> list[Member]:
    return [(f"{key}.0.png", png(colour)), (f"{key}.json", record())]


def tar_bytes(members: list[Member], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read(
    path: Path, data: bytes, options: ReadOptions | None = None
) -> tuple[list[Sample], list[QuarantineRow], ShardReader]:
    path.write_bytes(data)
    reader = ShardReader(str(path), options)
    items = list(reader)
    rows = [item for item in items if isinstance(item, QuarantineRow)]
    assert all(row.reason_code in REASON_CODES and row.reason for row in rows)
    return [item for item in items if isinstance(item, Sample)], rows, reader


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return tmp_path / "shard-000.tar"


# ---- naming ----


def test_braces_keep_zeros_and_nest() -> None:
    assert expand_braces("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert expand_braces("{0..1}/{0..1}.tar") == ["0/0.tar", "0/1.tar", "1/0.tar", "1/1.tar"]
    with pytest.raises(ConfigError, match="backwards"):
        expand_braces("{3..1}.tar")
    with pytest.raises(ConfigError, match="two numbers"):
        expand_braces("{a..c}.tar")


def test_inputs_by_path_glob_range_folder_and_list(tmp_path: Path) -> None:
    names = ["a-000.tar", "a-001.tar", "b.tgz"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "notes.md").write_text("no shard")
    (tmp_path / "all.txt").write_text("# shards\na-000.tar\n\na-001.tar\n")
    full = [str(tmp_path / name) for name in names]
    assert list_shards(str(tmp_path / "b.tgz")) == full[2:]
    assert list_shards(f"{tmp_path}/a-*.tar") == full[:2]
    assert list_shards(f"{tmp_path}/a-{{000..001}}.tar") == full[:2]
    assert list_shards(str(tmp_path)) == full
    assert list_shards(str(tmp_path / "all.txt")) == full[:2]
    assert list_shards([f"{tmp_path}/a-*.tar", str(tmp_path)]) == full, "each once"


@pytest.mark.parametrize("name", ["none.tar", "none-*.tar", "a-{000..005}.tar", "empty"])
def test_inputs_that_match_nothing_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "a-000.tar").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=name.split(".")[0].split("-")[0]):
        list_shards(f"{tmp_path}/{name}")
    with pytest.raises(ConfigError, match="no input"):
        list_shards([])


def test_stem_is_safe_in_file_names() -> None:
    assert stem_of("s3://bucket/x/emoji-train-000001.tar.gz") == "emoji-train-000001"
    assert stem_of("/data/样本 1.tar") == "___1"


def test_key_ends_at_the_first_dot_of_the_base_name() -> None:
    assert split_name("v1.2/a.b.0.png") == ("v1.2/a", "b.0.png")
    assert split_name("plain") == ("plain", "")


# ---- conventions ----


def test_a_conversation_becomes_a_sample(shard: Path) -> None:
    json_bytes = record(lang="zh", source="here", license="MIT", score=float("nan"))
    samples, rows, reader = read(shard, tar_bytes([("a/k.0.png", png()), ("a/k.json", json_bytes)]))
    assert not rows
    (sample,) = samples
    assert (sample.key, sample.row, sample.task, sample.lang) == ("a/k", 0, "generation", "zh")
    assert sample.images == (png(),)
    assert sample.messages[1].content == "Here: <image>"
    assert sample.meta == {"id": "x", "lang": "zh", "source": "here", "license": "MIT", "score": None}
    assert len(reader.digest) == 64
    assert reader.num_bytes == shard.stat().st_size


@pytest.mark.parametrize(
    ("user", "assistant", "images", "task"),
    [
        ("Draw", "Here: <image>", ["0.png"], "generation"),
        ("<image> What?", "A circle.", ["0.png"], "understanding"),
        ("Hello", "Hello.", [], "understanding"),
        ("<image> Redder", "<image>", ["0.png", "1.png"], "editing"),
        ("<image><image> Join", "<image>", ["0.png", "1.png", "k.1.png"], "editing"),
    ],
)
def test_the_task_is_computed(shard: Path, user: str, assistant: str, images: list[str], task: str) -> None:
    json_bytes = record(user, assistant, tuple(images), task="other")
    samples, rows, _ = read(shard, tar_bytes([("k.0.png", png()), ("k.1.png", png("blue")), ("k.json", json_bytes)]))
    assert not rows
    assert samples[0].task == task
    assert len(samples[0].images) == len(images)


def test_pairs_take_the_templates_of_their_language(shard: Path) -> None:
    members = [
        ("a.jpg", png()), ("a.txt", b"a red circle"), ("a.json", b'{"url": "u", "width": 8}'),
        ("b.webp", png()), ("b.txt", "一个红色的圆".encode()),
        ("c.png", png()), ("c.json", json.dumps({"caption": "a square"}).encode()),
    ]  # fmt: skip
    samples, rows, _ = read(shard, tar_bytes(members))
    assert not rows
    assert [s.task for s in samples] == ["generation"] * 3
    assert [s.lang for s in samples] == ["en", "zh", "en"]
    assert "a red circle" in samples[0].messages[0].content
    assert samples[0].meta == {"url": "u", "width": 8}
    samples, _, _ = read(shard, tar_bytes(members), ReadOptions(pairs_as="understanding"))
    assert [s.task for s in samples] == ["understanding"] * 3


def test_image_marks_of_a_caption_are_plain_text(shard: Path) -> None:
    samples, rows, _ = read(shard, tar_bytes([("a.jpg", png()), ("a.txt", b"an <image> of it")]))
    assert not rows
    assert "".join(m.content for m in samples[0].messages).count("<image>") == 1


# ---- order ----


def test_members_in_any_order_and_interleaved(shard: Path) -> None:
    members = [
        ("a.json", record()), ("b.0.png", png("blue")), ("a.0.png", png("red")),
        ("c.0.png", png()), ("b.json", record()), ("c.json", record()),
    ]  # fmt: skip
    samples, rows, _ = read(shard, tar_bytes(members))
    assert not rows
    assert [(s.key, s.row) for s in samples] == [("a", 0), ("b", 1), ("c", 2)]
    assert [s.images[0] for s in samples] == [png("red"), png("blue"), png()]


def test_an_incomplete_sample_waits_only_so_long(shard: Path) -> None:
    members = [("lone.0.png", png())] + [m for i in range(100) for m in sample_members(f"k{i:03d}")]
    members.append(("lone.json", record()))
    samples, rows, _ = read(shard, tar_bytes(members))
    assert [s.key for s in samples] == [f"k{i:03d}" for i in range(100)]
    assert [(r.key, r.reason_code) for r in rows] == [("lone", "sample_unknown"), ("lone", "key_duplicate")]


def test_a_key_that_comes_again_is_reported_and_the_first_counts(shard: Path) -> None:
    members = sample_members("a", "red") + sample_members("b") + sample_members("a", "blue") + sample_members("c")
    samples, rows, _ = read(shard, tar_bytes(members))
    assert [s.key for s in samples] == ["a", "b", "c"]
    assert samples[0].images == (png("red"),)
    assert [(r.key, r.reason_code) for r in rows] == [("a", "key_duplicate")]


def test_concatenated_tars_are_read_to_the_end(shard: Path) -> None:
    data = tar_bytes(sample_members("a")) + tar_bytes(sample_members("b")) + os.urandom(3000)
    samples, rows, _ = read(shard, data)
    assert [s.key for s in samples] == ["a", "b"]
    assert not rows


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_every_format(shard: Path, format: int) -> None:
    key = "样本/" + "k" * (60 if format == tarfile.USTAR_FORMAT else 250)
    samples, rows, _ = read(shard, tar_bytes(sample_members(key), format))
    assert not rows
    assert samples[0].key == key


def test_gzip_is_known_by_content(shard: Path) -> None:
    samples, rows, reader = read(shard, gzip.compress(tar_bytes(sample_members("a"))))
    assert [s.key for s in samples] == ["a"]
    assert not rows
    assert reader.num_bytes == shard.stat().st_size


# ---- faults ----


def test_junk_is_ignored_and_counted(shard: Path) -> None:
    junk = [
        ("._a.0.png", b"x"),
        (".DS_Store", b"x"),
        ("__MACOSX/a.json", b"{"),
        ("README", b"x"),
        ("__info__.json", b"{}"),
    ]
    samples, rows, reader = read(shard, tar_bytes(junk + sample_members("a")))
    assert [s.key for s in samples] == ["a"]
    assert not rows
    assert reader.num_ignored == len(junk)


@pytest.mark.parametrize(
    ("members", "code"),
    [
        ([("k.0.png", png()), ("k.json", b'{"images": ')], "json_invalid"),
        ([("k.0.png", png()), ("k.json", b"[]")], "json_invalid"),
        ([("k.0.png", png()), ("k.json", b"[" * 100_000)], "json_invalid"),
        ([("k.0.png", png()), ("k.json", b"\xe9")], "json_invalid"),
        ([("k.0.png", png()), ("k.json", b'{"images": "0.png", "messages": []}')], "json_invalid"),
        ([("k.0.png", png()), ("k.json", b'{"images": ["0.png"], "messages": [null]}')], "messages_invalid"),
        ([("k.0.png", png()), ("k.json", b'{"images": ["0.png"]}')], "messages_invalid"),
        ([("k.0.png", png()), ("k.json", record(assistant="no mark"))], "messages_invalid"),
        ([("k.0.png", png()), ("k.json", record(images=("0.png", "1.png")))], "member_missing"),
        ([("k.0.png", png()), ("k.0.png", png("blue")), ("k.json", record())], "member_duplicate"),
        ([("k.0.png", png()), ("k.json", record(user="x" * 40_000))], "text_too_long"),
        ([("k.0.png", png()), ("k.json", record(user="\ud83d"))], "text_invalid"),
        ([("k.0.png", png()), ("k.json", record(user=" "))], "text_invalid"),
        ([("k.jpg", png()), ("k.txt", b" ")], "text_invalid"),
        ([("k.jpg", png()), ("k.txt", b"\xff\xfe")], "text_invalid"),
        ([("k.jpg", png())], "sample_unknown"),
        ([("k.cls", b"3"), ("k.mat", b"x")], "sample_unknown"),
        ([("../k.0.png", png()), ("../k.json", record())], "member_unsafe"),
        ([("/etc/k.0.png", png()), ("/etc/k.json", record())], "member_unsafe"),
    ],
)
def test_a_bad_sample_becomes_one_row_and_the_others_load(shard: Path, members: list[Member], code: str) -> None:
    samples, rows, _ = read(shard, tar_bytes(sample_members("a") + members + sample_members("z")))
    assert [s.key for s in samples] == ["a", "z"]
    assert [(r.reason_code, r.shard) for r in rows] == [(code, str(shard))]
    assert rows[0].key.endswith("k")


def test_links_are_never_followed(shard: Path) -> None:
    buffer = io.BytesIO(tar_bytes(sample_members("a")))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        link = tarfile.TarInfo("k.0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        info = tarfile.TarInfo("k.json")
        info.size = len(record())
        tar.addfile(info, io.BytesIO(record()))
    samples, rows, _ = read(shard, buffer.getvalue())
    assert [s.key for s in samples] == ["a"]
    assert [(r.key, r.reason_code) for r in rows] == [("k", "member_unsafe")]


def test_a_large_member_is_skipped(shard: Path) -> None:
    members = [("k.0.png", bytes(5000)), ("k.json", record()), *sample_members("z")]
    samples, rows, _ = read(shard, tar_bytes(members), ReadOptions(max_member_bytes=4000))
    assert [s.key for s in samples] == ["z"]
    assert [r.reason_code for r in rows] == ["member_too_large"]


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"", "tar_not_a_tar"), (b"version https://git-lfs", "tar_not_a_tar"), (b"x" * 4096, "tar_not_a_tar")],
)
def test_what_is_no_tar_is_one_row(shard: Path, data: bytes, code: str) -> None:
    samples, rows, _ = read(shard, data)
    assert not samples
    assert [(r.reason_code, r.key) for r in rows] == [(code, "")]


def test_a_tar_without_samples_is_one_row(shard: Path) -> None:
    _, rows, _ = read(shard, tar_bytes([]))
    assert [r.reason_code for r in rows] == ["tar_empty"]


def test_an_absent_shard_is_one_row(tmp_path: Path) -> None:
    (row,) = ShardReader(str(tmp_path / "none.tar"))
    assert isinstance(row, QuarantineRow)
    assert row.reason_code == "tar_unreadable"


def test_a_truncated_tar_keeps_what_is_whole(shard: Path) -> None:
    whole = tar_bytes([*sample_members("a"), *sample_members("b"), *sample_members("c")])
    for cut in range(0, len(whole) - 2 * 512, 257):
        samples, rows, _ = read(shard, whole[:cut])
        damaged = [r for r in rows if r.reason_code in ("tar_truncated", "tar_not_a_tar")]
        keys = [s.key for s in samples]
        assert keys == ["a", "b", "c"][: len(keys)]
        assert len(damaged) == len(rows)
        if cut % 512 and cut < len(whole.rstrip(b"\0")):
            assert rows
    samples, rows, _ = read(shard, gzip.compress(whole)[:-40])
    assert {r.reason_code for r in rows} == {"tar_truncated"}


def test_a_damaged_header_is_reported_not_taken_for_the_end(shard: Path) -> None:
    data = bytearray(tar_bytes([*sample_members("a"), *sample_members("b")], tarfile.USTAR_FORMAT))
    second = data.index(b"b.0.png")
    data[second + 150] ^= 0xFF
    samples, rows, _ = read(shard, bytes(data))
    assert [s.key for s in samples] == ["a"]
    assert [r.reason_code for r in rows] == ["tar_header"]


def test_a_damaged_gzip_stream_is_reported(shard: Path) -> None:
    data = bytearray(gzip.compress(tar_bytes([(f"k{i}.0.png", os.urandom(3000)) for i in range(9)])))
    data[len(data) // 2] ^= 0xFF
    _, rows, _ = read(shard, bytes(data))
    assert any(r.reason_code in ("tar_unreadable", "tar_truncated", "tar_header") for r in rows)


# ---- real data ----


def test_photos_have_the_counts_of_an_independent_reading(test_data: Path) -> None:
    folder = test_data / "data" / "photos"
    found: Counter[str] = Counter()
    expected: Counter[str] = Counter()
    for shard in list_shards(f"{folder}/*.tar"):
        found.update(item.task if isinstance(item, Sample) else item.reason_code for item in ShardReader(shard))
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    stream = tar.extractfile(member)
                    assert stream is not None
                    turns = json.load(stream)["messages"]
                    said = {
                        role: any("<image>" in t["content"] for t in turns if t["role"] == role)
                        for role in ("user", "assistant")
                    }
                    task = "editing" if all(said.values()) else "generation" if said["assistant"] else "understanding"
                    expected[task] += 1
    assert found == expected == {"generation": 256, "understanding": 702, "editing": 190}


def test_every_faulty_tar_behaves_as_expected(test_data: Path) -> None:
    folder = test_data / "data" / "broken"
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    shards = list_shards([str(folder / "tars"), str(folder / "tars_others")])
    assert len(shards) == 85
    for shard in shards:
        good, bad = set(), []
        for item in ShardReader(shard):
            if isinstance(item, QuarantineRow):
                bad.append(item)
                continue
            try:
                for image in item.images:
                    decode_image(image)
                good.add(item.key)
            except SampleError as error:
                bad.append(QuarantineRow(shard, item.key, "", error.reason_code, error.reason))
        wanted = expected[str(Path(shard).relative_to(folder))]
        assert set(wanted.get("good_keys", [])) <= good, shard
        assert {row.reason_code for row in bad} <= set(REASON_CODES)
        for key in wanted.get("bad_keys", []):
            known = good | {row.key for row in bad}
            assert key.startswith("(") or key.endswith("(2nd)") or key in known, (shard, key)
        assert good or bad, shard
