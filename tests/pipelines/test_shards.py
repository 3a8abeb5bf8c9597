from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import random
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from nexusgen.errors import ConfigError, InputError, SampleError
from nexusgen.images import decode_image
from nexusgen.schema import REASON_CODES, QuarantineRow, Sample
from pipelines import shards as shards_module
from pipelines.shards import (
    MAX_IMAGES,
    MAX_TEXT_BYTES,
    ReadOptions,
    ShardReader,
    expand_braces,
    list_shards,
    parse_sample,
    split_name,
    stem_of,
)

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


def test_a_shard_by_several_spellings_is_one_and_links_are_several(tmp_path: Path) -> None:
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "in").mkdir()
    for folder in ("in", "far"):
        (tmp_path / folder / "x.tar").write_bytes(b"")
    (tmp_path / "in" / "y.tar").symlink_to(tmp_path / "in" / "x.tar")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "far" / "deep")
    plain = f"{tmp_path}/in/x.tar"
    spellings = [plain, f"{tmp_path}/in/../in/x.tar", f"{tmp_path}/in/./x.tar", f"{tmp_path}//in/x.tar"]
    spellings += [f"{tmp_path}/in/../in/x.t?r", f"file://{tmp_path}/in/../in/x.tar"]
    assert list_shards(spellings) == [plain]
    assert list_shards([plain, f"{tmp_path}/in/y.tar"]) == [plain, f"{tmp_path}/in/y.tar"]
    assert list_shards(f"{tmp_path}/in/link/../x.tar") == [f"{tmp_path}/in/link/../x.tar"], "that is far/x.tar"


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


