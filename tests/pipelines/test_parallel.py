"""How a stage's module gets its weights: on meta first, laid over ranks, then filled from files; and recomputation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from servers import free_port
from test_loop import assert_same_training, run_ranks, weights_of
from test_train import make_config, recorded
from torch import Tensor, nn

from nexusgen.errors import ModelError
from nexusgen.model.manifest import read_manifest
from nexusgen.model.weights import State, load_model, start_editing_decoder, write_manifest
from pipelines import stages
from pipelines.loop import Ranks, run_training
from pipelines.lora import LoraConfig
from pipelines.parallel import fill_module
from pipelines.stages import STAGES, StageName, build_stage, hollow_stage

LORA = LoraConfig(rank=4, alpha=8, targets=("q_proj", "down_proj"))
CPU = torch.device("cpu")
# One of two ranks: shards what stages on model folders train before it has weights, fills it; rank 0 writes all of it.
RANK = """
import json, os, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from pipelines.lora import LoraConfig
from pipelines.parallel import local, shard_module, whole
from pipelines.stages import hollow_stage

rank, out = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
for number, (stage, folder, lora) in enumerate(json.loads(sys.argv[3])):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if lora else torch.float32
    hollow = hollow_stage(stage, Path(folder), "uniform", 0.0, LoraConfig(**lora) if lora else None, dtype)
    assert all(parameter.is_meta for parameter in hollow.module.parameters())
    shard_module(hollow.module, 2, torch.device("cpu"), torch.float32)
    hollow.fill(torch.device("cpu"))
    held = sum(local(parameter).numel() for parameter in hollow.module.parameters())
    total = sum(parameter.numel() for parameter in hollow.module.parameters())
    assert 0.45 * total < held < 0.55 * total, (held, total)
    state = {name: whole(tensor).clone() for name, tensor in hollow.module.state_dict().items()}
    buffers = {f"buffer {name}": buffer.clone() for name, buffer in hollow.module.named_buffers()}
    if rank == 0:
        save_file(state | buffers, out / f"{number}.safetensors")
torch.distributed.destroy_process_group()
os._exit(0)  # a thread of gloo that still holds a tensor would abort the interpreter's own end
"""


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The tiny model with one matrix for token embeddings and output, stored once, as Qwen2.5-VL-3B has it."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("tied") / "model")
    path = folder / "autoregressive" / "config.json"
    content = json.loads(path.read_text())
    for part in (content, content["text_config"]):
        part["tie_word_embeddings"] = True
    path.write_text(json.dumps(content))
    change_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    write_manifest(folder, **read_manifest(folder).model_dump(exclude={"parts", "fingerprints", "fingerprint"}))
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "autoregressive" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def loaded(stage: StageName, folder: Path, lora: LoraConfig | None, dtype: torch.dtype) -> nn.Module:
    """A stage's module without streaming: loaded whole, in fp32, and then given adapters by peft."""
    if stage == "editing_decoder":
        module: Any = start_editing_decoder(folder).editing_decoder
        return module
    part = "autoregressive" if stage == "ar" else stage
    module = getattr(load_model(folder, [part]), part)
    if stage == "ar":
        module.qwen.model.visual = nn.Identity()
    if lora is not None:
        module.requires_grad_(False)
        layers = peft.LoraConfig(r=lora.rank, lora_alpha=int(lora.alpha), target_modules=list(lora.targets))
        torch.manual_seed(0)
        peft.inject_adapter_in_model(layers, module.qwen.model.language_model)
        for part_in_full in (module.vision_head, module.image_prefill_embeds):
            part_in_full.requires_grad_(True)
        embeddings = module.qwen.model.language_model.embed_tokens.weight
        for linear in (m for m in module.modules() if isinstance(m, nn.Linear)):
            if not linear.weight.requires_grad and linear.weight is not embeddings:
                linear.to(dtype)
    return module


