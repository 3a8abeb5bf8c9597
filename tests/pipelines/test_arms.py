"""The arms of `reproduce` differ from the published stages in what they say, and in nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_training import NUM_TARGET_TOKENS

from nexusgen.model.manifest import read_manifest
from pipelines.arms import AR_ARMS, NaiveArm, PredictedInputsStage, PrefilledArm
from pipelines.stage_data import StageSource, open_data
from pipelines.stages import AutoregressiveStage, GenerationDecoderStage, PreparedConversation, StepRandom
from pipelines.trial_measures import measure_errors, predict_freely


def samples_of(stage: AutoregressiveStage, storage_uri: str, model: Path) -> list[PreparedConversation]:
    """Those with a target: generation and editing, each of its own length."""
    data = open_data(storage_uri, ["tiny"], AutoregressiveStage, read_manifest(model), 0.2)
    prepared = StageSource(data, stage).samples(data.train)
    return [sample for sample in prepared if len(sample.targets)][:8]


def arm(name: str, model: Path) -> PrefilledArm:
    stage = AR_ARMS[name](model)
    stage.fill(torch.device("cpu"))
    stage.module.eval()
    return stage


@torch.no_grad()
def forced(stage: PrefilledArm, samples: list[PreparedConversation]) -> torch.Tensor:
    return stage.output(stage.collate(samples)).predictions.unflatten(0, (len(samples), -1))


def test_naive_reads_the_true_embeddings_before_each_position(storage_uri: str, model: Path) -> None:
    stage = arm("naive", model)
    samples = samples_of(stage, storage_uri, model)
    plain = forced(stage, samples)
    for changed in (0, 4, NUM_TARGET_TOKENS - 1):
        moved = [s.targets.clone() for s in samples]
        for targets in moved:
            targets[changed] += 1
        others = forced(stage, [replace(s, targets=t) for s, t in zip(samples, moved, strict=True)])
        difference = (others - plain).abs().amax(dim=(0, 2))
        assert (difference[: changed + 1] == 0).all()  # it sees neither its own target nor later ones
        assert (difference[changed + 1 :] > 0).all()


def test_prefilled_reads_no_target_and_naive_no_query(storage_uri: str, model: Path) -> None:
    for name, reads_queries in (("prefilled", True), ("naive", False)):
        stage = arm(name, model)
        samples = samples_of(stage, storage_uri, model)
        plain = forced(stage, samples)
        with torch.no_grad():
            stage.module.image_prefill_embeds.weight += 1
        assert (forced(stage, samples) != plain).any() == reads_queries
    stage = arm("prefilled", model)
    other = [replace(sample, targets=sample.targets + 1) for sample in samples]
    assert torch.equal(forced(stage, samples), forced(stage, other))


@pytest.mark.parametrize("name", ["prefilled", "naive"])
def test_free_running_is_what_training_would_see_of_its_own_predictions(
    storage_uri: str, model: Path, name: str
) -> None:
    stage = arm(name, model)
    samples = samples_of(stage, storage_uri, model)
    with torch.no_grad():
        free = predict_freely(stage, samples)
    own = [replace(sample, targets=of_sample) for sample, of_sample in zip(samples, free, strict=True)]
    again = forced(stage, own)
    assert torch.allclose(again, free, rtol=1e-4, atol=1e-5)


def test_prefilled_is_stage_ar(storage_uri: str, model: Path) -> None:
    stage, published = arm("prefilled", model), AutoregressiveStage(model)
    published.fill(torch.device("cpu"))
    batch = stage.collate(samples_of(stage, storage_uri, model))
    with torch.no_grad():
        ours, theirs = (one.loss(batch, StepRandom(0, 0)) for one in (stage, published))
    assert {name: float(part.sum) for name, part in ours.items()} == {n: float(p.sum) for n, p in theirs.items()}
    assert stage.weights == published.weights


def test_loss_arms_leave_out_one_part() -> None:
    full = PrefilledArm.weights
    assert AR_ARMS["without-mse"].weights == {**full, "mse": 0.0}
    assert AR_ARMS["without-cosine"].weights == {**full, "cosine": 0.0}
    assert NaiveArm.weights == full


def test_errors_of_both_arms_agree_at_the_first_position(storage_uri: str, model: Path) -> None:
    data = open_data(storage_uri, ["tiny"], AutoregressiveStage, read_manifest(model), 0.4)
    for name in ("prefilled", "naive"):
        errors = measure_errors(arm(name, model), data, num_samples=4)
        assert list(errors) == ["generation", "editing"]
        for of_task in errors.values():
            forced_mse, free_mse = (of_task[mode]["mse"] for mode in ("teacher_forced", "free_running"))
            assert len(forced_mse) == NUM_TARGET_TOKENS
            assert len(of_task["free_running"]["mse_by_sample"]) == of_task["n"] <= 4
            assert free_mse[0] == pytest.approx(forced_mse[0], rel=1e-4)
            same_all_along = free_mse == pytest.approx(forced_mse, rel=1e-4)
            assert same_all_along == (name == "prefilled")


def test_decoder_arm_draws_from_the_predictions_that_it_is_given(storage_uri: str, model: Path) -> None:
    data = open_data(storage_uri, ["tiny"], GenerationDecoderStage, read_manifest(model), 0.2)
    published = GenerationDecoderStage(model, "uniform")
    plain = StageSource(data, published).samples(data.train[:4])
    predictions = {sample.key: sample.embeddings + number for number, sample in enumerate(plain)}
    stage = PredictedInputsStage(model, "uniform", 0.0, predictions)
    for number, (ours, theirs) in enumerate(zip(StageSource(data, stage).samples(data.train[:4]), plain, strict=True)):
        assert torch.equal(ours.embeddings, theirs.embeddings + number)
        assert torch.equal(ours.latents, theirs.latents)
