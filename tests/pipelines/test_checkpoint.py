from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nexusgen.errors import ModelError
from pipelines import checkpoint
from pipelines.checkpoint import DataInput, Meta


def make_meta(step: int) -> Meta:
    return Meta(
        stage="ar",
        step=step,
        num_steps=20,
        run_id="r",
        seed=0,
        plan_digest="p",
        world_size=1,
        config={"learning_rate": 1e-3},
        base_fingerprint="b",
        inputs=(DataInput(name="x/vision", uri="u", digest="d", run_id="e"),),
        num_samples=10,
        loss_first=2.0,
        loss_last=1.0,
        validation={"mse": 0.5},
    )


def make_trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return module, optimizer


def test_weights_optimizer_and_meta_come_back(tmp_path: Path) -> None:
    folder = checkpoint.stage_folder(str(tmp_path), "demo", "ar")
    assert checkpoint.latest(folder) is None
    module, optimizer = make_trained(0)
    uri = checkpoint.save(folder, module, optimizer, make_meta(5))
    checkpoint.save(folder, module, optimizer, make_meta(10))
    assert Path(uri).name == "step-000005"
    found = checkpoint.latest(folder)
    assert found is not None
    assert found.meta == make_meta(10)
    other, other_optimizer = make_trained(1)
    parameter = other.weight
    checkpoint.load(found, other, other_optimizer)
    assert other.weight is parameter
    for ours, theirs in ((module, other), (optimizer, other_optimizer)):
        state, loaded = ours.state_dict(), theirs.state_dict()
        torch.testing.assert_close(loaded, state, rtol=0, atol=0)


def test_a_checkpoint_without_pointer_is_never_the_latest(tmp_path: Path) -> None:
    folder = str(tmp_path / "ar")
    checkpoint.save(folder, *make_trained(0), make_meta(5))
    (tmp_path / "ar" / "step-000010").mkdir()
    found = checkpoint.latest(folder)
    assert found is not None
    assert found.meta.step == 5
    checkpoint.forget(folder)
    assert checkpoint.latest(folder) is None


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    folder = str(tmp_path / "ar")
    uri = checkpoint.save(folder, *make_trained(0), make_meta(5))
    found = checkpoint.latest(folder)
    assert found is not None
    module = nn.Linear(4, 2)
    with pytest.raises(ModelError, match="don't fit"):
        checkpoint.load(found, module, torch.optim.AdamW(module.parameters()))
    (Path(uri) / "meta.json").write_text("{}")
    with pytest.raises(ModelError, match="fresh=true"):
        checkpoint.latest(folder)
