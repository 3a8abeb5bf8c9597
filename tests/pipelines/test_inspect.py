from __future__ import annotations

import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_shards import png, record, sample_members, tar_bytes

from jobs.inspect import describe
from nexusgen.errors import InputError
from nexusgen.model.manifest import demo_base
from nexusgen.prompts import encode_text, load_tokenizer
from pipelines import inspect as inspect_module
from pipelines.inspect import NUM_SHOWN, Found, Shown, inspect
from pipelines.report import draw_samples, write_report


def pair_members(key: str, caption: str = "a red circle", colour: str = "red") -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", png(colour)), (f"{key}.txt", caption.encode())]


def test_counts_and_problems(tmp_path: Path) -> None:
    edit = record(
        "<image><image> Join", "<image>", ("0.png", "1.png", "2.png"), license="MIT", origin="tests", lang="zh"
    )
    members = [
        *sample_members("a"),
        ("e.0.png", png()), ("e.1.png", png("blue", (20, 10))), ("e.2.png", png("green")), ("e.json", edit),
        ("u.0.png", png()), ("u.json", record("<image> What?", "A circle.")),
        ("bad.0.png", png()[:40]), ("bad.json", record()),
        ("none.json", record()),
    ]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    (tmp_path / "b.tar").write_bytes(b"no tar")
    found = inspect(str(tmp_path))
    json.dumps(found)
    assert (found["shards"], found["samples"]) == (2, 3)
    assert found["by_task"] == {"understanding": 1, "generation": 1, "editing": 1}
    assert found["by_language"] == {"en": 2, "zh": 1}
    assert found["editing_multi_reference"] == 1
    assert [(row["key"], row["reason_code"]) for row in found["quarantined"]] == [
        ("bad", "image_undecodable"), ("none", "member_missing"), ("", "tar_not_a_tar"),
    ]  # fmt: skip
    assert {row["shard"] for row in found["quarantined"]} == {f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"}
    assert found["quarantined_total"] == sum(found["quarantined_by_code"].values()) == 3
    assert (found["images"], found["duplicate_images"]) == (5, 2)
    assert found["image_sizes"]["width"] == {"min": 8, "median": 8, "mean": 10.4, "p95": 20, "max": 20}
    assert found["image_sizes"]["most_common"] == {"8x8": 4, "10x20": 1}
    assert found["by_licence"] == {"unknown": 2, "MIT": 1}
    assert found["by_source"] == {"unknown": 2, "tests": 1}
    # Three user's images of 2x2, 2x2 and (10x20 pixels) 2x3 tokens; two targets, each also a crop.
    assert found["embedded_bytes_estimate"] == (4 + 6 + 4 + 2 * 2 * 81) * 3584 * 2


def test_texts_are_measured_in_tokens_of_the_demo_base(tmp_path: Path) -> None:
    captions = [f"a circle and {'a square and ' * number}a cross <|im_end|>" for number in range(5)]
    members = [member for number, text in enumerate(captions) for member in pair_members(f"k{number}", text)]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    found = inspect(str(tmp_path), "understanding")["text_tokens"]
    tokenizer = load_tokenizer(demo_base() / "autoregressive")
    expected = [len(encode_text(tokenizer, f"\nDescribe this image.\n{text}")) for text in captions]
    assert found["tokenizer"] == "demo-base"
    assert (found["min"], found["median"], found["max"]) == (expected[0], expected[2], expected[4])


def test_duplicates_name_where_they_are(tmp_path: Path) -> None:
    first = [*pair_members("a", "one"), *pair_members("b", "two", "blue"), *pair_members("c", "three", "green")]
    second = [*pair_members("d", "two", "blue"), *pair_members("e", "four", "blue")]
    (tmp_path / "1.tar").write_bytes(tar_bytes(first))
    (tmp_path / "2.tar").write_bytes(tar_bytes(second))
    found = inspect(str(tmp_path))
    places = [{"shard": f"{tmp_path}/{number}.tar", "key": key} for number, key in ((1, "b"), (2, "d"), (2, "e"))]
    assert (found["duplicate_images"], found["duplicate_samples"]) == (2, 1)
    assert found["duplicate_groups"] == {
        "images": [{"count": 3, "first": places}],
        "samples": [{"count": 2, "first": places[:2]}],
    }


def test_shards_of_another_convention_are_named(tmp_path: Path) -> None:
    for name, members in (
        ("1", sample_members("a")),
        ("2", sample_members("b")),
        ("3", pair_members("c")),
        ("4", [*sample_members("d"), *pair_members("e")]),
    ):
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(members))
    found = inspect(str(tmp_path))["conventions"]
    assert found == {
        "samples": {"nexus-gen": 3, "img2dataset": 2},
        "shards": {"nexus-gen": 2, "img2dataset": 1, "mixed": 1},
        "majority": "nexus-gen",
        "odd_shards": [
            {"shard": f"{tmp_path}/3.tar", "convention": "img2dataset"},
            {"shard": f"{tmp_path}/4.tar", "convention": "mixed"},
        ],
    }


