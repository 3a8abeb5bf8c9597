from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import (
    LATENT_SIZE,
    NUM_REFERENCE_TOKENS,
    NUM_TARGET_TOKENS,
    make_embedded,
    write_mode,
)

from nexusgen.base_training import HIDDEN_SIZE, IMAGE_SIZE, LATENT_CHANNELS
from nexusgen.errors import FingerprintError, InputError, ModelError
from nexusgen.flow_matching import inference_sigmas
from nexusgen.losses import total_loss
from nexusgen.model.manifest import read_manifest
from nexusgen.positions import flux_token_ids
from nexusgen.schema import Task
from pipelines import embedded
from pipelines.batches import BatchRule, Plan, iterate
from pipelines.loaded_slice import columns_of
from pipelines.stage_data import TOKEN_BYTES, StageSource, open_data
from pipelines.stages import (
    STAGES,
    AutoregressiveStage,
    DecoderStage,
    EditingDecoderStage,
    EmbeddedRow,
    PictureBatch,
    StageName,
    StepRandom,
    StoredImage,
    build_stage,
)

DECODER_STAGES: tuple[StageName, ...] = ("generation_decoder", "editing_decoder")
LATENT_TOKENS = LATENT_SIZE[0] * LATENT_SIZE[1] // 4


def open_stage(
    name: StageName, storage_uri: str, model: Path, validation_fraction: float = 0.2, conditioning_dropout: float = 0.0
):
    data = open_data(storage_uri, ["tiny"], STAGES[name], read_manifest(model), validation_fraction)
    stage = build_stage(name, model, "uniform", conditioning_dropout)
    return stage, data, StageSource(data, stage)


def wake(stage: DecoderStage) -> None:
    """Random weights where a fresh decoder has zeros, or its prediction would be zero whatever it is given."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stage.module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05, generator=generator)


def test_rows_are_found_once_and_split_by_key(storage_uri: str, model: Path) -> None:
    _, data, _ = open_stage("ar", storage_uri, model)
    assert sorted([*data.train, *data.validation]) == list(range(60))
    assert 0 < len(data.validation) < 30
    assert len(data.train_table) == len(data.train)
    assert [entry.name for entry in data.inputs] == ["tiny/vision"]
    assert data.inputs[0].run_id == "embed-vision"


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts, from now on, how often each file of a slice is read."""
    reads: Counter[str] = Counter()
    plain = embedded.read_slice

    def counted(info: Any, columns: Any = None, row_groups: Any = None) -> Any:
        reads[info.uri] += 1
        return plain(info, columns, row_groups)

    monkeypatch.setattr(embedded, "read_slice", counted)
    return reads


MIXTURE: dict[Task, float] = {"generation": 1, "editing": 1, "understanding": 1}


@pytest.mark.parametrize("mixture", [None, MIXTURE])
@pytest.mark.parametrize("values", [{"samples": 6}, {"tokens": 200}])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_rank_reads_heavy_slices_once_in_an_epoch(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    mixture: dict[Task, float] | None,
    values: dict[str, Any],
    world_size: int,
) -> None:
    """Slices of 8 rows, each of one task; two windows of 3 slices are all that may be kept."""
    make_embedded(str(tmp_path), "tiny", model, num_samples=240, rows_per_slice=8, task_by_task=True)
    stage, data, _ = open_stage("ar", str(tmp_path), model, validation_fraction=0.0)
    size = int(data.table.slice_bytes.max())
    rule = BatchRule(**values, mixture=mixture, window_bytes=3 * size)
    plan = Plan(data.train_table, rule, 0, data.digest)
    num_steps = sum(1 for _ in itertools.takewhile(lambda step: step.epoch < 1, plan.steps()))
    plenty = StageSource(data, stage)
    for rank in range(world_size):
        reads = count_reads(monkeypatch)
        source = StageSource(data, stage, 2 * plan.num_window_bytes)
        seen = Counter[int]()
        for batch in iterate(plan, source, num_steps, 0, rank, world_size):
            (micro,) = batch.micro_batches
            seen.update(batch.planned.rows.tolist())
            (rows,) = batch.planned.rows_of(rank, world_size)
            same = plenty.batch(rows if len(rows) else batch.planned.rows[:1])
            assert torch.equal(micro.content.input_ids, same.input_ids)
            assert torch.equal(micro.content.target_embeddings, same.target_embeddings)
        monkeypatch.undo()
        assert set(seen.values()) == {1}
        assert len(seen) == 240
        own = Counter({uri: count - (rank == 0) for uri, count in reads.items()})  # `plenty` read them once
        assert own == Counter({group["vision"].uri: 1 for group in data.slices})


