from pathlib import Path

import pytest
import torch
from test_train import make_config

from nexusgen.model.manifest import read_manifest
from pipelines.loop import Ranks, make_optimizer, open_training, run_training
from pipelines.stages import STAGES, build_stage
from pipelines.train_plan import plan_training


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_optimizer_and_tokens_are_those_of_the_training(stage: str, storage_uri: str, model: Path) -> None:
    config = make_config(storage_uri, model, stage=stage, name=f"planned-{stage}", num_steps=3)
    plan = plan_training(config)
    built = build_stage(config.stage, model, config.levels)
    parameters = list(built.module.parameters())
    assert plan.parameters == sum(parameter.numel() for parameter in parameters)
    optimizer = make_optimizer(built.module, config)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name.startswith("exp_avg")]
    assert plan.memory["optimizer"] == sum(moment.nbytes for moment in moments)
    _, steps = open_training(config, read_manifest(model))
    planned = [step for step, _ in zip(steps.steps(), range(3), strict=False)]
    assert plan.tokens == sum(steps.num_tokens(step.rows) for step in planned)
    assert 0 <= plan.padding_fraction < 0.9
    assert plan.gpu_hours is None


def test_sharing_and_recomputing_take_less(storage_uri: str, model: Path) -> None:
    whole = plan_training(make_config(storage_uri, model, num_workers=2, ema_decay=0.9))
    sharded = plan_training(
        make_config(
            storage_uri,
            model,
            num_workers=2,
            parallelism="fsdp",
            ema_decay=0.9,
            activation_checkpointing=True,
            gpus_per_worker=1,
        )
    )
    for part in ("weights", "gradients", "optimizer", "averaged weights"):
        assert sharded.memory[part] == whole.memory[part] // 2
    assert sharded.memory["activations (estimate)"] < whole.memory["activations (estimate)"]
    assert sharded.flops == pytest.approx(whole.flops * 8 / 6)
    assert sharded.gpu_hours is not None
    elastic = {"num_workers": (1, 2), "parallelism": "fsdp", "gpus_per_worker": 1}
    changing = plan_training(make_config(storage_uri, model, activation_checkpointing=True, **elastic))
    assert changing.memory["weights"] == whole.memory["weights"]  # one worker must hold them
    assert changing.gpu_hours == sharded.gpu_hours  # when there are two


def test_a_dry_run_leaves_nothing_behind(storage_uri: str, model: Path) -> None:
    before = sorted(Path(storage_uri).rglob("*"))
    plan_training(make_config(storage_uri, model, name="never", dry_run=True))
    assert sorted(Path(storage_uri).rglob("*")) == before
    run_training(make_config(storage_uri, model, name="really", num_steps=1), "r", Ranks(), None)
    assert sorted(Path(storage_uri).rglob("*")) != before
