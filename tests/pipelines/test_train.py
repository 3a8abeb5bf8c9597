from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import make_tiny_model

import pipelines.loop as training
from nexusgen.errors import ConfigError, FingerprintError, ModelError, ResourceError
from nexusgen.model.manifest import read_manifest
from nexusgen.model.weights import assemble_model, load_model
from pipelines import checkpoint
from pipelines.batches import BatchRule
from pipelines.follow import StepRecord
from pipelines.loop import Ranks, learning_rate_at, run_training
from pipelines.stages import STAGES
from pipelines.train import TrainConfig, progress_line, train


def make_config(storage_uri: str, model: Path, **values: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "storage": storage_uri,
        "name": "run",
        "data": "tiny",
        "stage": "ar",
        "model": str(model),
        "num_steps": 12,
        "batch_samples": 6,
        "warmup_steps": 2,
        "checkpoint_every": 5,
        "log_every": 1,
        "precision": "fp32",
        "validation_fraction": 0.1,
    }
    return TrainConfig(**(defaults | values))


@contextlib.contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> Iterator[list[StepRecord]]:
    """Keep every step's record; end the training abruptly after `stop_after` steps."""
    records: list[StepRecord] = []
    steps = training.training_steps

    def watched(*args: Any) -> Iterator[StepRecord]:
        for record in steps(*args):
            if len(records) == stop_after:
                raise KeyboardInterrupt
            records.append(record)
            yield record

    with monkeypatch.context() as patch:
        patch.setattr(training, "training_steps", watched)
        yield records


def exported(found: checkpoint.Checkpoint, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint."""
    checkpoint.export_weights(found, folder / "weights.safetensors")
    return load_file(folder / "weights.safetensors")


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_training_equals_an_undisturbed_one_bit_for_bit(
    stage: str, storage_uri: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = (make_config(storage_uri, model, stage=stage, name=f"{name}-{stage}") for name in ("one", "two"))
    with recorded(monkeypatch) as undisturbed:
        run_training(whole, "r", Ranks(), None)
    with recorded(monkeypatch, stop_after=8) as first, pytest.raises(KeyboardInterrupt):
        run_training(broken, "r", Ranks(), None)
    with recorded(monkeypatch) as second:
        run_training(broken, "r", Ranks(), None)
    assert [record.step for record in second] == list(range(5, 12))  # steps 5 to 7 are replayed
    losses = {record.step: record.losses for record in [*first, *second]}
    assert losses == {record.step: record.losses for record in undisturbed}
    places = [checkpoint.latest(checkpoint.stage_folder(storage_uri, c.name, stage)) for c in (whole, broken)]
    assert all(place is not None and place.meta.step == 12 for place in places)
    ours, theirs = (exported(place, tmp_path) for place in places if place is not None)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert undisturbed[-1].loss < undisturbed[0].loss


def test_two_workers_learn_what_one_learns(
    tmp_path: Path, storage_uri: str, model: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: Any
) -> None:
    """On Ray Train with real processes; samples have unequal lengths, and losses unequal counts on the ranks."""
    alone = make_config(storage_uri, model, name="alone", num_steps=5)
    with recorded(monkeypatch) as records:
        run_training(alone, "r", Ranks(), None)
    together = make_config(storage_uri, model, name="together", num_steps=5, num_workers=2)
    report = train(together)
    assert (report.job, report.reused, report.samples) == ("train ar", False, sum(r.num_samples for r in records))
    assert report.loss_first == pytest.approx(records[0].loss, rel=1e-5)
    assert report.loss_last == pytest.approx(records[-1].loss, rel=1e-5)
    assert report.cpu_seconds > 0
    places = [checkpoint.latest(checkpoint.stage_folder(storage_uri, name, "ar")) for name in ("alone", "together")]
    ours, theirs = (exported(place, tmp_path) for place in places if place is not None)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)

    from pipelines.tracking import connect

    run = connect(storage_uri).get_run(report.outputs["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["train/loss"] == pytest.approx(records[-1].loss, rel=1e-5)
    assert run.data.metrics["eval/validation/mse_mean_embedding"] > 0
    assert run.inputs.dataset_inputs[0].dataset.name == "tiny/vision"

    again = train(together)
    assert again.reused
    assert again.outputs["checkpoint"] == report.outputs["checkpoint"]
    with pytest.raises(ConfigError, match=r"learning_rate was 0\.002, now 0\.5.*fresh=true"):
        train(together.model_copy(update={"learning_rate": 0.5}))

    trained = tmp_path / "weights.safetensors"  # of the last one, the two workers'
    assemble_model(model, tmp_path / "new", autoregressive=trained, generation_decoder=None, lineage={})
    assert load_model(tmp_path / "new", parts=("autoregressive",)).autoregressive is not None


def test_wrong_requests_are_refused_before_a_worker_starts(tmp_path: Path, storage_uri: str, model: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(FingerprintError, match="embed it again"):
        train(make_config(storage_uri, other))
    manifest = read_manifest(model)
    (tmp_path / "bare").mkdir()
    bare = manifest.model_copy(update={"parts": ("autoregressive",)})
    (tmp_path / "bare" / "nexusgen.json").write_text(bare.model_dump_json())
    with pytest.raises(ModelError, match="lacks generation_decoder"):
        train(make_config(storage_uri, tmp_path / "bare", stage="generation_decoder"))
    for num_workers in (3, (1, 3)):
        with pytest.raises(ValueError, match="virtual_streams"):
            make_config(storage_uri, model, num_workers=num_workers)
    for wrong in (0, "two", [2], [2, 1], [0, 2], [1, 2, 3]):
        with pytest.raises(ValueError, match=r"num_workers\n.*wanted a whole number from 1 on, or \[min, max\]"):
            make_config(storage_uri, model, num_workers=wrong)


def test_too_few_cpus_are_refused_with_the_numbers(storage_uri: str, model: Path) -> None:
    config = make_config(storage_uri, model, name="large", num_workers=2, cpus_per_worker=400.0)
    with pytest.raises(ResourceError, match="800"):
        train(config)
    with pytest.raises(ResourceError, match="400"):  # room for the fewest will do
        train(config.model_copy(update={"num_workers": (1, 2)}))


def test_the_learning_rate_rises_then_falls_to_its_fraction() -> None:
    config = TrainConfig(storage="s", name="n", stage="ar", num_steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate_at(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(rates[10]) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.02)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_progress_line_says_how_long_it_will_take() -> None:
    progress = {"step": 40, "num_steps": 100, "losses": {"ce": 1.5}, "samples_per_s": 48.0, "steps_per_s": 2.0}
    assert progress_line("ar", progress) == "train ar: step 40/100 ce 1.5000 48 samples/s, 0.5 min left"


def test_data_names_default_to_the_project() -> None:
    values: dict[str, Any] = {"storage": "s", "name": "n", "stage": "ar"}
    assert TrainConfig(**values).data_names == ["n"]
    assert TrainConfig(**values, data="a").data_names == ["a"]
    assert TrainConfig(**values, data=["a", "b"]).data_names == ["a", "b"]
    assert TrainConfig(**values).batch_rule == BatchRule(samples=24)
    assert TrainConfig(**values, window_gb=8).batch_rule.window_bytes == 8 * 2**30
    rule = TrainConfig(**values, batch_tokens=500).batch_rule
    assert (rule.samples, rule.tokens) == (None, 500)
