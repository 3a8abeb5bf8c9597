"""Adapters on a frozen language model: how they train, resume and are sharded, and the models that they become."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loop import assert_same_training, run_ranks
from test_train import make_config, recorded
from tiny_training import make_tiny_model

from nexusgen.config import load_config, parse_config
from nexusgen.errors import ConfigError, FingerprintError, ModelError
from nexusgen.model.manifest import read_manifest
from nexusgen.model.weights import assemble_model, iterate_tensors, load_model
from pipelines import checkpoint, tracking
from pipelines.checkpoint import Checkpoint
from pipelines.follow import validate
from pipelines.loop import Ranks, make_optimizer, open_training, run_training
from pipelines.lora import ADAPTER_FILE, ADAPTER_RECORD, LoraConfig, merge_adapters, merge_file
from pipelines.register import RegisterConfig, register
from pipelines.registry import resolve_model
from pipelines.stage_data import StageSource
from pipelines.stages import AutoregressiveStage, StepRandom, build_stage
from pipelines.train import TrainConfig, train
from pipelines.train_plan import plan_training

LORA = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "down_proj"]}
# After some steps the adapters' share of the loss is far above rounding.
FAST: dict[str, Any] = {"lora": LORA, "learning_rate": 0.02, "num_steps": 6, "checkpoint_every": 3}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own where a machine keeps what it made of adapters."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def stage_on(folder: Path, lora: LoraConfig | None = None, dtype: torch.dtype = torch.float32) -> AutoregressiveStage:
    torch.manual_seed(0)
    stage = build_stage("ar", folder, "uniform", 0.0, lora, dtype)
    assert isinstance(stage, AutoregressiveStage)
    return stage


def some_losses(stage: AutoregressiveStage, config: TrainConfig) -> dict[str, float]:
    """The losses of some training samples, as sums."""
    data, _ = open_training(config, read_manifest(resolve_model(config.model, config.storage)))
    batch = stage.collate(StageSource(data, stage).samples(data.train[:8]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
        return {name: float(part.sum) for name, part in stage.loss(batch, StepRandom(0, 0)).items()}


def last(config: TrainConfig) -> Checkpoint:
    found = checkpoint.latest(checkpoint.stage_folder(config.storage, config.name, "ar"))
    assert found is not None
    return found


def exported(config: TrainConfig, folder: Path) -> dict[str, torch.Tensor]:
    checkpoint.export_weights(last(config), folder / "weights.safetensors")
    return load_file(folder / "weights.safetensors")


def train_followed(config: TrainConfig) -> None:
    """A training with an MLflow run, as `train` makes one, in this process."""
    with tracking.job_run(config.storage, config.name, "train", "", stage="ar") as run:
        run_training(config, run.run_id, Ranks(), None)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fresh_adapter_changes_nothing_nor_does_the_dtype_of_frozen_matrices(
    precision: str, storage_uri: str, model: Path
) -> None:
    config = make_config(storage_uri, model, precision=precision)
    expected = some_losses(stage_on(model), config)
    for dtype in {torch.float32, torch.bfloat16 if precision == "bf16" else torch.float32}:
        adapted = stage_on(model, LoraConfig(), dtype)
        frozen = {parameter.dtype for parameter in adapted.module.parameters() if not parameter.requires_grad}
        assert frozen == {torch.float32, dtype}
        assert some_losses(adapted, config) == expected


def test_only_adapters_and_what_is_learned_anew_are_trained_and_kept(
    storage_uri: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipelines.loop as loop

    stages: list[Any] = []
    build = loop.hollow_stage
    monkeypatch.setattr(loop, "hollow_stage", lambda *arguments: stages.append(build(*arguments)) or stages[-1])
    config = make_config(storage_uri, model, name="frozen", **FAST)
    run_training(config, "r", Ranks(), None)
    before = dict(stage_on(model, config.lora).module.named_parameters())
    after = dict(stages[0].module.named_parameters())
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    in_full = {"vision_head.weight", "image_prefill_embeds.weight"}
    assert changed == {name for name in after if "lora_" in name} | in_full
    assert len(changed) == 4 * 3 * 2 + 2  # layers, targets, A and B
    weights = exported(config, tmp_path)
    assert weights.keys() == changed
    assert all(torch.equal(weights[name], after[name].detach()) for name in changed)
    optimizer = make_optimizer(stages[0].module, config)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(changed)


def test_a_resumed_training_with_adapters_and_an_average_is_bit_exact(
    storage_uri: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {"ema_decay": 0.9, "accumulate": 2}
    config = make_config(storage_uri, model, name="undisturbed", **FAST, **ways)
    with recorded(monkeypatch) as undisturbed:
        run_training(config, "r", Ranks(), None)
    stopped = config.model_copy(update={"name": "stopped"})
    with recorded(monkeypatch, stop_after=4), pytest.raises(KeyboardInterrupt):
        run_training(stopped, "r", Ranks(), None)
    assert last(stopped).meta.step == 3
    with recorded(monkeypatch) as resumed:
        run_training(stopped, "r", Ranks(), None)
    assert [(r.step, r.losses, r.grad_norm) for r in resumed] == [
        (r.step, r.losses, r.grad_norm) for r in undisturbed[3:]
    ]
    ours, theirs = exported(stopped, tmp_path), exported(config, tmp_path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    plain = config.model_copy(update={"name": "plain", "ema_decay": 0.0})
    run_training(plain, "r", Ranks(), None)
    raw = exported(plain, tmp_path)
    assert raw.keys() == theirs.keys()  # averages are of what is trained alone
    assert not any(torch.equal(raw[name], theirs[name]) for name in raw)


def test_two_ranks_whole_or_sharded_learn_what_one_learns_in_both_precisions(
    storage_uri: str, model: Path, tmp_path: Path
) -> None:
    """The second precision shards modules whose weights have two dtypes."""
    common = FAST | {"learning_rate": 2e-3, "num_steps": 4, "checkpoint_every": 4, "ema_decay": 0.5}
    alone = [make_config(storage_uri, model, name="one", accumulate=2, **common)]
    ways = [("fp32", "replicated"), ("fp32", "fsdp"), ("bf16", "replicated"), ("bf16", "fsdp")]
    together = [
        make_config(
            storage_uri,
            model,
            **common
            | {"name": f"{way}-{precision}", "num_workers": 2, "parallelism": way, "precision": precision}
            | {"activation_checkpointing": precision == "fp32"},
        )
        for precision, way in ways
    ]
    (expected,) = run_ranks(alone, 1, tmp_path)
    records = run_ranks(together, 2, tmp_path)
    wanted = exported(alone[0], tmp_path)
    for config, found in zip(together, records, strict=True):
        if config.precision == "fp32":
            assert_same_training(found, expected)
            torch.testing.assert_close(exported(config, tmp_path), wanted, rtol=1e-3, atol=1e-4)
        else:
            assert [record[1]["mse"] for record in found] == pytest.approx(
                [record[1]["mse"] for record in expected], rel=0.02
            )
            assert exported(config, tmp_path).keys() == wanted.keys()
    # A training on two sharded ranks goes on with one whole one.
    alone_again = {"num_steps": 5, "num_workers": 1, "parallelism": "replicated", "activation_checkpointing": False}
    resumed = together[1].model_copy(update=alone_again)
    run_training(resumed, "r", Ranks(), None)
    assert last(resumed).meta.step == 5


def test_adapters_belong_to_stage_ar_and_to_a_training(storage_uri: str, model: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora is for stage ar.*generation_decoder.*lora=null"):
        parse_config(TrainConfig, {"storage": "s", "name": "n", "stage": "generation_decoder", "lora": {}}, "x")
    with pytest.raises(ConfigError, match=r"lora\.targets.*'lm_head'.*'q_proj'"):
        parse_config(TrainConfig, {"storage": "s", "name": "n", "stage": "ar", "lora": {"targets": ["lm_head"]}}, "x")
    with pytest.raises(ConfigError, match=r"unknown key 'lora\.ranks'; did you mean 'rank'"):
        parse_config(TrainConfig, {"storage": "s", "name": "n", "stage": "ar", "lora": {"ranks": 4}}, "x")
    assert LoraConfig(targets=("v_proj", "q_proj", "v_proj")) == LoraConfig(targets=("q_proj", "v_proj"))
    config = make_config(storage_uri, model, name="belongs", **FAST)
    run_training(config, "r", Ranks(), None)
    assert last(config).meta.config["lora"]["rank"] == 4
    other = config.model_copy(update={"lora": LoraConfig(rank=8)})
    with pytest.raises(ConfigError, match=r"another training.*lora was .*'rank': 4.*now .*'rank': 8"):
        train(other)


def test_the_plan_counts_what_is_trained_and_what_is_frozen(storage_uri: str, model: Path) -> None:
    whole = plan_training(make_config(storage_uri, model))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        config = make_config(storage_uri, model, precision=precision, lora=LORA, ema_decay=0.9)
        plan = plan_training(config)
        parameters = list(stage_on(model, config.lora, dtype).module.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        assert plan.parameters == sum(parameter.numel() for parameter in trained)
        assert plan.frozen == sum(parameter.numel() for parameter in frozen)
        assert plan.memory["weights, frozen"] == sum(parameter.nbytes for parameter in frozen)
        assert plan.memory["weights"] == plan.memory["averaged weights"] == sum(p.nbytes for p in trained)
        assert plan.memory["optimizer"] == 2 * plan.memory["weights"] < whole.memory["optimizer"] / 10
        assert 0.6 < plan.flops / whole.flops < 0.8
        assert ("parameters that are frozen", f"{plan.frozen:,}") in plan.rows()
    shared = plan_training(make_config(storage_uri, model, lora=LORA, num_workers=2, parallelism="fsdp"))
    assert shared.memory["weights, frozen"] == 4 * shared.frozen // 2
    assert whole.frozen == 0


def test_the_shipped_configuration_fits_one_worker() -> None:
    loaded = load_config(TrainConfig, Path("jobs/configs/7b/train_ar_lora.yaml").resolve())
    assert (loaded.stage, loaded.num_workers, loaded.gpus_per_worker) == ("ar", 1, 1)
    assert loaded.lora == LoraConfig(rank=16, alpha=32)
    assert loaded.virtual_streams == loaded.num_workers * loaded.accumulate == loaded.batch_samples // 2


def test_the_registry_reads_records_without_torch() -> None:
    code = "import sys, pipelines.registry; assert not {'torch', 'peft'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- merging ----------------------------------------------------------------------------------------------------------


def test_merged_weights_give_the_loss_of_the_live_model(storage_uri: str, model: Path, tmp_path: Path) -> None:
    config = make_config(storage_uri, model, name="merged", **FAST)
    run_training(config, "r", Ranks(), None)
    assert config.lora is not None
    live = stage_on(model, config.lora)
    checkpoint.load(last(config), live.module, make_optimizer(live.module, config))
    checkpoint.export_weights(last(config), tmp_path / "adapter.safetensors")
    merge_file(model, tmp_path / "adapter.safetensors", tmp_path / "merged.safetensors", config.lora)
    folder = tmp_path / "model"
    assemble_model(model, folder, autoregressive=tmp_path / "merged.safetensors", lineage={}, dtype=torch.float32)
    ours, theirs, bases = (some_losses(stage, config) for stage in (stage_on(folder), live, stage_on(model)))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours["mse"] != pytest.approx(bases["mse"], rel=1e-2)
    # Without the adapters, and with all else that was trained, it is another model: they do take part.
    kept = {name: tensor for name, tensor in load_file(tmp_path / "adapter.safetensors").items() if "lora_" not in name}
    save_file(kept, tmp_path / "rest.safetensors")
    without = tmp_path / "without"
    assemble_model(model, without, autoregressive=tmp_path / "rest.safetensors", lineage={}, dtype=torch.float32)
    assert ours["mse"] != pytest.approx(some_losses(stage_on(without), config)["mse"], rel=1e-3)
    data, _ = open_training(config, read_manifest(model))
    again = validate(stage_on(folder), data, StageSource(data, live), config)
    assert again == pytest.approx(last(config).meta.validation, rel=1e-5)


def test_an_adapter_that_does_not_fit_is_refused_by_name(model: Path) -> None:
    layer = "qwen.model.language_model.layers.0.self_attn.q_proj"
    down, up = torch.zeros(4, 128), torch.zeros(128, 4)
    a, b = f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"
    settings = LoraConfig(rank=4)
    merged = merge_adapters(model, {a: down, b: up, "vision_head.weight": up}, settings)
    assert merged.keys() == {f"{layer}.weight", "vision_head.weight"}
    with pytest.raises(ModelError, match=r"q_proj doesn't fit.*A \(4, 128\), B missing.*\(128, 128\)"):
        merge_adapters(model, {a: down}, settings)
    with pytest.raises(ModelError, match=r"q_proj doesn't fit.*B \(64, 4\)"):
        merge_adapters(model, {a: down, b: up[:64]}, settings)
    with pytest.raises(ModelError, match=r"no layer .*layers\.77\."):
        merge_adapters(model, {a.replace(".0.", ".77."): down, b.replace(".0.", ".77."): up}, settings)


@pytest.mark.usefixtures("no_server")
def test_registering_merges_or_keeps_and_both_are_the_same_model(
    storage_uri: str, model: Path, tmp_path: Path, cache: Path
) -> None:
    config = make_config(storage_uri, model, name="registered", **FAST)
    train_followed(config)
    common = {"name": "registered", "model": str(model), "generation_decoder": None}
    folders, fingerprints = [], []
    for way in ("merge", "keep"):  # each in a storage of its own: the same weights get no second version
        place = tmp_path / way
        shutil.copytree(Path(storage_uri, "checkpoints", "registered"), place / "checkpoints" / "registered")
        report = register(RegisterConfig(storage=str(place), adapter=way, **common))
        folders.append(place / "models" / report.outputs["fingerprint"])
        fingerprints.append(report.outputs["fingerprint"])
        assert register(RegisterConfig(storage=str(place), adapter=way, **common)).reused
    merged, kept = folders
    assert fingerprints[0] == fingerprints[1] != read_manifest(model).fingerprint
    assert read_manifest(merged).lineage["stages"]["ar"]["lora"]["rank"] == 4

    # Merged: an ordinary folder, the base's weights with the adapters in them, in bf16.
    assert resolve_model("models:/nexusgen/1", str(tmp_path / "merge")) == merged
    assert not (merged / ADAPTER_RECORD).exists()
    assert config.lora is not None
    loaded = load_model(merged).autoregressive
    assert loaded is not None
    stored = loaded.state_dict()
    expected = merge_adapters(model, exported(config, tmp_path), config.lora)
    assert all(torch.equal(stored[name], tensor.bfloat16().float()) for name, tensor in expected.items())

    # Kept: the adapter alone, and which base it is for.
    record = json.loads((kept / ADAPTER_RECORD).read_text())
    assert (record["base"], record["base_fingerprint"]) == (str(model), read_manifest(model).fingerprint)
    weights = {path.relative_to(kept).as_posix() for path in kept.rglob("*.safetensors")}
    assert weights == {ADAPTER_FILE, "prompt_constants.safetensors"}
    assert load_file(kept / ADAPTER_FILE).keys() == exported(config, tmp_path).keys()
    for name in ("models:/nexusgen/1", str(kept)):
        applied = resolve_model(name, str(tmp_path / "keep"))
        assert applied.parent.parent == cache
        assert read_manifest(applied).fingerprint == fingerprints[0]
    ours, theirs = (dict(iterate_tensors(folder / "autoregressive")) for folder in (applied, merged))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert load_model(applied).generation_decoder is not None


@pytest.mark.usefixtures("no_server")
def test_a_kept_adapter_wants_its_very_base_and_its_own_files(storage_uri: str, tmp_path: Path, cache: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    config = make_config(storage_uri, base, name="kept", **FAST)
    train_followed(config)
    wanted = RegisterConfig(storage=storage_uri, name="kept", model=str(base), generation_decoder=None, adapter="keep")
    kept = Path(storage_uri, "models", register(wanted).outputs["fingerprint"])
    damaged = dict(load_file(kept / ADAPTER_FILE))
    whole = (kept / ADAPTER_FILE).read_bytes()
    damaged["vision_head.weight"] = damaged["vision_head.weight"] + 1
    save_file(damaged, kept / ADAPTER_FILE)
    with pytest.raises(ModelError, match=r"make the model .* was registered.*files have changed"):
        resolve_model(str(kept))
    (kept / ADAPTER_FILE).write_bytes(whole)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"adapter for the base .*/base, which isn't there"):
        resolve_model(str(kept))
    make_tiny_model(base, seed=1)
    with pytest.raises(FingerprintError, match=r"adapter for the base .* but .*/base is .* now.*adapter=merge"):
        resolve_model(str(kept))
    shutil.rmtree(base)
    (tmp_path / "elsewhere").rename(base)
    assert read_manifest(resolve_model(str(kept))).fingerprint == kept.name
    assert not [path.name for path in cache.rglob(".*")]


@pytest.mark.usefixtures("no_server")
def test_only_an_adapter_can_be_kept(storage_uri: str, model: Path) -> None:
    config = make_config(storage_uri, model, name="in-full", num_steps=1)
    train_followed(config)
    common = {"storage": storage_uri, "name": "in-full", "model": str(model), "adapter": "keep"}
    with pytest.raises(ConfigError, match=r"adapter=keep wants .*in-full/ar/step-000001 was trained in full"):
        register(RegisterConfig(generation_decoder=None, **common))
    assert RegisterConfig(storage="s", name="n").adapter == "merge"
