from pathlib import Path

from test_embed import write_tars

from pipelines.slices import SliceRules, read_slices


def test_slices_are_cut_by_samples_and_by_bytes(tmp_path: Path) -> None:
    write_tars(tmp_path)
    shard = f"{tmp_path}/tars/b.tar"
    sizes = [len(item.samples) for item in read_slices(shard, SliceRules(max_samples=2)) if not isinstance(item, dict)]
    assert sizes == [2, 1]
    *slices, end = read_slices(shard, SliceRules(max_bytes=1))
    assert [len(item.samples) for item in slices if not isinstance(item, dict)] == [1, 1, 1]
    assert isinstance(end, dict)
    assert (end["num_slices"], len(end["digest"])) == (3, 64)
