from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nexusgen import shapes
from nexusgen.errors import ConfigError
from nexusgen.images import decode_image
from nexusgen.schema import Sample
from pipelines.pack import PackConfig, pack
from pipelines.shards import ShardReader


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


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
    (folder / "generation-00001.tar").unlink()
    (folder / "notes.tar").write_bytes(b"not ours")
    repaired = pack(config(tmp_path, counts={"generation": 5}))
    assert repaired.samples == 2
    assert repaired.outputs["digests"] == first.outputs["digests"][2:5]
    assert sorted(path.name for path in folder.glob("*.tar")) == [
        *(f"generation-{i:05d}.tar" for i in range(3)),
        "notes.tar",
    ]
    assert json.loads((folder / "run.json").read_text())["run_id"]
    assert pack(config(tmp_path, counts={"generation": 5}, seed=1)).samples == 5


def test_nothing_to_pack_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to pack"):
        pack(config(tmp_path, counts={"generation": 0}))
