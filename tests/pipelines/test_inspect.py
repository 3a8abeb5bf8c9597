from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_shards import png, record, sample_members, tar_bytes

from nexusgen.errors import InputError
from pipelines.inspect import inspect


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
    assert (found["images"], found["duplicate_images"]) == (5, 2)
    assert found["image_sizes"]["width"] == {"min": 8, "median": 8, "max": 20}
    assert found["by_licence"] == {"unknown": 2, "MIT": 1}
    # Three user's images of 2x2, 2x2 and (10x20 pixels) 2x3 tokens; two targets, each also a crop.
    assert found["embedded_bytes_estimate"] == (4 + 6 + 4 + 2 * 2 * 81) * 3584 * 2


def test_no_input_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="doesn't exist"):
        inspect(f"{tmp_path}/none.tar")


def test_photos(test_data: Path) -> None:
    found = inspect(f"{test_data}/data/photos/*.tar")
    assert found["by_task"] == {"generation": 256, "understanding": 702, "editing": 190}
    assert (found["samples"], found["editing_multi_reference"], found["quarantined"]) == (1148, 6, [])
