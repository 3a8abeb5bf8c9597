from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import LATENT_SIZE, NUM_TARGET_TOKENS, make_embedded, make_tiny_model, write_mode

from nexusgen.base_training import HIDDEN_SIZE, IMAGE_SIZE, LATENT_CHANNELS
from nexusgen.errors import FingerprintError, InputError
from nexusgen.losses import total_loss
from nexusgen.model.manifest import read_manifest
from pipelines.stage_data import StageSource, open_data
from pipelines.stages import STAGES, AutoregressiveStage, GenerationDecoderStage, StageName, StepRandom, build_stage


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def storage_uri(tmp_path_factory: pytest.TempPathFactory, model: Path) -> str:
    uri = str(tmp_path_factory.mktemp("storage"))
    make_embedded(uri, "tiny", model)
    return uri


def open_stage(name: StageName, storage_uri: str, model: Path, validation_fraction: float = 0.2):
    data = open_data(storage_uri, ["tiny"], STAGES[name], read_manifest(model), validation_fraction)
    stage = build_stage(name, model, "uniform")
    return stage, data, StageSource(data, stage)


def test_rows_are_found_once_and_split_by_key(storage_uri: str, model: Path) -> None:
    _, data, _ = open_stage("ar", storage_uri, model)
    assert sorted([*data.train, *data.validation]) == list(range(60))
    assert 0 < len(data.validation) < 30
    assert len(data.train_table) == len(data.train)
    assert [entry.name for entry in data.inputs] == ["tiny/vision"]
    assert data.inputs[0].run_id == "embed-vision"