def test_bytes_of_slices_are_those_in_memory(storage_uri: str, model: Path) -> None:
    name: StageName
    for name in STAGES:
        stage, data, _ = open_stage(name, storage_uri, model)
        for group, num_bytes in zip(data.slices, data.table.slice_bytes, strict=True):
            tables = [embedded.read_slice(info, columns_of(stage, mode)) for mode, info in group.items()]
            as_read = sum(table.nbytes for table in tables)
            (tokens,) = {sum(embedded.read_slice(info)["num_tokens"].to_pylist()) for info in group.values()}
            assert 0.8 * as_read < num_bytes - TOKEN_BYTES * tokens < 1.2 * as_read


def test_samples_that_are_looked_at_again_are_kept(
    storage_uri: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, data, source = open_stage("ar", storage_uri, model)
    reads = count_reads(monkeypatch)
    first = source.samples(data.validation[:4])
    again = source.samples(data.validation[:6])
    assert max(reads.values()) <= 2
    reads.clear()
    assert all(ours is theirs for ours, theirs in zip(source.samples(data.validation[:4]), first, strict=True))
    assert all(ours is theirs for ours, theirs in zip(again, first, strict=False))
    assert not reads
    rows = np.array([3, 17, 0])
    assert source.keys(rows) == [f"sample-{number:04d}" for number in data.train[rows]]


def test_the_decoder_uses_samples_with_a_target_only(storage_uri: str, model: Path) -> None:
    _, data, source = open_stage("generation_decoder", storage_uri, model)
    assert len(data.train) + len(data.validation) == 40
    assert set(data.table.lengths) == {NUM_TARGET_TOKENS + LATENT_TOKENS}
    batch = source.batch(np.arange(5))
    assert batch.embeddings.shape == (5, NUM_TARGET_TOKENS, HIDDEN_SIZE)
    assert batch.latents.shape == (5, LATENT_CHANNELS, *LATENT_SIZE)
    assert batch.reference is None


def test_the_editing_decoder_uses_samples_with_a_reference_only(storage_uri: str, model: Path) -> None:
    _, data, source = open_stage("editing_decoder", storage_uri, model, validation_fraction=0.0)
    assert len(data.train) == 20
    assert set(data.table.lengths) == {NUM_TARGET_TOKENS + NUM_REFERENCE_TOKENS + LATENT_TOKENS}
    assert [entry.name for entry in data.inputs] == ["tiny/predicted", "tiny/latents"]
    batch = source.batch(np.arange(5))
    assert batch.reference is not None
    assert batch.reference.shape == (5, NUM_REFERENCE_TOKENS, HIDDEN_SIZE)
    keys = [f"sample-{number:04d}" for number in range(1, 60, 3)]  # every third sample is an edit
    assert source.keys(np.arange(20)) == keys
    assert source.keys(np.array([7, 2])) == list(source.batch(np.array([7, 2])).keys) == [keys[7], keys[2]]


def test_an_edit_of_several_pictures_keeps_to_the_first(model: Path) -> None:
    stage = build_stage("editing_decoder", model, "uniform")
    images = [StoredImage(index, (1, 1), torch.full((1, 2), float(index))) for index in range(5)]
    shown, drawn = (images[2], images[0]), (images[1], images[4])
    row = EmbeddedRow("two turns", "editing", (), {"reference": shown, "predicted": drawn, "latents": drawn})
    prepared = stage.prepare(row)
    assert prepared.reference is images[0].values
    assert (prepared.embeddings is images[4].values, prepared.latents is images[4].values) == (True, True)
    for role in ("reference", "predicted", "latents"):
        with pytest.raises(InputError, match=r"two turns.*embed it again in .*predicted"):
            stage.prepare(EmbeddedRow(row.key, "editing", (), {**row.images, role: ()}))


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("conditioning_dropout", [0.0, 0.5])
def test_loss_parts_add_up_over_any_split_of_a_batch(
    name: StageName, conditioning_dropout: float, storage_uri: str, model: Path
) -> None:
    stage, _, source = open_stage(name, storage_uri, model, conditioning_dropout=conditioning_dropout)
    if isinstance(stage, DecoderStage):
        wake(stage)
    stage.module.train()
    random = StepRandom(seed=1, step=7)
    with torch.no_grad():
        whole = stage.loss(source.batch(np.arange(12)), random)
        halves = [stage.loss(source.batch(rows), random) for rows in (np.arange(5), np.arange(5, 12))]
    assert whole.keys() == stage.weights.keys()
    assert stage.counts(source.batch(np.arange(12))) == {part: value.count for part, value in whole.items()}
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
    batch = source.batch(understanding)
    parts = stage.loss(batch, StepRandom(0, 0))
    assert (parts["mse"].count, parts["cosine"].count) == (0, 0)
    assert stage.counts(batch) == {"ce": parts["ce"].count, "mse": 0, "cosine": 0}
    assert float(parts["mse"].mean.detach()) == 0.0
    assert parts["ce"].count > 0


def test_chance_depends_on_seed_step_and_sample_not_on_company(storage_uri: str, model: Path) -> None:
    stage, _, source = open_stage("generation_decoder", storage_uri, model, conditioning_dropout=0.5)
    assert isinstance(stage, DecoderStage)
    rows = np.arange(20)
    together, alone = (
        stage._draw(source.batch(rows[::-1]), StepRandom(0, 5)),
        stage._draw(source.batch(rows[:1]), StepRandom(0, 5)),
    )
    assert torch.equal(together.noise[-1:], alone.noise)
    assert torch.equal(together.levels.sigmas[-1:], alone.levels.sigmas)
    assert torch.equal(together.is_dropped[-1:], alone.is_dropped)
    assert 3 < int(together.is_dropped.sum()) < 17
    for other in (StepRandom(1, 5), StepRandom(0, 6)):
        assert not torch.equal(stage._draw(source.batch(rows[:1]), other).noise, alone.noise)
    undropped, _, _ = open_stage("generation_decoder", storage_uri, model)
    assert isinstance(undropped, DecoderStage)
    draws = undropped._draw(source.batch(rows[:1]), StepRandom(0, 5))
    assert torch.equal(draws.noise, alone.noise)  # dropout leaves the rest of chance as it is
    assert not draws.is_dropped.any()


def by_hand(stage: EditingDecoderStage, batch: PictureBatch, number: int, *, is_dropped: bool) -> float:
    """The summed loss of one sample in step 7 of seed 1, from first principles: the table, the line, the velocity."""
    generator = StepRandom(seed=1, step=7).generator(batch.keys[number])
    level = int(torch.randint(1000, (1,), generator=generator))
    noise = torch.randn(batch.latents.shape[1:], generator=generator)
    scheduler = stage._model.scheduler
    assert scheduler is not None
    sigmas = inference_sigmas(scheduler, 1000)[:-1]
    bell = torch.exp(-2 * ((sigmas * 1000 - 500) / 1000) ** 2)
    bell = bell - bell.min()
    clean, sigma, weight = batch.latents[number], sigmas[level], (1000 * bell / bell.sum())[level]
    negative, pooled = stage._model.negative_context, stage._model.pooled_prompt
    assert negative is not None
    assert pooled is not None
    assert batch.reference is not None
    if is_dropped:
        context, ids = negative, torch.zeros(negative.shape[1], 3)
    else:
        context = stage.module.context(batch.embeddings[number : number + 1], batch.reference[number : number + 1])
        grids = stage.module.config.token_grid, stage.module.reference_grid
        ids = torch.cat([flux_token_ids(grid, LATENT_SIZE, "grid", image) for image, grid in enumerate(grids)])
    noisy = ((1 - sigma) * clean + sigma * noise)[None]
    predicted = stage.module.velocity(noisy, 1000 * sigma[None], context, pooled, ids)[0]
    return float((weight * (predicted - (noise - clean)).square().sum()).detach())


def test_the_editing_loss_is_what_a_computation_by_hand_gives(storage_uri: str, model: Path) -> None:
    stage, _, source = open_stage("editing_decoder", storage_uri, model)
    assert isinstance(stage, EditingDecoderStage)
    wake(stage)
    batch = source.batch(np.arange(3))
    wanted = [by_hand(stage, batch, number, is_dropped=False) for number in range(3)]
    part = stage.loss(batch, StepRandom(seed=1, step=7))["flow"]
    assert float(part.sum.detach()) == pytest.approx(sum(wanted), rel=1e-5)
    other = dataclasses.replace(batch, reference=torch.zeros_like(batch.reference))
    assert float(stage.loss(other, StepRandom(1, 7))["flow"].sum.detach()) != pytest.approx(sum(wanted), rel=3e-5)
    total_loss({"flow": part}, stage.weights).backward()
    assert all(parameter.grad is not None for parameter in stage.module.parameters())


def test_dropped_samples_are_drawn_under_the_negative_context(storage_uri: str, model: Path) -> None:
    stage, _, source = open_stage("editing_decoder", storage_uri, model, conditioning_dropout=0.5)
    assert isinstance(stage, EditingDecoderStage)
    wake(stage)
    random, batch = StepRandom(seed=1, step=7), source.batch(np.arange(8))
    is_dropped = stage._draw(batch, random).is_dropped.tolist()
    assert 0 < sum(is_dropped) < 8
    wanted = [by_hand(stage, batch, number, is_dropped=dropped) for number, dropped in enumerate(is_dropped)]
    stage.module.train()
    assert float(stage.loss(batch, random)["flow"].sum.detach()) == pytest.approx(sum(wanted), rel=1e-5)
    stage.module.eval()  # held-out samples keep their image
    wanted = [by_hand(stage, batch, number, is_dropped=False) for number in range(8)]
    assert float(stage.loss(batch, random)["flow"].sum.detach()) == pytest.approx(sum(wanted), rel=1e-5)


@pytest.mark.parametrize("name", DECODER_STAGES)
def test_both_passes_are_made_whoever_is_dropped(name: StageName, storage_uri: str, model: Path) -> None:
    """As ranks that share a decoder's weights need it: each makes the same passes, whatever its samples drew."""
    losses = []
    for conditioning_dropout in (0.0, 1e-9, 1.0):
        stage, _, source = open_stage(name, storage_uri, model, conditioning_dropout=conditioning_dropout)
        assert isinstance(stage, DecoderStage)
        wake(stage)
        stage.module.train()
        passes: list[str] = []
        stage.module.conditioner.register_forward_hook(lambda *_, passes=passes: passes.append("conditioner"))
        stage.module.transformer.register_forward_hook(lambda *_, passes=passes: passes.append("transformer"))
        part = stage.loss(source.batch(np.arange(3)), StepRandom(0, 0))["flow"]
        losses.append(float(part.sum.detach()))
        assert passes == ["conditioner", "transformer", *["transformer"] * (conditioning_dropout > 0)]
        total_loss({"flow": part}, stage.weights).backward()
        gradients = [parameter.grad for parameter in stage.module.conditioner.parameters()]
        assert all(gradient is not None for gradient in gradients)
        assert any(gradient.any() for gradient in gradients) == (conditioning_dropout < 1)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)  # nothing dropped; losses[2], all, is another
    assert losses[2] != pytest.approx(losses[0], rel=1e-4)


