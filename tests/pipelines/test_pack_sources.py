from __future__ import annotations

import datetime
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_shards import png

from nexusgen.errors import ConfigError, InputError, SampleError
from nexusgen.schema import REASON_CODES
from pipelines import pack_sources
from pipelines.pack_sources import (
    Content,
    JsonlSource,
    Keys,
    Loaded,
    PairSource,
    ParquetSource,
    Place,
    Source,
    read_ahead,
    safe_key,
    to_members,
)

JPEG = io.BytesIO()
Image.new("RGB", (9, 8), "green").save(JPEG, "JPEG")
DRAWN = [{"role": "user", "content": "画一个圆"}, {"role": "assistant", "content": "好的：<image>"}]


def read(source: Source, start: Place | None = None) -> list[Loaded]:
    return list(read_ahead(source.records(start or Place())))


def contents(source: Source) -> dict[str, Content]:
    found = {}
    for record, outcome in read(source):
        assert isinstance(outcome, Content), outcome
        found[record.key] = outcome
    return found


def refusals(loaded: Iterable[Loaded]) -> list[tuple[str, str, str]]:
    found = [
        (record.key, error.reason_code, error.member) for record, error in loaded if isinstance(error, SampleError)
    ]
    assert {code for _, code, _ in found} <= set(REASON_CODES)
    return found