def test_the_decoder_uses_samples_with_a_target_only(storage_uri: str, model: Path) -> None:
    _, data, source = open_stage("generation_decoder", storage_uri, model)
    assert len(data.train) + len(data.validation) == 40
    assert set(data.table.lengths) == {NUM_TARGET_TOKENS + LATENT_SIZE[0] * LATENT_SIZE[1] // 4}
    batch = source.batch(np.arange(5))
    assert batch.embeddings.shape == (5, NUM_TARGET_TOKENS, HIDDEN_SIZE)
    assert batch.latents.shape == (5, LATENT_CHANNELS, *LATENT_SIZE)


@pytest.mark.parametrize("name", ["ar", "generation_decoder"])
def test_loss_parts_add_up_over_any_split_of_a_batch(name: StageName, storage_uri: str, model: Path) -> None:
    stage, _, source = open_stage(name, storage_uri, model)
    random = StepRandom(seed=1, step=7)
    with torch.no_grad():
        whole = stage.loss(source.batch(np.arange(12)), random)
        halves = [stage.loss(source.batch(rows), random) for rows in (np.arange(5), np.arange(5, 12))]
    assert whole.keys() == stage.weights.keys()
    for part, value in whole.items():
        assert value.count == sum(half[part].count for half in halves)
        torch.testing.assert_close(value.sum, sum(half[part].sum for half in halves), rtol=1e-5, atol=1e-5)


def test_every_trained_weight_of_the_autoregressive_stage_can_move(storage_uri: str, model: Path) -> None:
    stage, _, source = open_stage("ar", storage_uri, model)
    assert isinstance(stage, AutoregressiveStage)
    total_loss(stage.loss(source.batch(np.arange(12)), StepRandom(0, 0)), stage.weights).backward()
    assert all(parameter.grad is not None for parameter in stage.module.parameters())
    assert not any("visual" in name for name in stage.module.state_dict())


def test_understanding_alone_has_no_image_loss(storage_uri: str, model: Path) -> None:
    stage, data, source = open_stage("ar", storage_uri, model)
    understanding = np.flatnonzero(data.train_table.tasks == 0)[:3]
    parts = stage.loss(source.batch(understanding), StepRandom(0, 0))
    assert (parts["mse"].count, parts["cosine"].count) == (0, 0)
    assert float(parts["mse"].mean.detach()) == 0.0
    assert parts["ce"].count > 0


def test_noise_depends_on_seed_step_and_sample_not_on_company(storage_uri: str, model: Path) -> None:
    stage, _, source = open_stage("generation_decoder", storage_uri, model)
    assert isinstance(stage, GenerationDecoderStage)
    levels, noise = stage._draw(source.batch(np.array([3, 1, 2])), StepRandom(0, 5))
    alone, alone_noise = stage._draw(source.batch(np.array([1])), StepRandom(0, 5))
    assert torch.equal(noise[1:2], alone_noise)
    assert torch.equal(levels.sigmas[1:2], alone.sigmas)
    for other in (StepRandom(1, 5), StepRandom(0, 6)):
        assert not torch.equal(stage._draw(source.batch(np.array([1])), other)[1], alone_noise)


def test_the_baseline_is_the_mean_of_training_targets(storage_uri: str, model: Path) -> None:
    stage, data, source = open_stage("ar", storage_uri, model)
    samples = source.samples(data.train[:30])
    values = stage.baseline(samples, samples)
    targets = torch.stack([sample.targets.float() for sample in samples if len(sample.targets)])
    wanted = targets.var(dim=0, unbiased=False).mean()
    assert values["mse_mean_embedding"] == pytest.approx(float(wanted), rel=1e-4)


def test_pictures_show_target_and_prediction(storage_uri: str, model: Path) -> None:
    stage, data, source = open_stage("generation_decoder", storage_uri, model)
    ((target, prediction),) = stage.pictures(source.samples(data.train[:1]))
    assert target.size == prediction.size == IMAGE_SIZE


def test_wrong_data_is_refused_with_the_fix(tmp_path: Path, storage_uri: str, model: Path) -> None:
    manifest = read_manifest(model)
    with pytest.raises(InputError, match="nexusgen embed"):
        open_data(storage_uri, ["absent"], STAGES["ar"], manifest, 0.1)
    other = manifest.model_copy(update={"fingerprints": {**manifest.fingerprints, "vision": "f" * 64}})
    with pytest.raises(FingerprintError, match="embed it again"):
        open_data(storage_uri, ["tiny"], STAGES["ar"], other, 0.1)
    write_mode(str(tmp_path), "empty", "vision", manifest.fingerprints["vision"], [])
    with pytest.raises(InputError, match="no training row"):
        open_data(str(tmp_path), ["empty"], STAGES["ar"], manifest, 0.1)
    row = {"key": "a", "task": "generation", "num_tokens": 9}
    fingerprint = manifest.fingerprints["vision"]
    write_mode(str(tmp_path), "old", "vision", fingerprint, [row], without=["target_grid"])
    with pytest.raises(InputError, match="target_grid"):
        open_data(str(tmp_path), ["old"], STAGES["ar"], manifest, 0.1)


def test_modes_that_do_not_match_are_refused(tmp_path: Path, model: Path) -> None:
    fingerprints = read_manifest(model).fingerprints
    rows = [{"key": key, "task": "generation", "num_tokens": 9, "messages": []} for key in "abc"]
    grid = [{"crop_grid": [4, 4], "latents_grid": [8, 8]}] * 3
    write_mode(str(tmp_path), "x", "vision", fingerprints["vision"], [r | g for r, g in zip(rows, grid, strict=True)])
    write_mode(str(tmp_path), "x", "latents", fingerprints["vae"], rows[:2])
    with pytest.raises(InputError, match="both modes"):
        open_data(str(tmp_path), ["x"], STAGES["generation_decoder"], read_manifest(model), 0.0)
    swapped = [r | g for r, g in zip([rows[1], rows[0], rows[2]], grid, strict=True)]
    write_mode(str(tmp_path), "x", "latents", fingerprints["vae"], swapped)
    data = open_data(str(tmp_path), ["x"], STAGES["generation_decoder"], read_manifest(model), 0.0)
    stage = build_stage("generation_decoder", model, "uniform")
    with pytest.raises(InputError, match="keys"):
        StageSource(data, stage).batch(np.arange(1))
