"""Losses of every stage's first steps against recorded ones: no change of code moves them without anyone noticing.

`tests/golden/loss_curves.json` is made anew, after a change that is meant to move them, by

    PYTHONPATH=.:tests/pipelines .venv/bin/python tests/pipelines/test_golden_curves.py
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import make_embedded, make_tiny_model

from pipelines import loop
from pipelines.follow import StepRecord
from pipelines.stages import STAGES, StageName
from pipelines.train import TrainConfig

CURVES = Path(__file__).parents[1] / "golden" / "loss_curves.json"
NUM_STEPS = 20
# Relative. Another CPU's kernels (plain ones for AVX2's, measured with torch 2.13) move a curve by 1e-6 at most, a
# second thread by less. A beta of AdamW that is off by 0.001 moves those of ar and editing_decoder by 1e-4 to 2e-4.
TOLERANCE = 1e-4

Curve = dict[str, list[float]]


def train_curve(stage: StageName, storage_uri: str, model: Path) -> Curve:
    """Mean losses of each step, by part: seed 0, fp32, one thread, one process."""
    torch.set_num_threads(1)
    config = TrainConfig(
        storage=storage_uri,
        name="golden",
        data="tiny",
        stage=stage,
        model=str(model),
        num_steps=NUM_STEPS,
        batch_samples=6,
        learning_rate=1e-3 if stage == "ar" else 5e-3,  # decoders begin at zero, and move slowly
        warmup_steps=5,
        precision="fp32",
        levels="uniform",
        conditioning_dropout=0.2,
        validation_samples=0,
        checkpoint_every=NUM_STEPS,
    )
    records: list[StepRecord] = []
    steps = loop.training_steps

    def watched(*arguments: Any) -> Iterator[StepRecord]:
        for record in steps(*arguments):
            records.append(record)
            yield record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "training_steps", watched)
        loop.run_training(config, "r", loop.Ranks(), None)
    return {part: [record.losses[part] for record in records] for part in STAGES[stage].weights}


def prepare(folder: Path) -> tuple[str, Path]:
    """A storage with data of all modes, and the model that it is of."""
    model = make_tiny_model(folder / "model")
    storage_uri = str(folder / "storage")
    make_embedded(storage_uri, "tiny", model)
    return storage_uri, model


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return prepare(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_that_were_recorded(stage: StageName, prepared: tuple[str, Path]) -> None:
    recorded = json.loads(CURVES.read_text(encoding="utf-8"))[stage]
    curve = train_curve(stage, *prepared)
    assert curve.keys() == recorded.keys()
    for part, losses in curve.items():
        assert losses == pytest.approx(recorded[part], rel=TOLERANCE), part


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        places = prepare(Path(scratch))
        curves = {stage: train_curve(stage, *places) for stage in STAGES}
    CURVES.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
