import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from servers import free_port
from test_train import make_config
from tiny_training import make_embedded

from nexusgen.errors import ResourceError
from nexusgen.geometry import Geometry
from nexusgen.model.manifest import read_manifest
from pipelines.loop import Ranks, make_optimizer, open_training, run_training
from pipelines.stages import STAGES, build_stage
from pipelines.train_plan import plan_training

ROOT = Path(__file__).parents[2]


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


@pytest.fixture
def qwen_3b(tmp_path: Path, model: Path) -> Path:
    """A folder of Qwen2.5-VL-3B's sizes with a tokenizer and without weights: a plan reads none."""
    folder = tmp_path / "qwen-3b"
    shutil.copytree(model / "autoregressive", folder / "autoregressive")
    (folder / "autoregressive" / "model.safetensors").unlink()
    shutil.copy(ROOT / "tests/nexusgen/qwen2_5_vl_3b/config.json", folder / "autoregressive")
    manifest = read_manifest(model).model_copy(update={"parts": ("autoregressive",), "geometry": Geometry()})
    (folder / "nexusgen.json").write_text(manifest.model_dump_json())
    return folder


def test_a_3b_base_is_planned_by_its_configuration_alone(tmp_path: Path, model: Path, qwen_3b: Path) -> None:
    uri = str(tmp_path / "storage")
    make_embedded(uri, "train-3b", model)
    settings = [f"storage={uri}", f"model={qwen_3b}", "dry_run=true"]
    command = [sys.executable, "-m", "jobs.train", str(ROOT / "jobs/configs/3b/train_ar.yaml"), *settings, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    # Of 3,754,622,976 parameters the vision tower's 668,684,288 are frozen and absent; the other two are Nexus-Gen's.
    assert plan["parameters"] == 3_754_622_976 - 668_684_288 + 2048 * 2048 + 81 * 2048
    assert (plan["frozen"], plan["num_steps"]) == (0, 616_000)
    assert plan["memory"]["weights"] == 4 * plan["parameters"] // 8  # shared by 8 workers
    assert plan["gpu_hours"] > 0


def test_a_dry_run_says_at_once_that_a_store_does_not_answer(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    config = make_config("s3://bucket/nexusgen", model, dry_run=True)
    with pytest.raises(ResourceError, match=r"dry_run reads .*s3://bucket/nexusgen.*1 attempt in .*can be read"):
        plan_training(config)