def test_an_incomplete_sample_waits_only_so_long(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_OPEN_SAMPLES", 32)
    members = [("lone.0.png", png())] + [m for i in range(100) for m in sample_members(f"k{i:03d}")]
    members.append(("lone.json", record()))
    samples, rows, _ = read(shard, tar_bytes(members))
    assert [s.key for s in samples] == [f"k{i:03d}" for i in range(100)]
    assert [(r.key, r.reason_code) for r in rows] == [("lone", "sample_unknown"), ("lone", "key_duplicate")]


@pytest.mark.parametrize("order", list(itertools.permutations(("jpg", "json", "txt"))), ids="-".join)
def test_pairs_sorted_by_extension_are_whole_and_counted_once(shard: Path, order: tuple[str, ...]) -> None:
    keys = ["a", "b", "c"]
    of = {
        "jpg": png(),
        "json": json.dumps({"caption": "from json", "url": "u"}).encode(),
        "txt": b"from text",
    }
    samples, rows, reader = read(shard, tar_bytes([(f"{key}.{e}", of[e]) for e in order for key in keys]))
    assert (rows, [sample.key for sample in samples], reader.num_groups) == ([], keys, 3)
    for sample in samples:
        assert "from text" in sample.messages[0].content
        assert sample.meta == {"caption": "from json", "url": "u"}
    members = [(f"{key}.{e}", b"{" if (key, e) == ("a", "json") else of[e]) for e in order for key in keys]
    samples, rows, _ = read(shard, tar_bytes(members))
    assert [sample.key for sample in samples] == ["b", "c"]
    assert [(row.key, row.reason_code) for row in rows] == [("a", "json_invalid")], "once, whatever follows"


def test_pairs_come_out_in_tar_order_as_soon_as_nothing_can_follow(shard: Path) -> None:
    def pair(key: str, *extensions: str) -> list[Member]:
        of = {"jpg": png(), "txt": b"a text", "json": b'{"n": 1e999, "m": -1e999, "k": 2.5, "i": NaN}'}
        return [(f"{key}.{extension}", of[extension]) for extension in extensions]

    shard.write_bytes(tar_bytes([*pair("a", "jpg", "txt", "json"), *pair("b", "jpg", "txt"), *pair("c", "jpg", "txt")]))
    reader = iter(ShardReader(str(shard)))
    first = next(reader)
    assert isinstance(first, Sample)
    assert first.meta == {"n": None, "m": None, "k": 2.5, "i": None}, "what strict parsers read"
    again = [*pair("a", "jpg", "txt"), *pair("b", "jpg", "txt"), *pair("a", "jpg", "txt"), *pair("c", "jpg", "txt")]
    found = list(ShardReader(str(shard)))
    assert [(item.key, type(item)) for item in found] == [(key, Sample) for key in "abc"]
    shard.write_bytes(tar_bytes([*again, *pair("b", "json", "txt")]))
    found = list(ShardReader(str(shard)))
    kinds = [(item.key, getattr(item, "reason_code", "")) for item in found]
    assert kinds == [("a", ""), ("b", ""), ("a", "key_duplicate"), ("c", ""), ("b", "key_duplicate")]


def test_all_images_may_come_before_all_json(shard: Path) -> None:
    members = [m for i in range(300) for m in sample_members(f"k{i:03d}")]
    samples, rows, _ = read(shard, tar_bytes(sorted(members, key=lambda m: m[0].rpartition(".")[2], reverse=True)))
    assert not rows
    assert [s.key for s in samples] == [f"k{i:03d}" for i in range(300)]


def test_waiting_samples_hold_only_so_many_bytes(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_OPEN_BYTES", 50_000)
    members = [(f"k{i}.0.png", bytes(9_000)) for i in range(10)] + [(f"k{i}.json", record()) for i in range(10)]
    samples, rows, _ = read(shard, tar_bytes(members))
    assert len(samples) == 5
    assert Counter(r.reason_code for r in rows) == {"sample_unknown": 5, "key_duplicate": 5}


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


def test_a_large_member_is_skipped(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_MEMBER_BYTES", 4000)
    members = [("k.0.png", bytes(5000)), ("k.json", record()), *sample_members("z")]
    samples, rows, _ = read(shard, tar_bytes(members))
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


# ---- siblings of the faults ----


def header(name: str, size: int, type: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, type
    return info.tobuf(tarfile.GNU_FORMAT)


def block(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(**fields: str) -> bytes:
    """A pax header with raw fields, whatever they say."""
    records = b""
    for name, value in fields.items():
        body = f" {name.replace('__', '.')}={value}\n".encode()
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length += 1
        records += str(length).encode() + body
    return header("pax", len(records), tarfile.XHDTYPE) + block(records)


END = bytes(1024)
A, Z = sample_members("a"), sample_members("z")


def plain(*members: Member) -> bytes:
    """Members without the end of an archive."""
    return b"".join(header(name, len(data)) + block(data) for name, data in members)


@pytest.mark.parametrize(
    ("middle", "code"),
    [
        (header("", 3, b"V") + block(b"x" * 3), None),
        (header("shard.1", 0, b"V"), None),
        (header("folder.d", 9, b"D") + block(b"Yx\0Nfile\0"), None),
        (pax(comment="about the next", size="0" * 30 + "5") + header("k.cls", 0) + block(b"three"), "sample_unknown"),
        (header("g", 11, tarfile.XGLTYPE) + block(b"11 path=q.z\n"), None),
        (header("k.0.png", 5, b"M") + block(b"piece"), "member_unsafe"),
        (pax(GNU__sparse__major="1", GNU__sparse__minor="0") + plain(("k.0.png", png())), "member_unsafe"),
        (header("k.0.png", 0, tarfile.FIFOTYPE), "member_unsafe"),
        (header("k.0.png", 0, tarfile.LNKTYPE), "member_unsafe"),
        (pax(path="../../k.0.png") + plain(("k.0.png", png())), "member_unsafe"),
        (pax(path="") + plain(("k.jpg", png())), "sample_unknown"),
        (pax(size="-5") + plain(("k.0.png", png())), "tar_header"),
        (pax(size="many") + plain(("k.0.png", png())), "tar_header"),
        (pax(size="9" * 18) + plain(("k.0.png", png())), "tar_truncated"),
        (pax(size="9" * 400) + plain(("k.0.png", png())), "tar_header"),
        (header("k.0.png", 1 << 62), "tar_truncated"),
        (header("k", 2 << 20, tarfile.XHDTYPE), "tar_header"),
    ],
)  # fmt: skip
def test_odd_headers_between_two_samples(shard: Path, middle: bytes, code: str | None) -> None:
    samples, rows, _ = read(shard, plain(*A) + middle + plain(*Z) + END)
    assert [r.reason_code for r in rows] == ([code] if code else [])
    assert [s.key for s in samples] == (["a"] if str(code).startswith("tar_") else ["a", "z"])


def test_negative_base_256_size(shard: Path) -> None:
    damaged = bytearray(header("k.0.png", 5))
    damaged[124:136] = b"\xff" * 12
    damaged[148:156] = b" " * 8
    damaged[148:156] = f"{sum(damaged):06o}\0 ".encode()
    samples, rows, _ = read(shard, plain(*A) + bytes(damaged) + plain(*Z) + END)
    assert ([s.key for s in samples], [(r.key, r.reason_code) for r in rows]) == (["a"], [("k", "tar_header")])


def test_gzip_members_and_what_follows_them(shard: Path) -> None:
    first, second = tar_bytes(A), tar_bytes(Z)
    whole = first + second
    for data in (
        gzip.compress(first) + gzip.compress(second),
        gzip.compress(whole[:700]) + gzip.compress(whole[700:]),
        gzip.compress(whole) + b"other bytes",
        gzip.compress(whole) + bytes(5000),
        gzip.compress(whole)[:-8],  # only the checksum is missing
    ):
        samples, rows, _ = read(shard, data)
        assert ([s.key for s in samples], rows) == (["a", "z"], [])
    wrong = bytearray(gzip.compress(whole))
    wrong[-6] ^= 1
    samples, rows, _ = read(shard, bytes(wrong))
    assert [r.reason_code for r in rows] == ["tar_unreadable"], "the checksum of the stream"


def test_truncated_gzip_keeps_what_is_whole(shard: Path) -> None:
    rng = random.Random(0)
    members = [m for i in range(40) for m in ((f"k{i:02d}.jpg", rng.randbytes(2000)), (f"k{i:02d}.txt", b"caption"))]
    data = gzip.compress(tar_bytes(members))
    for cut in range(20, len(data) - 20, len(data) // 9):
        samples, rows, _ = read(shard, data[:cut])
        whole = zlib.decompressobj(31).decompress(data[:cut])
        expected, _, _ = read(shard, whole)
        assert [s.key for s in samples] == [s.key for s in expected]
        assert {r.reason_code for r in rows} == {"tar_truncated"} or not whole


def test_zeros_without_end_are_not_read_to_it(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_TRAILING_BYTES", 10_000)
    samples, rows, reader = read(shard, gzip.compress(tar_bytes(A) + bytes(20 << 20) + b"never read"))
    assert ([s.key for s in samples], rows, reader.num_bytes) == (["a"], [], shard.stat().st_size)


@pytest.mark.parametrize(
    ("start", "word"),
    [(b"PK\3\4", "zip"), (b"BZh9", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstandard"), (b"PAR1", "P")],
)  # fmt: skip
def test_other_formats_are_named(shard: Path, start: bytes, word: str) -> None:
    for data in (start, start + b"x" * 2000):
        _, (row,), _ = read(shard, data)
        assert row.reason_code == "tar_not_a_tar"
        assert word in row.reason


@pytest.mark.parametrize(
    ("members", "code"),
    [
        ([("k.0.png", png()), ("k.0.PNG", png("blue")), ("k.json", record())], "member_duplicate"),
        ([("k.0.png", png()), ("k.json", record()), ("k.JSON", record())], "member_duplicate"),
        ([("k.0.png", png()), ("k.json", record("x", "<image>" * 65, ("0.png",) * 65))], "messages_invalid"),
        ([("k.0.png", png()), ("k.json", b'{"a": "' + b"x" * MAX_TEXT_BYTES + b'"}')], "member_too_large"),
        ([("k.jpg", png()), ("k.txt", b"x" * (MAX_TEXT_BYTES + 1))], "member_too_large"),
        ([("k.jpg", png()), ("k.txt", b"x" * 40_000)], "text_too_long"),
        ([("k.0.png", png()), ("k.json", b'{"images": ["0.png"], "n": ' + b"9" * 5000 + b"}")], "json_invalid"),
        ([("k.0.png", png()), ("k.json", b'{"images": [' + b"[" * 100_000)], "json_invalid"),
        ([("k.heic", b"x"), ("k.png", png()), ("k.txt", b"two images")], "sample_unknown"),
        ([(f"k.{i:06d}.jpg", b"x") for i in range(1100)], "sample_unknown"),
    ],
    ids=["image-case", "json-case", "images", "long-json", "long-txt", "text", "digits", "nested", "two", "dots"],
)  # fmt: skip
def test_siblings_of_bad_samples(shard: Path, members: list[Member], code: str) -> None:
    samples, rows, _ = read(shard, tar_bytes([*A, *members, *Z]))
    assert ([s.key for s in samples], [(r.key, r.reason_code) for r in rows]) == (["a", "z"], [("k", code)])


def test_keys_differ_by_case_and_extensions_do_not(shard: Path) -> None:
    members = [("k.JPG", png()), ("k.TXT", b"a circle"), ("K.jpg", png()), ("K.txt", b"a square")]
    samples, rows, _ = read(shard, tar_bytes([*members, ("m.0.PNG", png()), ("m.Json", record())]))
    assert ([s.key for s in samples], rows) == (["k", "K", "m"], [])


def test_a_language_that_is_no_name_is_guessed(shard: Path) -> None:
    members = [("a.0.png", png()), ("a.json", record(lang="\ud83d")), ("b.jpg", png()), ("b.txt", b"x")]
    samples, rows, _ = read(shard, tar_bytes([*members, ("b.json", b'{"lang": "zh-Hans"}')]))
    assert ([s.lang for s in samples], rows) == (["en", "zh-Hans"], [])


def test_a_sample_of_too_many_bytes_is_dropped_at_once(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_SAMPLE_BYTES", 10_000)
    samples, rows, _ = read(shard, tar_bytes([*A, *((f"k.{i}.png", bytes(4000)) for i in range(9)), *Z]))
    assert ([s.key for s in samples], [r.reason_code for r in rows]) == (["a", "z"], ["member_too_large"])


def test_conventions_are_counted(shard: Path) -> None:
    _, _, reader = read(shard, tar_bytes([*A, ("p.jpg", png()), ("p.txt", b"a circle"), ("bad.json", b"{")]))
    assert (reader.num_conversations, reader.num_pairs) == (1, 1)


def test_a_sample_made_of_members_is_judged_as_in_a_shard() -> None:
    assert parse_sample("k", {"0.png": png(), "json": record()}).task == "generation"
    with pytest.raises(SampleError, match="member_too_large"):
        parse_sample("k", {"0.png": png(), "json": b" " * (MAX_TEXT_BYTES + 1)})
    with pytest.raises(SampleError, match=f"at most {MAX_IMAGES}"):
        parse_sample("k", {"0.png": png(), "json": record(images=("0.png",) * 100)})


def test_ranges_name_only_so_many_shards_and_literal_names_win(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than 2,000,000"):
        expand_braces("{0..99999}/{0..99999}.tar")
    names = ["x[1].tar", "x1.tar", "x{0..1}.tar"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert list_shards(f"{tmp_path}/x[1].tar") == [f"{tmp_path}/x[1].tar"]
    with pytest.raises(InputError, match=r"1 of 2 shards are missing, first .*x0.tar"):
        list_shards(f"{tmp_path}/x{{0..1}}.tar")
    (tmp_path / "d0").mkdir()
    (tmp_path / "d0" / "s.tar").write_bytes(b"")
    assert (
        list_shards(f"{tmp_path}/d{{0..0}}") == list_shards(f"{tmp_path}/d{{0..0}}/*.tar") == [f"{tmp_path}/d0/s.tar"]
    )


def test_a_file_name_that_is_not_utf8_is_reported(tmp_path: Path) -> None:
    name = os.fsdecode(bytes(tmp_path) + b"/\xff.tar")
    rows = list(ShardReader(name))
    assert [row.reason_code for row in rows if isinstance(row, QuarantineRow)] == ["tar_unreadable"]


def damage(rng: random.Random, data: bytes) -> bytes:
    """One to four flips, overwritten or removed or repeated runs, or a cut."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) or 1)
        run = rng.choice((1, 4, 64, 512, 3000))
        match rng.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                changed[at : at + run] = rng.randbytes(run)
            case 2:
                del changed[at : at + run]
            case 3:
                changed[at:at] = changed[at : at + run]
            case _:
                del changed[at:]
    return bytes(changed)


def test_no_damage_makes_reading_raise(shard: Path) -> None:
    rng = random.Random(7)
    members = [*A, ("样" * 90 + ".jpg", png()), ("样" * 90 + ".txt", b"a circle"), *Z]
    wholes = [tar_bytes(members, format) for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    wholes += [gzip.compress(whole, mtime=0) for whole in wholes]
    for _ in range(200):
        samples, rows, _ = read(shard, damage(rng, rng.choice(wholes)))
        assert samples or rows
        json.dumps([(item.key, item.shard) for item in (*samples, *rows)], ensure_ascii=False).encode()


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


def judge(shard: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Keys of the samples whose images can be decoded, and key and code of everything else."""
    good: list[str] = []
    bad: list[tuple[str, str]] = []
    for item in ShardReader(str(shard)):
        if isinstance(item, QuarantineRow):
            assert item.shard == str(shard)
            assert item.reason
            bad.append((item.key, item.reason_code))
            continue
        try:
            assert all(decode_image(image).mode == "RGB" for image in item.images)
            good.append(item.key)
        except SampleError as error:
            bad.append((item.key, error.reason_code))
    assert {code for _, code in bad} <= set(REASON_CODES)
    return good, bad


# Where the expectation leaves a choice, what ours is: samples that load beyond `good_keys`, and codes of rows.
CHOSEN: dict[str, tuple[list[str], list[str]]] = {
    "truncated_mid_member": ([], ["tar_truncated"]),
    "truncated_in_header": ([], ["tar_truncated"]),
    "bad_header_checksum": ([], ["tar_header"]),
    "json_syntax_error": ([], ["json_invalid"]),
    "json_non_utf8": ([], ["json_invalid"]),
    "json_bom": (["bad-0001"], []),
    "json_lone_surrogate": ([], ["text_invalid"]),
    "json_missing": ([], ["sample_unknown"]),
    "json_is_list": ([], ["json_invalid"]),
    "json_deep_nesting": ([], ["json_invalid"]),
    "json_nan": (["bad-0001"], []),
    "image_missing": ([], ["member_missing"]),
    "image_second_missing": ([], ["member_missing"]),
    "image_zero_bytes": ([], ["image_undecodable"]),
    "image_truncated": ([], ["image_truncated"]),
    "image_wrong_extension": (["bad-0001"], []),
    "image_is_html": ([], ["image_undecodable"]),
    "image_bomb": ([], ["image_too_large"]),
    "image_1x10000": ([], ["image_shape"]),
    "image_1x1": (["bad-0001"], []),
    "edit_size_mismatch": (["bad-0001"], []),
    "path_traversal": ([], ["member_unsafe"] * 3),
    "absolute_names": ([], ["member_unsafe"] * 2),
    "symlink_members": ([], ["member_unsafe"] * 3),
    "duplicate_key_far": (["dup-0001", "+2"], ["key_duplicate"]),
    "duplicate_member": ([], ["member_duplicate"]),
    "interleaved_members": (["+2"], []),
    "json_before_image": (["bad-0001"], []),
    "placeholder_too_many": ([], ["messages_invalid"]),
    "placeholder_too_few": ([], ["messages_invalid"]),
    "placeholder_none": ([], ["messages_invalid"]),
    "messages_bad": ([], ["messages_invalid"] * 8),
    "text_special_tokens": (["bad-0001"], []),
    "text_huge": ([], ["text_too_long"]),
    "text_empty": ([], ["text_invalid"]),
    "key_odd_names": (["+4"], []),
    "member_size_8gib": ([], ["tar_truncated"]),
    "exif_orientation": (["+9"], []),
    "zero_bytes": ([], ["tar_not_a_tar"]),
    "only_eof": ([], ["tar_empty"]),
    "not_a_tar": ([], ["tar_not_a_tar"]),
    "random": ([], ["tar_not_a_tar"]),
    "gzipped_named": (["+6"], []),
    "plain_named": (["+6"], []),
    "zip_named": ([], ["tar_not_a_tar"]),
    "odd_formats_valid": (["+24"], ["image_shape", "member_duplicate", "member_duplicate"]),  # two keys are not unique
}


def test_every_faulty_tar_behaves_as_expected(test_data: Path) -> None:
    folder = test_data / "data" / "broken"
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    wanted_tars = {name: wanted for name, wanted in expected.items() if name.startswith("tars/")}
    assert len(wanted_tars) == 49
    for name, wanted in wanted_tars.items():
        more, codes = CHOSEN.get(Path(name).name.partition(".")[0], ([], []))
        good, bad = judge(folder / name)
        named = wanted.get("good_keys", []) + [key for key in more if not key.startswith("+")]
        num_unnamed = sum(int(key[1:]) for key in more if key.startswith("+"))
        assert set(named) <= set(good), name
        assert len(good) == len(set(good)) == len(named) + num_unnamed, (name, good)
        assert sorted(code for _, code in bad) == sorted(codes), (name, bad)
        for key in wanted.get("bad_keys", []):
            if "(" not in key:  # `(cut)` and such stand for what has no key
                assert key in {k for k, _ in bad} | set(good), (name, key)


def test_other_libraries_tars_are_read_or_reported(test_data: Path) -> None:
    folder = test_data / "data" / "broken"
    names = [name for name in json.loads((folder / "expected.json").read_text("utf-8")) if "tars_others/" in name]
    assert len(names) == 36
    codes: Counter[str] = Counter()
    for name in names:
        good, bad = judge(folder / name)
        assert not good, "none holds a sample"
        codes.update({code for _, code in bad})
    assert codes == {
        "tar_empty": 23,
        "sample_unknown": 8,
        "member_unsafe": 5,
        "tar_not_a_tar": 1,
        "tar_truncated": 1,
    }


def test_other_projects_shards_are_reported_key_by_key(test_data: Path) -> None:
    folder = test_data / "data" / "wild"
    found = {path.name: judge(path) for path in sorted(folder.iterdir()) if path.suffix in (".tar", ".tgz")}
    assert not any(good for good, _ in found.values()), "none holds texts"
    rows = {name: Counter(code for _, code in bad) for name, (_, bad) in found.items()}
    assert rows == {
        "AFL__small_archive.tar": {"tar_empty": 1},
        "aistore__small-mnist-3.tar": {"sample_unknown": 3},
        "clip-retrieval__image2.tar": {"sample_unknown": 3},
        "clip-retrieval__image4.tar": {"sample_unknown": 2},
        "data__Annotations.tar": {"sample_unknown": 6},
        "data__bytes.tar": {"sample_unknown": 3},
        "data__json.tar": {"sample_unknown": 3},
        "lhotse__recording.000000.tar": {"sample_unknown": 2},
        "ml-mdm__images_00000.tar": {"sample_unknown": 1},
        "webdataset__compressed.tar": {"sample_unknown": 3},
        "webdataset__sample.tgz": {"sample_unknown": 90},
        "webdataset__testgz.tar": {"sample_unknown": 1000},
    }