def test_dropout_needs_a_negative_context(tmp_path: Path, model: Path) -> None:
    without = tmp_path / "model"
    shutil.copytree(model, without)
    constants = load_file(without / "prompt_constants.safetensors")
    del constants["negative_context"]
    save_file(constants, without / "prompt_constants.safetensors")
    build_stage("generation_decoder", without, "uniform")
    with pytest.raises(ModelError, match=r"negative_context.*set conditioning_dropout=0"):
        build_stage("generation_decoder", without, "uniform", 0.1)


def test_a_generation_decoder_does_for_the_start_of_an_editing_decoder() -> None:
    stage = STAGES["editing_decoder"]
    assert stage.missing_parts(("editing_decoder", "vae")) == []
    assert stage.missing_parts(("autoregressive", "generation_decoder", "vae")) == []
    assert stage.missing_parts(("autoregressive", "vae")) == ["editing_decoder"]
    assert stage.missing_parts(("editing_decoder",)) == ["vae"]
    assert STAGES["generation_decoder"].missing_parts(("editing_decoder", "vae")) == ["generation_decoder"]


def test_the_baseline_is_the_mean_of_training_targets(storage_uri: str, model: Path) -> None:
    stage, data, source = open_stage("ar", storage_uri, model)
    samples = source.samples(data.train[:30])
    values = stage.baseline(samples, samples)
    targets = torch.stack([sample.targets.float() for sample in samples if len(sample.targets)])
    wanted = targets.var(dim=0, unbiased=False).mean()
    assert values["mse_mean_embedding"] == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("name", DECODER_STAGES)
def test_pictures_show_target_and_prediction(name: StageName, storage_uri: str, model: Path) -> None:
    stage, data, source = open_stage(name, storage_uri, model)
    ((target, prediction),) = stage.pictures(source.samples(data.train[:1]))
    assert target.size == prediction.size == IMAGE_SIZE


def test_wrong_data_is_refused_with_the_fix(tmp_path: Path, storage_uri: str, model: Path) -> None:
    manifest = read_manifest(model)
    with pytest.raises(InputError, match="nexusgen embed"):
        open_data(storage_uri, ["absent"], STAGES["ar"], manifest, 0.1)
    other = manifest.model_copy(update={"fingerprints": {**manifest.fingerprints, "vision": "f" * 64}})
    with pytest.raises(FingerprintError, match="embed it again"):
        open_data(storage_uri, ["tiny"], STAGES["ar"], other, 0.1)
    other = manifest.model_copy(update={"fingerprints": {**manifest.fingerprints, "autoregressive": "f" * 64}})
    with pytest.raises(FingerprintError, match="of mode predicted was made by autoregressive"):
        open_data(storage_uri, ["tiny"], STAGES["editing_decoder"], other, 0.1)
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