def test_what_is_kept_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MAX_NAMES", 3), ("MAX_SIZES", 3), ("MAX_ROWS", 4), ("MAX_GROUPS", 2), ("MAX_PLACES", 2)):
        monkeypatch.setattr(inspect_module, name, value)
    for shard in range(10):
        members = [(f"bad{number}.json", b"{") for number in range(3)]
        for number in range(4):
            url = f'{{"url": "https://place{shard}.org/{number}?x", "license": "CC{shard % 2}"}}'.encode()
            members += [*pair_members(f"k{number}", "x", ("red", "blue")[number % 2]), (f"k{number}.json", url)]
        (tmp_path / f"{shard}.tar").write_bytes(tar_bytes(members))
    found = inspect(str(tmp_path))
    assert (len(found["quarantined"]), found["quarantined_total"]) == (4, 30)
    assert len(found["by_source"]) <= 7
    assert sum(found["by_source"].values()) == sum(found["by_licence"].values()) == 40
    assert found["by_source"][inspect_module.OTHERS] >= 12
    assert [group["count"] for group in found["duplicate_groups"]["images"]] == [20, 20]
    assert [len(group["first"]) for group in found["duplicate_groups"]["images"]] == [2, 2]


def test_few_shards_are_read_before_the_first_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_begun = num_merged = most = 0
    merge = Found.merge

    class Pool(ThreadPoolExecutor):
        def submit(self, *call: Any, **options: Any) -> Future[Any]:
            nonlocal num_begun, most
            num_begun += 1
            most = max(most, num_begun - num_merged)
            return super().submit(*call, **options)

    def noted(total: Found, other: Found) -> None:
        nonlocal num_merged
        num_merged += 1
        merge(total, other)

    monkeypatch.setattr(inspect_module, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(Found, "merge", noted)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    for shard in range(20):
        (tmp_path / f"{shard:02d}.tar").write_bytes(tar_bytes(pair_members(f"k{shard}")))
    shown: list[Shown] = []
    assert inspect(str(tmp_path), shown=shown)["samples"] == 20
    assert (num_begun, num_merged, len(shown)) == (20, 20, 20)
    assert most <= 3 * inspect_module.AHEAD_PER_THREAD


def test_samples_to_show_are_one_draw_in_any_order() -> None:
    def shown(rank: int) -> Shown:
        return Shown(rank, "s", f"k{rank}", "generation", "en", (), (), 0)

    totals = []
    for order in (range(200), reversed(range(200))):
        total = Found()
        for rank in order:
            total.merge(Found(shown=[shown(rank)]))
        totals.append([sample.rank for sample in total.shown])
    assert totals[0] == totals[1] == list(range(NUM_SHOWN))


def test_the_report_shows_samples_counts_and_problems(tmp_path: Path) -> None:
    edit = record("<image> Make it <b>blue</b> & round", "<image>", ("0.png", "1.png"), origin="样本 $x^2$")
    members = [
        *(member for number in range(30) for member in pair_members(f"k{number:02d}", "一个红色的圆")),
        ("e.0.png", png()), ("e.1.png", png("blue", (40, 20))), ("e.json", edit),
        ("bad.0.png", png()[:40]), ("bad.json", record()),
    ]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    shown: list[Shown] = []
    found = inspect(f"{tmp_path}/a.tar", shown=shown)
    assert [sample.task for sample in shown] == ["generation"] * NUM_SHOWN + ["editing"]
    folder = tmp_path / "report"
    folder.mkdir()
    names = [path.name for path in write_report(folder, found, "as text", shown)]
    assert names == [
        "inspect.json", "inspect.txt", "samples-generation.png", "samples-editing.png", "histograms.png",
        "inspect.html",
    ]  # fmt: skip
    assert json.loads((folder / "inspect.json").read_text("utf-8")) == json.loads(json.dumps(found))
    with Image.open(folder / "samples-generation.png") as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 20) or []}
        assert (255, 0, 0) in colours
    with Image.open(folder / "histograms.png") as histograms:
        assert histograms.width >= 1000
    page = (folder / "inspect.html").read_text("utf-8").replace("<wbr>", "")  # where a long name may be broken
    for text in ("一个红色的圆", "Make it &lt;b&gt;blue&lt;/b&gt; &amp; round", "image_undecodable", "as text"):
        assert text in page
    assert page.count('src="data:image/png') == NUM_SHOWN + 2 + 1  # and the histograms
    assert "://" not in page


def test_a_report_says_how_many_bad_samples_it_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.tar").write_bytes(tar_bytes([(f"bad{number}.json", b"{") for number in range(60)]))
    for limit, listed in ((100, "all"), (55, "the first 55")):
        monkeypatch.setattr(inspect_module, "MAX_ROWS", limit)
        found = inspect(f"{tmp_path}/x.tar")
        text = describe(found)
        assert text.endswith(f"... 40 more; --json and the inspect.json of --report list {listed}")
        write_report(tmp_path, found, text, [])
        page = (tmp_path / "inspect.html").read_text().replace("<wbr>", "")
        assert "<h2>Quarantined: 60, of which the first 50; more in inspect.json</h2>" in page
        assert page.count("<td>json_invalid</td>") == 50


def test_the_report_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar")
    shown: list[Shown] = []
    found = inspect(f"{tmp_path}/a.tar", shown=shown)
    names = {path.name for path in write_report(tmp_path, found, "", shown)}
    assert names == {"inspect.json", "inspect.txt", "histograms.png", "inspect.html"}
    assert draw_samples(shown, "editing") is None


def test_no_input_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="doesn't exist"):
        inspect(f"{tmp_path}/none.tar")


def test_photos(test_data: Path) -> None:
    found = inspect(f"{test_data}/data/photos/*.tar")
    assert found["by_task"] == {"generation": 256, "understanding": 702, "editing": 190}
    assert (found["samples"], found["editing_multi_reference"], found["quarantined"]) == (1148, 6, [])
    assert (found["duplicate_images"], found["conventions"]["shards"]["nexus-gen"]) == (75, 11)
