"""The training loop on one process and on two real ones (gloo), without Ray."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from servers import free_port
from test_train import make_config
from torch import nn

from nexusgen.errors import NexusgenError
from pipelines import checkpoint
from pipelines.follow import StepRecord
from pipelines.loop import GUARD_WARMUP, Ranks, SpikeGuard, WeightAverage, run_training
from pipelines.parallel import resolve_precision
from pipelines.stages import STAGES
from pipelines.train import TrainConfig

# One rank of some trainings, one after another: CONFIGS.json, rank, number of ranks, file for the records of steps.
RANK = """
import json, os, sys
import torch
from pipelines import loop
from pipelines.train import TrainConfig

configs, rank, world_size, out = json.loads(open(sys.argv[1]).read()), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)  # of one, too, as Ray Train has it
records, steps = [], loop.training_steps

def watched(*arguments):
    for record in steps(*arguments):
        records[-1].append([record.step, record.losses, record.grad_norm, record.is_skipped])
        yield record

loop.training_steps = watched
for config in configs:
    records.append([])
    loop.run_training(TrainConfig.model_validate(config), "r", loop.Ranks(rank, world_size), None)
with open(out, "w") as file:
    json.dump(records, file)
torch.distributed.destroy_process_group()
os._exit(0)  # a thread of gloo that still holds a tensor would abort the interpreter's own end
"""


def run_ranks(configs: Sequence[TrainConfig], world_size: int, folder: Path) -> list[list[Any]]:
    """Train on so many processes; gives rank 0's records of each: step, losses, gradient norm, skipped or not."""
    settings = folder / "configs.json"
    settings.write_text(json.dumps([config.model_dump(mode="json") for config in configs]))
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(settings), str(rank), str(world_size), str(folder / f"{rank}.json")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size, "\n".join(errors)
    records: list[list[Any]] = json.loads((folder / "0.json").read_text())
    return records


