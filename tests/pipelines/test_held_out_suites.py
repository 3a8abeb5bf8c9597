"""Suites on samples whose answer is known: retrieval, losses, reconstruction, errors by position. Without Ray."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from suite_rows import rows_of
from tiny_training import make_embedded, make_tiny_model, write_shard

from nexusgen.base_training import IMAGE_SIZE
from nexusgen.errors import FingerprintError, InputError, ModelError
from nexusgen.model.manifest import read_manifest
from nexusgen.model.weights import Model, load_model
from nexusgen.picture_quality import psnr, ssim
from nexusgen.sampling import predict_edits, predict_embeddings, predict_images
from nexusgen.schema import Message
from nexusgen.statistics import mean_of_groups
from pipelines import embedded, evaluation_samples
from pipelines.arrays import decode_entry
from pipelines.evaluation_samples import (
    DemoWorldSamples,
    EvaluationSample,
    Samples,
    StoredSamples,
    drawing_prompt,
    drawn_image,
)
from pipelines.stages import EmbeddedRow, StoredImage
from pipelines.suite_embedding_prediction import EmbeddingPredictionSuite, teacher_forced
from pipelines.suite_held_out import HeldOutSuite, rank_targets
from pipelines.suite_reconstruction import ReconstructionSuite

DRAWN: dict[str, Any] = {"seed": 0, "steps": 2, "num_pictures": 5, "batch_size": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(make_tiny_model(tmp_path_factory.mktemp("model")))


def stored(storage_uri: str, data: str = "held-out", digest: str = "", max_samples: int = 30) -> StoredSamples:
    return StoredSamples(storage=storage_uri, data=data, data_digest=digest, max_samples=max_samples)


def held_out(samples: StoredSamples, **changes: Any) -> HeldOutSuite:
    return HeldOutSuite(samples=samples, **({"num_targets": 4} | DRAWN | changes))


# --- retrieval and losses of held-out data ----------------------------------------------------------------------------


def test_ranks_count_the_targets_that_are_nearer() -> None:
    targets = torch.randn(40, 4, 8, generator=torch.Generator().manual_seed(0)) + 5  # a large common part
    exact, num_targets = rank_targets(targets + 0.1, targets, 16, seed=0)
    assert not exact.any()
    assert num_targets == 16
    wrong, _ = rank_targets(targets.roll(1, 0), targets, 40, seed=0)
    assert wrong.all()
    constant, _ = rank_targets(targets.mean(0, keepdim=True).expand_as(targets), targets, 16, seed=0)
    assert (constant == 0).mean() < 0.25
    # Half its own and a third of two others each: those come after it; the others' predictions the other way round.
    second = torch.cat([targets[:1] * 0.4 + targets[1:2] * 0.6, targets[1:]])
    ranks, _ = rank_targets(second, targets, 40, seed=0)
    assert ranks.tolist() == [1] + [0] * 39


def test_equal_targets_count_as_one() -> None:
    targets = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(1)).repeat(3, 1, 1)
    ranks, num_targets = rank_targets(targets, targets, 64, seed=0)
    assert not ranks.any()
    assert num_targets == 6


def test_every_sample_is_read_once(model: Model, tmp_path: Path) -> None:
    make_embedded(str(tmp_path), "held-out", model.folder, num_samples=30, rows_per_slice=9)
    suite = held_out(stored(str(tmp_path), digest="every"))
    suite.check(model.manifest)
    rows = rows_of(suite, model)
    drawn = [row for row in rows if row["kind"] == "drawn"]
    assert [row["key"] for row in drawn] == [f"sample-{n:04d}" for n in range(30) if n % 3 != 2]
    assert [row["key"] for row in rows[len(drawn) :]] == [f"sample-{n:04d}" for n in range(30) if n % 3 == 2]
    sources = [
        row
        for info in embedded.list_slices(str(tmp_path), "held-out", "vision")
        for row in embedded.read_slice(info).to_pylist()
        if row["target_index"]
    ]
    for row, source in zip(drawn, sources, strict=True):
        expected = decode_entry(source["target_data"][-1], source["target_dtype"], (4, 4)).float()
        assert row["target"] == expected.numpy().tobytes()
    assert [row["png"] is not None for row in drawn] == [n < 5 for n in range(20)]
    assert {row["generation_flow"] for row in rows} == {None}  # there is no tar to take pictures from
    scores = suite.summarise(rows).scores
    assert (scores["n"], scores["num_targets"], scores["chance"]) == (30, 4, {"recall_at_1": 0.25})
    assert scores["losses"]["mse_mean_embedding"] < scores["losses"]["mse"]  # the weights are random
    assert {"ce", "ce_generation", "ce_editing", "ce_understanding", "mse", "cosine_distance"} <= set(scores["losses"])
    assert {"recall_at_1", "recall_at_1_generation", "recall_at_1_editing"} <= set(scores)
    measured = suite.measures(rows)
    assert mean_of_groups(measured["losses/mse"]) == scores["losses"]["mse"]
    assert set(suite.summarise(rows).sheets) == {"samples"}
    pa.Table.from_pylist(rows, schema=suite.schema)


def test_recall_at_5_is_at_least_that_at_1(model: Model, tmp_path: Path) -> None:
    make_embedded(str(tmp_path), "held-out", model.folder, num_samples=30)
    suite = held_out(stored(str(tmp_path), digest="five"), num_targets=64, num_pictures=0)
    scores = suite.summarise(rows_of(suite, model)).scores
    assert scores["num_targets"] == 5  # the made-up data has so many distinct targets: five of five is no score
    assert "recall_at_5" not in scores
    rows = []
    for number in range(12):
        target = np.eye(12, dtype=np.float32)[number : number + 1]
        guess = target.copy()
        guess[0, (number + 1) % 12] += 1.5 if number % 2 else 0  # every second has one other before its own
        rows.append(
            {
                "kind": "drawn", "task": "generation", "num_tokens": 1, "target": target.tobytes(), "png": None,
                "prediction": guess.tobytes(), **dict.fromkeys(
                    ("ce", "mse", "cosine_distance", "generation_flow", "editing_flow"), 1.0
                ),
            }
        )  # fmt: skip
    scores = held_out(stored(str(tmp_path)), num_targets=12).summarise(rows).scores
    assert (scores["recall_at_1"], scores["recall_at_5"]) == (0.5, 1)
    assert scores["chance"] == {"recall_at_1": 1 / 12, "recall_at_5": 5 / 12}


def test_prediction_of_a_sample_doesnt_depend_on_its_batch(model: Model, tmp_path: Path) -> None:
    make_embedded(str(tmp_path), "held-out", model.folder, num_samples=12)
    samples = stored(str(tmp_path), digest="batch")
    several = rows_of(held_out(samples, num_pictures=0), model)
    alone = rows_of(held_out(samples, num_pictures=0, batch_size=1), model)
    for one, other in zip(several, alone, strict=True):
        assert one["ce"] == pytest.approx(other["ce"], rel=1e-4)
        if one["kind"] == "drawn":
            predicted = [np.frombuffer(row["prediction"], np.float32) for row in (one, other)]
            np.testing.assert_allclose(*predicted, atol=1e-5)


def test_data_of_another_encoder_is_refused(model: Model, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    make_embedded(str(tmp_path), "held-out", other, num_samples=6)
    for suite in (
        held_out(stored(str(tmp_path))),
        EmbeddingPredictionSuite(samples=stored(str(tmp_path)), **DRAWN),
        ReconstructionSuite(samples=stored(str(tmp_path)), decoders=("generation",), **DRAWN),
    ):
        with pytest.raises(FingerprintError, match="embed it with this model"):
            suite.check(model.manifest)
    with pytest.raises(InputError, match="no embedded data 'absent'"):
        held_out(stored(str(tmp_path), data="absent")).check(read_manifest(other))


# --- with the tars at hand --------------------------------------------------------------------------------------------


@pytest.fixture
def samples_with_tar(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoredSamples:
    """Embedded data whose shard is there: `shard.tar` in the working folder, a scene in each picture."""
    make_embedded(str(tmp_path), "held-out", model.folder, num_samples=6)
    write_shard(tmp_path / "shard.tar", str(tmp_path), "held-out")
    monkeypatch.chdir(tmp_path)
    return stored(str(tmp_path), digest=str(tmp_path))


def test_pictures_of_the_tar_give_losses_of_the_decoders(model: Model, samples_with_tar: StoredSamples) -> None:
    rows = rows_of(held_out(samples_with_tar), model)
    drawn = [row for row in rows if row["kind"] == "drawn"]
    assert len(drawn) == 4
    assert all(row["generation_flow"] > 0 and row["target_png"] for row in drawn)
    assert all(row["editing_flow"] is None for row in rows)  # the model has no editing decoder
    again = rows_of(held_out(samples_with_tar, batch_size=1), model)
    assert [row["generation_flow"] for row in again[:4]] == pytest.approx([row["generation_flow"] for row in drawn])


def test_reconstruction_of_a_tars_pictures(model: Model, samples_with_tar: StoredSamples) -> None:
    suite = ReconstructionSuite(samples=samples_with_tar, decoders=("generation",), **(DRAWN | {"batch_size": 3}))
    rows = rows_of(suite, model)
    check_reconstruction(suite, rows, 4)
    Path("shard.tar").rename("gone.tar")
    with pytest.raises(InputError, match=r"sample-0000 isn't in shard.tar any more.*put the tar back"):
        rows_of(suite, model)


# --- reconstruction ---------------------------------------------------------------------------------------------------


def check_reconstruction(suite: ReconstructionSuite, rows: list[dict[str, Any]], count: int) -> None:
    """Scores of every row again from its own pictures, and where they must stand to one another."""
    assert len(rows) == 3 * count
    for row in rows:
        pixels = [np.asarray(Image.open(io.BytesIO(row[name]))) for name in ("png", "target_png")]
        assert pixels[0].shape == (*IMAGE_SIZE, 3)
        assert (row["psnr"], row["ssim"]) == (psnr(*pixels), ssim(*pixels))
        assert row["score"] == row["vision_cosine"]
    another = [row for row in rows if row["kind"] == "another"]
    assert [row["png"] for row in another] == [row["target_png"] for row in another[1:] + another[:1]]
    scores = suite.summarise(rows).scores
    assert scores["n"] == count
    assert scores["autoencoder"]["psnr"] > scores["generation"]["psnr"]  # the decoder's weights are random
    assert scores["autoencoder"]["vision_cosine"] > scores["generation"]["vision_cosine"]
    assert set(suite.measures(rows)) == {
        f"{kind}/{metric}"
        for kind in ("generation", "autoencoder", "another")
        for metric in ("psnr", "ssim", "vision_cosine", "vision_mse")
    }
    assert set(suite.summarise(rows).sheets) == {"generation"}
    pa.Table.from_pylist(rows, schema=suite.schema)


def test_reconstruction_of_the_demo_world(model: Model) -> None:
    suite = ReconstructionSuite(
        samples=DemoWorldSamples(seed=1, max_samples=5), decoders=("generation",), **(DRAWN | {"batch_size": 3})
    )
    suite.check(model.manifest)
    rows = rows_of(suite, model)
    check_reconstruction(suite, rows, 5)
    assert suite.path == "reconstruction"
    other_cut = suite.model_copy(update={"batch_size": 5})
    again = rows_of(other_cut, model)
    assert [row["psnr"] for row in again] == pytest.approx([row["psnr"] for row in rows], abs=0.05)
    with pytest.raises(ModelError, match="editing_decoder"):
        suite.model_copy(update={"decoders": ("generation", "editing")}).check(model.manifest)


# --- errors by position -----------------------------------------------------------------------------------------------


def prediction(samples: Samples, **changes: Any) -> EmbeddingPredictionSuite:
    return EmbeddingPredictionSuite(samples=samples, **(DRAWN | changes))


def test_free_running_predictions_are_those_of_inference(model: Model) -> None:
    source = DemoWorldSamples(seed=2, max_samples=4)
    samples = source.read(model, 0, 4)
    assert [sample.row.task for sample in samples] == ["generation", "editing"] * 2
    predicted = predict_images(model, [drawing_prompt(model, sample) for sample in samples])
    drawn = predict_embeddings(model, [sample.prompt for sample in samples[::2]])
    torch.testing.assert_close(predicted[::2], drawn, atol=1e-5, rtol=1e-5)
    given = [pictures[0] for pictures in source.pictures(samples[1::2])]
    edited = predict_edits(model, given, [sample.prompt for sample in samples[1::2]])
    torch.testing.assert_close(predicted[1::2], edited, atol=1e-5, rtol=1e-5)


def test_errors_stand_by_position(model: Model) -> None:
    suite = prediction(DemoWorldSamples(seed=2, max_samples=6))
    suite.check(model.manifest)
    rows = rows_of(suite, model)
    samples = suite.samples.read(model, 0, 6)
    targets = torch.stack([drawn_image(sample).values for sample in samples])
    errors = (teacher_forced(model, samples) - targets).square().mean(dim=-1)
    np.testing.assert_allclose([row["teacher_forced_mse"] for row in rows], errors.numpy(), rtol=1e-4)
    best = (targets.mean(dim=0) - targets).square().mean(dim=-1)
    np.testing.assert_allclose([row["mean_embedding_mse"] for row in rows], best.numpy(), rtol=1e-3)
    assert [row["png"] is not None for row in rows] == [True] * 5 + [False]
    assert all(row["target_png"] for row in rows[:5])
    scores = suite.summarise(rows).scores
    assert scores["num_positions"] == targets.shape[1]
    assert scores["teacher_forced"]["mse"] == pytest.approx(errors.mean().item(), rel=1e-4)
    assert scores["teacher_forced"]["mse_first"] == pytest.approx(errors[:, 0].mean().item(), rel=1e-4)
    assert scores["teacher_forced"]["mse_last"] == pytest.approx(errors[:, -1].mean().item(), rel=1e-4)
    assert {"mse_generation", "cosine_editing"} <= set(scores["free_running"])
    result = suite.summarise(rows)
    assert len(result.plots) == 2
    assert all("free running" in plot for plot in result.plots)
    table = pa.Table.from_pylist(rows, schema=suite.schema).to_pylist()
    assert suite.measures(table) == suite.measures(rows)


def test_embedded_data_is_measured_too(model: Model, tmp_path: Path) -> None:
    make_embedded(str(tmp_path), "held-out", model.folder, num_samples=12)
    suite = prediction(stored(str(tmp_path), digest="prediction"), num_pictures=0)
    suite.check(model.manifest)
    rows = rows_of(suite, model)
    assert suite.path == "embedding_prediction/held-out"
    assert [row["key"] for row in rows] == [f"sample-{n:04d}" for n in range(12) if n % 3 != 2]
    same = rows_of(held_out(suite.samples, num_pictures=0), model)[: len(rows)]  # type: ignore[arg-type]
    means = [np.mean(row["teacher_forced_mse"]) for row in rows]
    assert means == pytest.approx([row["mse"] for row in same], rel=1e-5)


def test_of_several_images_the_first_of_the_last_answer_is_measured(model: Model) -> None:
    assert model.autoregressive is not None
    count, hidden = model.manifest.geometry.num_target_tokens, model.autoregressive.hidden_size
    grid = model.manifest.geometry.target_grid
    images = [StoredImage(index, grid, torch.full((count, hidden), float(index))) for index in range(5)]
    messages = (
        Message("user", "<image> red"),
        Message("assistant", "<image>"),
        Message("user", "<image> two"),
        Message("assistant", "<image> and <image>"),
        Message("user", "thanks"),
        Message("assistant", "circle"),
    )
    roles = {"input": (images[0], images[2]), "target": (images[1], images[3], images[4])}
    sample = EvaluationSample(EmbeddedRow("k", "editing", messages, roles), "", "en")
    assert drawn_image(sample).index == 3
    prompt = drawing_prompt(model, sample)
    assert prompt.input_embeddings[:, 0].tolist() == [0.0] * count + [2.0] * count
    predicted = teacher_forced(model, [sample])
    batch = evaluation_samples.conversation_batch(model, [sample])
    with torch.inference_mode():
        everything = model.autoregressive.predict_targets(batch)
    torch.testing.assert_close(predicted[0], everything[count : 2 * count])
