import json
from pathlib import Path

import pytest
from test_embed import write_tars
from test_shards import png, sample_members, tar_bytes

from nexusgen.errors import InputError
from pipelines.slices import Slice, SliceRules, check_names, read_slices


def test_slices_are_cut_by_samples_and_by_bytes(tmp_path: Path) -> None:
    write_tars(tmp_path)
    shard = f"{tmp_path}/tars/b.tar"
    assert [len(item.samples) for item in slices_of(shard, SliceRules(max_samples=2))] == [2, 1]
    assert [len(item.samples) for item in slices_of(shard, SliceRules(max_bytes=1))] == [1, 1, 1]


def test_a_shards_end_comes_with_its_last_slice(tmp_path: Path) -> None:
    write_tars(tmp_path)
    first, (last, end) = read_slices(f"{tmp_path}/tars/b.tar", SliceRules(max_samples=2))
    assert [isinstance(item, Slice) for item in (*first, last)] == [True, True]
    assert isinstance(end, dict)
    assert (end["num_slices"], len(end["digest"])) == (2, 64)
    ((last, end),) = read_slices(f"{tmp_path}/absent.tar", SliceRules())
    assert isinstance(last, Slice)
    assert len(last.rejected) == 1
    assert isinstance(end, dict)
    assert (end["num_slices"], end["digest"]) == (1, "")


def slices_of(shard: str | Path, rules: SliceRules) -> list[Slice]:
    return [item for items in read_slices(str(shard), rules) for item in items if isinstance(item, Slice)]


def test_bad_samples_and_texts_fill_a_slice_too(tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    unusable = [(f"u{number}.json", b"{}") for number in range(5)]
    shard.write_bytes(tar_bytes([*sample_members("a"), *unusable, *sample_members("b")]))
    found = slices_of(shard, SliceRules(max_samples=3))
    assert [(len(item.samples), len(item.rejected)) for item in found] == [(1, 2), (0, 3), (1, 0)]
    messages = [{"role": "user", "content": "x" * 1000}, {"role": "assistant", "content": "<image>"}]
    members = []
    for key, meta in (("a", ""), ("b", "y" * 5000), ("c", ""), ("d", "")):
        record = {"images": ["0.png"], "messages": messages, "note": meta}
        members += [(f"{key}.0.png", png()), (f"{key}.json", json.dumps(record).encode())]
    shard.write_bytes(tar_bytes(members))
    found = slices_of(shard, SliceRules(max_bytes=4000))
    assert [[sample.key for sample in item.samples] for item in found] == [["a"], ["b"], ["c", "d"]]


def test_names_that_clash_are_refused() -> None:
    shards = [f"s3://b/{number}/s.tar" for number in range(200_000)]
    with pytest.raises(InputError, match=r"s3://b/\d+/s.tar and s3://b/\d+/s.tar would both write slices named s-"):
        check_names(shards)
    check_names([*shards[:1000], *shards[:1000]])  # the same shard twice is no clash