def weights_of(config: TrainConfig, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a training's last checkpoint."""
    found = checkpoint.latest(checkpoint.stage_folder(config.storage, config.name, config.stage))
    assert found is not None
    checkpoint.export_weights(found, folder / "weights.safetensors")
    return load_file(folder / "weights.safetensors")


def assert_same_training(ours: list[Any], theirs: list[Any], tolerance: float = 1e-5) -> None:
    assert [record[0] for record in ours] == [record[0] for record in theirs]
    for (_, losses, norm, _), (_, others, other_norm, _) in zip(ours, theirs, strict=True):
        assert losses == pytest.approx(others, rel=tolerance)
        assert norm == pytest.approx(other_norm, rel=10 * tolerance)


def test_two_ranks_whole_or_sharded_learn_what_one_learns(storage_uri: str, model: Path, tmp_path: Path) -> None:
    """FSDP2 on two processes, whole weights on two, and one process that takes both parts of each step.

    Samples have unequal lengths, so that a mean of the ranks' means would differ.
    """
    alone, together = [], []
    for stage in STAGES:
        common = {"stage": stage, "num_steps": 5, "checkpoint_every": 5}
        alone.append(make_config(storage_uri, model, name=f"one-{stage}", accumulate=2, **common))
        for way in ("replicated", "fsdp"):
            together.append(
                make_config(storage_uri, model, name=f"{way}-{stage}", num_workers=2, parallelism=way, **common)
            )
    expected = run_ranks(alone, 1, tmp_path)
    for number, (config, records) in enumerate(zip(together, run_ranks(together, 2, tmp_path), strict=True)):
        assert_same_training(records, expected[number // 2])
        torch.testing.assert_close(
            weights_of(config, tmp_path), weights_of(alone[number // 2], tmp_path), rtol=1e-3, atol=1e-4
        )


def test_how_a_step_is_cut_changes_nothing_but_what_a_mean_of_means_weighs(
    storage_uri: str, model: Path, tmp_path: Path
) -> None:
    """Micro-batches and recomputed activations give the same training; `per_rank` another gradient."""
    common = {"num_steps": 3, "checkpoint_every": 3, "virtual_streams": 4}
    ways: list[dict[str, Any]] = [
        {},
        {"accumulate": 4, "activation_checkpointing": True},
        {"accumulate": 4, "normalisation": "per_rank"},
    ]
    configs = [make_config(storage_uri, model, name=f"cut-{n}", **common, **way) for n, way in enumerate(ways)]
    once, often, by_rank = run_ranks(configs, 1, tmp_path)
    assert_same_training(often, once)
    assert by_rank[0][1] == pytest.approx(once[0][1], rel=1e-5)  # what is reported is the mean over all terms
    assert by_rank[0][2] != pytest.approx(once[0][2], rel=1e-4)


@pytest.mark.parametrize("parallelism", ["replicated", "fsdp"])
def test_a_number_of_workers_that_shares_a_step_unevenly_learns_the_same(
    parallelism: str, storage_uri: str, model: Path, tmp_path: Path
) -> None:
    """Three ranks for four micro-batches, each of which counts alike: the last rank makes two empty passes."""
    common = {"num_steps": 4, "checkpoint_every": 4, "virtual_streams": 4, "normalisation": "per_rank"}
    common |= {"num_workers": (1, 4), "parallelism": parallelism}
    alone, three = (make_config(storage_uri, model, name=f"uneven-{parallelism}-{n}", **common) for n in (1, 3))
    (expected,) = run_ranks([alone], 1, tmp_path)
    (records,) = run_ranks([three], 3, tmp_path)
    assert_same_training(records, expected)


def test_the_guard_skips_what_is_not_finite_or_far_too_large() -> None:
    guard = SpikeGuard(10.0)
    assert not guard.accepts(math.nan, 1.0)
    assert not guard.accepts(1.0, math.inf)
    assert all(guard.accepts(1.0, 1.0 + 0.1 * number) for number in range(GUARD_WARMUP - 1))
    assert guard.accepts(1.0, 500.0)  # there are too few to compare with
    assert not guard.accepts(1.0, 500.0)
    again = SpikeGuard(10.0, tuple(guard.norms))
    assert not again.accepts(1.0, 500.0)
    assert again.accepts(1.0, 9.0)


def test_a_step_with_a_bad_gradient_changes_nothing_and_too_many_end_the_training(
    storage_uri: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample's embeddings become NaN at step 3, as a damaged file would have it."""
    from pipelines import loop

    records: list[StepRecord] = []
    steps = loop.training_steps

    def poisoned(stage: Any, batches: Any, *rest: Any) -> Any:
        def spoil() -> Any:
            for batch in batches:
                if batch.planned.step in (3, 4):
                    for micro in batch.micro_batches:
                        micro.content.target_embeddings.fill_(math.nan)
                yield batch

        before = None
        for record in steps(stage, spoil(), *rest):
            records.append(record)
            if record.step == 2:
                before = [parameter.detach().clone() for parameter in stage.module.parameters()]
            if record.step in (3, 4) and before is not None:
                assert all(torch.equal(a, b) for a, b in zip(before, stage.module.parameters(), strict=True))
            yield record

    monkeypatch.setattr(loop, "training_steps", poisoned)
    config = make_config(storage_uri, model, name="poisoned", num_steps=6, max_skipped_steps=2)
    run_training(config, "r", Ranks(), None)
    assert [record.step for record in records if record.is_skipped] == [3, 4]
    found = checkpoint.latest(checkpoint.stage_folder(storage_uri, "poisoned", "ar"))
    assert found is not None
    assert found.meta.num_skipped == 2
    assert math.isfinite(found.meta.loss_last)
    stricter = make_config(storage_uri, model, name="stricter", num_steps=6, max_skipped_steps=1)
    with pytest.raises(NexusgenError, match=r"2 steps were skipped.*step 4.*Its samples: sample-.*max_gradient_ratio"):
        run_training(stricter, "r", Ranks(), None)


def test_averaged_weights_follow_the_weights_and_are_what_is_published(
    storage_uri: str, model: Path, tmp_path: Path
) -> None:
    module = nn.Linear(2, 1, bias=False)
    average = WeightAverage(module, 0.5)
    first = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    average.update(100)
    torch.testing.assert_close(average.tensors["weight"], first + 0.5)
    with average.applied():
        torch.testing.assert_close(module.weight.detach(), first + 0.5)
    torch.testing.assert_close(module.weight.detach(), first + 1.0)

    common = {"stage": "generation_decoder", "num_steps": 4, "checkpoint_every": 4}
    plain, averaged = (
        make_config(storage_uri, model, name=f"ema-{decay}", ema_decay=decay, **common) for decay in (0.0, 0.9)
    )
    for config in (plain, averaged):
        run_training(config, "r", Ranks(), None)
    ours, theirs = weights_of(averaged, tmp_path), weights_of(plain, tmp_path)
    assert ours.keys() == theirs.keys()
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_precision_follows_the_hardware_unless_it_is_set() -> None:
    assert resolve_precision("auto", on_gpu=True) == "bf16"
    is_fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert resolve_precision("auto", on_gpu=False) == ("bf16" if is_fast else "fp32")
    assert [resolve_precision(wanted, on_gpu=False) for wanted in ("bf16", "fp32")] == ["bf16", "fp32"]