def assert_same_module(ours: nn.Module, theirs: nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        found, wanted = dict(getattr(ours, kind)()), dict(getattr(theirs, kind)())
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            assert (tensor.dtype, tensor.requires_grad) == (wanted[name].dtype, wanted[name].requires_grad), name
            assert torch.equal(tensor, wanted[name]), name


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_filled_module_is_the_one_that_is_loaded_whole(stage: StageName, model: Path) -> None:
    hollow = hollow_stage(stage, model, "uniform")
    assert all(parameter.is_meta for parameter in hollow.module.parameters())
    assert_same_module(build_stage(stage, model, "uniform").module, loaded(stage, model, None, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_filled_module_with_adapters_is_the_one_that_peft_makes(dtype: torch.dtype, model: Path, tied: Path) -> None:
    for folder in (model, tied):
        torch.manual_seed(0)
        stage = build_stage("ar", folder, "uniform", 0.0, LORA, dtype)
        assert_same_module(stage.module, loaded("ar", folder, LORA, dtype))


def test_two_ranks_that_each_read_their_part_have_the_weights_of_one_that_reads_all(
    model: Path, tied: Path, tmp_path: Path
) -> None:
    lora = LORA.model_dump()
    cases: list[tuple[StageName, Path, dict[str, Any] | None]] = [(stage, model, None) for stage in STAGES]
    cases += [("ar", model, lora), ("ar", tied, None), ("ar", tied, lora)]
    told = json.dumps([(stage, str(folder), lora) for stage, folder, lora in cases])
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path), told],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    for number, (stage, folder, adapters) in enumerate(cases):
        dtype = torch.bfloat16 if adapters else torch.float32
        module = loaded(stage, folder, LORA if adapters else None, dtype)
        wanted = dict(module.state_dict()) | {f"buffer {name}": buffer for name, buffer in module.named_buffers()}
        found = load_file(tmp_path / f"{number}.safetensors")
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            assert tensor.dtype == wanted[name].dtype
            assert torch.equal(tensor, wanted[name]), (stage, name)


def test_a_tied_matrix_is_learned_as_one_on_one_rank_and_sharded_on_two(
    storage_uri: str, tied: Path, tmp_path: Path
) -> None:
    common = {"num_steps": 4, "checkpoint_every": 4}
    alone = make_config(storage_uri, tied, name="tied-one", accumulate=2, **common)
    together = make_config(storage_uri, tied, name="tied-two", num_workers=2, parallelism="fsdp", **common)
    (expected,), (found,) = run_ranks([alone], 1, tmp_path), run_ranks([together], 2, tmp_path)
    assert_same_training(found, expected)
    first = load_file(tied / "autoregressive" / "model.safetensors")["model.embed_tokens.weight"]
    for config in (alone, together):
        weights = weights_of(config, tmp_path)
        output, embeddings = weights["qwen.lm_head.weight"], weights["qwen.model.language_model.embed_tokens.weight"]
        assert torch.equal(output, embeddings)
        assert not torch.equal(output, first)


def test_tensors_that_are_missing_or_left_over_are_named(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["surplus.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
        tensors["model.norm.weight"] = tensors["model.norm.weight"][1:].clone()

    change_weights(folder, change)
    with pytest.raises(ModelError) as caught:
        hollow_stage("ar", folder, "uniform")
    told = str(caught.value)
    assert str(folder / "autoregressive") in told
    assert "missing qwen.model.language_model.layers.0.mlp.up_proj.weight; unexpected surplus.weight" in told
    assert "norm.weight has shape (127,), expected (128,)" in told
    module = nn.Linear(2, 2, device="meta")
    with pytest.raises(ModelError, match="missing bias"):
        fill_module(module, {"weight": torch.zeros(2, 2)}, CPU)
    assert module.weight.is_meta  # nothing was done


def on_meta(state: State, keep: Callable[[str], bool] = lambda _: False) -> State:
    """Tensors that can't be read, but for some."""
    return {name: tensor if keep(name) else tensor.to("meta") for name, tensor in state.items()}


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_resumed_training_reads_of_the_base_what_is_frozen_and_nothing_else(
    lora: LoraConfig | None, storage_uri: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(storage_uri, model, name=f"resumed-{lora is None}", num_steps=6, lora=lora, checkpoint_every=3)
    with recorded(monkeypatch) as undisturbed:
        run_training(config.model_copy(update={"name": f"whole-{lora is None}"}), "r", Ranks(), None)
    with recorded(monkeypatch, stop_after=4), pytest.raises(KeyboardInterrupt):
        run_training(config, "r", Ranks(), None)
    load_hollow = stages.load_hollow
    trained_in_full = ("vision_head.weight", "image_prefill_embeds.weight")

    def unreadable(*arguments: Any) -> tuple[Any, State]:
        opened, state = load_hollow(*arguments)
        return opened, on_meta(state, lambda name: lora is not None and name not in trained_in_full)

    monkeypatch.setattr(stages, "load_hollow", unreadable)
    with recorded(monkeypatch) as resumed:
        run_training(config, "r", Ranks(), None)
    assert [(r.step, r.losses) for r in resumed] == [(r.step, r.losses) for r in undisturbed[3:]]
    with pytest.raises(NotImplementedError, match="meta"):  # a first start reads all
        run_training(config.model_copy(update={"name": f"fresh-{lora is None}"}), "r", Ranks(), None)
    monkeypatch.setattr(stages, "load_hollow", lambda *a: (load_hollow(*a)[0], on_meta(load_hollow(*a)[1])))
    if lora is not None:
        again = config.model_copy(update={"num_steps": 7})
        with pytest.raises(NotImplementedError, match="meta"):  # and frozen tensors are in no checkpoint
            run_training(again, "r", Ranks(), None)


# --- activations ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # FLUX's norms under autocast
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", STAGES)
def test_activations_that_are_computed_again_give_the_same_training(
    stage: StageName, precision: str, storage_uri: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 on a CPU attention takes another kernel than torch's own choice, and so must the recomputation."""
    runs = []
    for recomputes in (False, True):
        config = make_config(
            storage_uri,
            model,
            stage=stage,
            name=f"{stage}-{precision}-{recomputes}",
            precision=precision,
            num_steps=3,
            activation_checkpointing=recomputes,
        )
        with recorded(monkeypatch) as records:
            run_training(config, "r", Ranks(), None)
        runs.append([(record.losses, record.grad_norm) for record in records])
    assert runs[0] == runs[1]
