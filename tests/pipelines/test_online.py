"""Embeddings that are made while a training runs, beside those that `embed` stored of the same tars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from test_embed import a_config
from test_loop import assert_same_training, run_ranks
from test_train import exported, make_config, recorded

from nexusgen.errors import InputError
from nexusgen.model.weights import load_model
from pipelines import checkpoint, embedded
from pipelines.embed import embed
from pipelines.loaded_slice import LoadedSlice
from pipelines.loop import Ranks, run_training
from pipelines.online import OnlineEncoder
from pipelines.pack import PackConfig, pack
from pipelines.stages import STAGES, build_stage
from pipelines.train import TrainConfig
from pipelines.train_plan import plan_training

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def storage_uri(tmp_path_factory: pytest.TempPathFactory, model: Path, ray_cluster: Any) -> str:
    """A storage with a few tars of the demo world, named n, embedded in the modes vision and images."""
    folder = tmp_path_factory.mktemp("online")
    counts = {"generation": 20, "editing": 12, "understanding": 12}
    settings = {"storage": f"{folder}/storage", "name": "n", "counts": counts, "samples_per_shard": 16}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        pack(PackConfig.model_validate(settings))
        for mode in ("vision", "images"):
            embed(a_config(folder, model, mode, input=f"{folder}/storage/tars/n", slice_samples=7))
    return f"{folder}/storage"


def a_training(storage_uri: str, model: Path, **values: Any) -> TrainConfig:
    return make_config(storage_uri, model, **({"data": "n", "batch_samples": 8, "embeddings": "online"} | values))


def slices_of(storage_uri: str, mode: Any) -> list[embedded.SliceInfo]:
    return embedded.list_slices(storage_uri, "n", mode)


def test_rows_made_of_pictures_are_those_that_embed_stores(storage_uri: str, model: Path) -> None:
    stage = build_stage("ar", model, "logit_normal")
    encoder = OnlineEncoder(model, stage.roles["vision"], CPU)
    stored, kept = slices_of(storage_uri, "vision"), slices_of(storage_uri, "images")
    assert [(Path(info.uri).name, info.num_rows) for info in kept] == [
        (Path(info.uri).name, info.num_rows) for info in stored
    ]
    num_images = 0
    for info, images in zip(stored, kept, strict=True):
        rows, made = embedded.read_slice(info), encoder.encode(embedded.read_slice(images))
        for column in ("key", "shard", "row", "task", "lang", "messages", "num_tokens"):
            assert made[column].to_pylist() == rows[column].to_pylist()
        ours, theirs = (LoadedSlice({"vision": table}, stage, "x") for table in (made, rows))
        for place in range(len(rows)):
            one, other = ours.prepared(place), theirs.prepared(place)
            assert one.inputs.shape == other.inputs.shape
            assert (one.inputs.dtype, one.targets.dtype) == (other.inputs.dtype, other.targets.dtype)
            # Another company in the forward, and another kernel of attention: at most the last bit of bfloat16.
            for name in ("inputs", "targets"):
                torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=2**-7, atol=1e-3)
            num_images += len(one.inputs) > 0
            num_images += len(one.targets) > 0
    assert num_images == 20 + 2 * 12 + 12


def test_a_training_on_pictures_is_that_on_stored_embeddings(storage_uri: str, model: Path, tmp_path: Path) -> None:
    """And the same on two ranks, each of which encodes its own rows alone."""
    stored, online = (
        a_training(storage_uri, model, name=way, num_steps=8, embeddings=way) for way in ("stored", "online")
    )
    by_two = a_training(storage_uri, model, name="by-two", num_steps=8, num_workers=2)
    expected, records = run_ranks([stored, online], 1, tmp_path)
    assert_same_training(records, expected, tolerance=1e-3)
    (shared,) = run_ranks([by_two], 2, tmp_path)
    assert_same_training(shared, expected, tolerance=1e-3)


def test_a_resumed_training_on_pictures_equals_an_undisturbed_one_bit_for_bit(
    storage_uri: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16, whose attention on a CPU is chosen for the whole process while a thread encodes; over two epochs."""
    whole, broken = (a_training(storage_uri, model, name=name, precision="bf16") for name in ("whole", "broken"))
    with recorded(monkeypatch) as undisturbed:
        run_training(whole, "r", Ranks(), None)
    with recorded(monkeypatch, stop_after=8) as first, pytest.raises(KeyboardInterrupt):
        run_training(broken, "r", Ranks(), None)
    with recorded(monkeypatch) as second:
        run_training(broken, "r", Ranks(), None)
    assert [record.step for record in second] == list(range(5, 12))
    losses = {record.step: record.losses for record in [*first, *second]}
    assert losses == {record.step: record.losses for record in undisturbed}
    places = [checkpoint.latest(checkpoint.stage_folder(storage_uri, c.name, "ar")) for c in (whole, broken)]
    ours, theirs = (exported(place, tmp_path) for place in places if place is not None)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_what_can_not_be_made_online_is_refused(storage_uri: str, model: Path, tmp_path: Path) -> None:
    for stage in set(STAGES) - {"ar"}:
        with pytest.raises(ValueError, match=f"embeddings=online is for stage ar; stage {stage} .*embeddings=stored"):
            a_training(storage_uri, model, stage=stage)
    for values in ({"dtype": "int8"}, {"gpus_per_encoder": 1}):
        with pytest.raises(ValueError, match="mode images encodes nothing: leave out dtype and gpus_per_encoder"):
            a_config(tmp_path, model, "images", **values)
    with pytest.raises(InputError, match=r"no embedded data 'absent' of mode images.*mode=images"):
        run_training(a_training(storage_uri, model, data="absent"), "r", Ranks(), None)

    # A picture that could be read once, and can't any more.
    rows = embedded.read_slice(slices_of(storage_uri, "images")[0]).to_pylist()
    rows[0]["images"] = [b"no picture"] * len(rows[0]["images"])
    schema = embedded.read_slice(slices_of(storage_uri, "images")[0]).schema
    with pytest.raises(InputError, match=f"sample {rows[0]['key']} of .*could be read when it was embedded"):
        OnlineEncoder(model, ("input", "target"), CPU).encode(pa.Table.from_pylist(rows, schema=schema))


def test_a_dry_run_tells_the_memory_of_the_tower(storage_uri: str, model: Path) -> None:
    stored, online = (
        plan_training(a_training(storage_uri, model, embeddings=way)).memory for way in ("stored", "online")
    )
    loaded = load_model(model, ["autoregressive"])
    assert loaded.autoregressive is not None
    tower = sum(parameter.nbytes for parameter in loaded.autoregressive.qwen.model.visual.parameters())
    assert {part: online[part] - stored.get(part, 0) for part in online if online[part] != stored.get(part)} == {
        "vision tower, frozen": tower
    }