def write_lines(path: Path, lines: Iterable[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


# ---- jsonl ----


def test_lines_name_images_below_the_jsonls_folder_or_a_root(tmp_path: Path) -> None:
    (tmp_path / "in" / "图 片").mkdir(parents=True)
    (tmp_path / "in" / "图 片" / "甲.PNG").write_bytes(png())
    line = {"id": "a", "images": ["图 片/甲.PNG"], "messages": DRAWN, "license": "CC0"}
    absolute = {**line, "id": "b", "images": [f"{tmp_path}/in/图 片/甲.PNG"]}
    write_lines(tmp_path / "in" / "x.jsonl", [line, "", absolute])
    found = contents(JsonlSource(str(tmp_path / "in"), None))
    assert list(found) == ["a", "b"]
    assert found["a"].pictures == (("图 片/甲.PNG", png()),)
    assert found["a"].fields == line
    write_lines(tmp_path / "other" / "y.jsonl", [line])
    assert list(contents(JsonlSource(f"{tmp_path}/other/*.jsonl", f"{tmp_path}/in"))) == ["a"]
    ((key, code, member),) = refusals(read(JsonlSource(f"{tmp_path}/other", None)))
    assert (key, code, member) == ("a", "member_missing", "图 片/甲.PNG")
    with pytest.raises(InputError, match=r"holds no \.jsonl file"):
        JsonlSource(str(tmp_path / "in" / "图 片"), None)


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/etc/x.png", "s3://bucket/x.png", "\0.png"])
def test_names_that_lead_out_of_the_root_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    write_lines(tmp_path / "in" / "x.jsonl", [{"images": [name], "messages": DRAWN}])
    assert refusals(read(JsonlSource(f"{tmp_path}/in", None))) == [("x-00000001", "member_unsafe", name)]


def test_a_root_of_all_the_machine_takes_absolute_names(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    write_lines(tmp_path / "in" / "x.jsonl", [{"images": [f"{tmp_path}/a.png"], "messages": DRAWN}])
    assert contents(JsonlSource(f"{tmp_path}/in", "/"))["x-00000001"].pictures == ((f"{tmp_path}/a.png", png()),)


def test_malformed_lines_are_refused_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_sources, "MAX_LINE_BYTES", 200)
    (tmp_path / "dir.png").mkdir()
    lines = [
        "{broken",
        "[1]",
        {"id": "list", "images": "a.png", "messages": DRAWN},
        {"id": "long", "text": "x" * 1000},
        {"id": "folder", "images": ["dir.png"], "messages": DRAWN},
        {"id": "good", "messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]},
    ]
    path = write_lines(tmp_path / "x.jsonl", lines)
    path.write_bytes(path.read_bytes() + b"\xff\xfe")
    loaded = read(JsonlSource(str(path), None))
    assert refusals(loaded) == [
        ("x-00000001", "json_invalid", ""),
        ("x-00000002", "json_invalid", ""),
        ("list", "json_invalid", ""),
        ("x-00000004", "text_too_long", ""),
        ("folder", "member_missing", "dir.png"),
        ("x-00000007", "json_invalid", ""),
    ]
    assert [record.where for record, _ in loaded] == [f"line {number}" for number in range(1, 8)]


def test_a_file_that_cannot_be_read_ends_the_job_and_an_absent_one_is_a_bad_sample(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    absent = ["none.png", "a.png/b.png", f"{'x' * 300}.png", "\ud800.png"]
    path = write_lines(tmp_path / "x.jsonl", [json.dumps({"images": [name], "messages": DRAWN}) for name in absent])
    assert [(code, member) for _, code, member in refusals(read(JsonlSource(str(path), None)))] == [
        ("member_missing", name) for name in absent
    ]
    (tmp_path / "bad.png").symlink_to("/proc/self/mem")  # exists, but its first byte gives EIO
    write_lines(path, [{"images": ["bad.png"], "messages": DRAWN}])
    with pytest.raises(InputError, match=r"cannot read .*/bad\.png: .*Input/output error.*start the job again"):
        read(JsonlSource(str(path), None))


def test_a_picture_larger_than_a_reader_takes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_sources, "MAX_MEMBER_BYTES", 1000)
    (tmp_path / "a.png").write_bytes(bytes(1001))
    path = write_lines(tmp_path / "x.jsonl", [{"images": ["a.png"], "messages": DRAWN}])
    assert refusals(read(JsonlSource(str(path), None))) == [("x-00000001", "member_too_large", "a.png")]


# ---- pictures with texts ----


def test_pairs_are_found_in_folders_below_with_their_fields(tmp_path: Path) -> None:
    for name in ("a/1.JPG", "a/2.webp", "b/c/1.png", "a/.hidden.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png("red"))
    (tmp_path / "a" / "1.txt").write_bytes(b"\xef\xbb\xbfA red square.\r\n")
    (tmp_path / "a" / "2.txt").write_text("一个红色的方块")
    (tmp_path / "b" / "c" / "1.json").write_text('{"caption": "Blue <image>", "license": "CC-BY", "url": "u"}')
    found = contents(PairSource(str(tmp_path), "generation"))
    assert list(found) == ["a_1", "a_2", "b_c_1"]
    assert "A red square." in found["a_1"].fields["messages"][0]["content"]
    assert found["a_1"].pictures[0][0].endswith("a/1.JPG")
    assert (found["a_2"].fields["lang"], found["a_2"].fields["id"]) == ("zh", "a/2")
    assert found["b_c_1"].fields["license"] == "CC-BY"
    assert "Blue < image >" in found["b_c_1"].fields["messages"][0]["content"]
    told = contents(PairSource([str(tmp_path / "a")], "understanding"))
    assert told["1"].fields["messages"][0]["content"].startswith("<image>")


def test_a_picture_or_text_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.txt").write_text("alone")
    for stem, text in (("c", b" \n"), ("d", b"\xff\xfe")):
        (tmp_path / f"{stem}.png").write_bytes(png())
        (tmp_path / f"{stem}.txt").write_bytes(text)
    codes = [(key, code) for key, code, _ in refusals(read(PairSource(str(tmp_path), "generation")))]
    assert codes == [("a", "member_missing"), ("b", "member_missing"), ("c", "text_invalid"), ("d", "text_invalid")]
    with pytest.raises(InputError, match="is not a folder"):
        PairSource(str(tmp_path / "b.txt"), "generation")


def test_stamps_of_folders_tell_a_change(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.png").write_bytes(png())
    source = PairSource(str(tmp_path), "generation")
    before = list(source.stamps())
    assert list(source.stamps()) == before
    (tmp_path / "deep" / "a.txt").write_text("more")
    assert list(source.stamps()) != before


# ---- Parquet ----


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> str:
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def test_hugging_faces_columns_are_found_and_others_kept(tmp_path: Path) -> None:
    image = pa.array(
        [{"bytes": png(), "path": "x.PNG"}, {"bytes": JPEG.getvalue(), "path": None}],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    day = pa.array([datetime.date(2026, 1, 2), None])
    columns = {"id": [7, 8], "image": image, "text": ["圆", "A square"], "licence": ["CC0", None], "day": day}
    path = write_parquet(tmp_path / "x.parquet", {**columns, "score": [float("nan"), 1.5]})
    found = contents(ParquetSource(path, None, None, None, "generation"))
    assert found["7"].pictures == (("x.PNG", png()),)
    fields = {name: found["7"].fields[name] for name in ("id", "text", "licence", "day", "score", "lang")}
    assert fields == {"id": "7", "text": "圆", "licence": "CC0", "day": "2026-01-02", "score": None, "lang": "zh"}
    assert list(to_members("8", found["8"])) == ["0.jpg", "json"], "named by its content"


def test_named_columns_and_rows_without_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = {
        "a": pa.array([png(), None, png()], pa.large_binary()),
        "mask": pa.array([b"1", b"2", b"3"]),
        "long": ["one", "two", ""],
        "short": ["1", "2", "3"],
    }
    path = write_parquet(tmp_path / "x y.parquet", columns)
    with pytest.raises(ConfigError, match="image_column = None: set it to one of a, mask"):
        ParquetSource(path, None, None, None, "generation")
    with pytest.raises(ConfigError, match=r"text_column = 'x'.*one of long, short"):
        ParquetSource(path, "a", "x", None, "generation")
    with pytest.raises(ConfigError, match="id_column = 'x'"):
        ParquetSource(path, "a", "long", "x", "generation")
    loaded = read(ParquetSource(path, "a", "long", None, "understanding"))
    assert "columns mask hold bytes" in capsys.readouterr().err
    assert refusals(loaded) == [("x_y-00000002", "member_missing", ""), ("x_y-00000003", "text_invalid", "")]
    (_, content) = loaded[0]
    assert isinstance(content, Content)
    assert content.fields["messages"][1]["content"] == "one"


def test_a_damaged_or_different_file_is_one_refusal(tmp_path: Path) -> None:
    write_parquet(tmp_path / "1.parquet", {"image": [png()], "text": ["one"]})
    (tmp_path / "2.parquet").write_bytes(b"PAR1 not really")
    write_parquet(tmp_path / "3.parquet", {"image": [png()], "caption": ["three"]})
    write_parquet(tmp_path / "4.parquet", {"image": [png()], "text": ["four"]})
    loaded = read(ParquetSource(str(tmp_path), None, None, None, "generation"))
    assert [(code) for _, code, _ in refusals(loaded)] == ["tar_unreadable"] * 2
    assert [record.key for record, outcome in loaded if isinstance(outcome, Content)] == ["1-00000001", "4-00000001"]
    (tmp_path / "1.parquet").write_bytes(b"")
    with pytest.raises(InputError, match="can't be read as Parquet"):
        ParquetSource(str(tmp_path), None, None, None, "generation")


# ---- what all sources hold to ----


def sources(folder: Path) -> Iterator[Source]:
    for part in ("a", "b"):
        for number in range(3):
            (folder / part / "deep").mkdir(parents=True, exist_ok=True)
            (folder / part / "deep" / f"{number}.png").write_bytes(png(size=(8, 9 + number)))
            (folder / part / "deep" / f"{number}.txt").write_text(f"{part} {number}")
        lines = [{"id": n, "images": [f"{part}/deep/{n}.png"], "messages": DRAWN} for n in range(3)]
        write_lines(folder / f"{part}.jsonl", [lines[0], "", "{", *lines[1:]])
        rows = {"image": [png(size=(8, 9 + n)) for n in range(40)], "text": [f"{part} {n}" for n in range(40)]}
        write_parquet(folder / f"{part}.parquet", rows, row_group_size=25)
    yield JsonlSource(str(folder), None)
    yield PairSource([f"{folder}/a", f"{folder}/b"], "generation")
    yield ParquetSource(str(folder), None, None, None, "generation")


def test_reading_goes_on_from_any_place(tmp_path: Path) -> None:
    for source, count in zip(sources(tmp_path), (8, 6, 80), strict=True):
        every = read(source)
        assert len(every) == count
        whole = [(record.key, record.where, record.end, str(outcome)) for record, outcome in every]
        for index, (record, _) in enumerate(every):
            rest = read(source, record.end)
            assert [(r.key, r.where, r.end, str(outcome)) for r, outcome in rest] == whole[index + 1 :]


# ---- keys ----


@pytest.mark.parametrize(
    ("identity", "key"),
    [
        ("zh_EliGen_110152", "zh_EliGen_110152"),
        ("a/b.c\\..", "a_b_c"),
        ("图片-1", "图片-1"),
        ("__info__", "info"),
        (184854, "184854"),
        ("..", ""),
        ("", ""),
        (None, ""),
        (["x"], ""),
        ("\ud800a", "a"),
    ],
)
def test_ids_become_safe_keys(identity: object, key: str) -> None:
    assert safe_key(identity) == key


def test_long_ids_are_cut_and_stay_apart() -> None:
    one, two = safe_key("图" * 100 + "1"), safe_key("图" * 100 + "2")
    assert one != two
    assert max(len(one.encode()), len(two.encode())) <= pack_sources.MAX_KEY_BYTES


def test_a_key_that_comes_again_gets_the_first_free_number() -> None:
    keys = Keys()
    assert [keys.take(key) for key in ("a", "b", "a-2", "a", "a", "a-2")] == ["a", "b", "a-2", "a-3", "a-4", "a-2-2"]
    keys.close()
    again = Keys()
    assert all(again.add(key) for key in ("a", "b", "a-2", "a-3"))
    assert again.take("a") == "a-4", "the same, whoever gave the first ones"
    again.close()


# ---- members ----


def test_members_keep_bytes_and_extensions() -> None:
    pictures = (("x.JPeG", JPEG.getvalue()), ("no-extension", png()), ("a.b.dat", JPEG.getvalue()))
    messages = [{"role": "user", "content": "<image><image><image>?"}, {"role": "assistant", "content": "!"}]
    members = to_members("k", Content({"images": ["?"], "messages": messages, "source": "网"}, pictures))
    assert {name: members[name] for name in list(members)[:3]} == {
        "0.JPeG": JPEG.getvalue(),
        "1.png": png(),
        "2.jpg": JPEG.getvalue(),
    }
    expected = {"id": "k", "images": ["0.JPeG", "1.png", "2.jpg"], "messages": messages, "source": "网"}
    assert json.loads(members["json"]) == expected


@pytest.mark.parametrize(
    ("fields", "data", "code"),
    [
        ({"messages": DRAWN}, b"", "image_undecodable"),
        ({"messages": DRAWN}, b"<html>", "image_undecodable"),
        ({"messages": DRAWN[:1]}, png(), "messages_invalid"),
        ({"conversations": DRAWN}, png(), "messages_invalid"),
        ({"messages": DRAWN, "note": "\ud800"}, png(), "text_invalid"),
    ],
)
def test_what_a_reader_would_refuse_isnt_packed(fields: dict[str, Any], data: bytes, code: str) -> None:
    with pytest.raises(SampleError) as caught:
        to_members("k", Content(fields, (("x.png", data),)))
    assert caught.value.reason_code == code
