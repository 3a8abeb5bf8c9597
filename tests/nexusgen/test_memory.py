"""The memory plan: weights counted from headers as they will be loaded, peaks, and what is said when they don't fit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import psutil
import pytest
import torch

from nexusgen.errors import ModelError, ResourceError
from nexusgen.memory import GB, HalfPlan, MemoryPlan, free_bytes, plan_memory, weight_bytes, working_bytes
from nexusgen.model.manifest import demo_base
from nexusgen.model.weights import DRAWING_PARTS, load_model


@pytest.mark.parametrize(
    ("dtype", "quantise"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "fp8")]
)
def test_planned_weights_are_those_that_are_loaded(dtype: torch.dtype, quantise: str | None) -> None:
    plan = plan_memory(demo_base(), DRAWING_PARTS, dtype, quantise=quantise)
    model = load_model(demo_base(), DRAWING_PARTS, dtype, quantise=quantise)
    loaded = {
        "autoregressive": model.autoregressive,
        "generation_decoder": model.generation_decoder,
        "vae": model.autoencoder,
    }
    planned = {part: size for half in plan.halves.values() for part, size in half.weights.items()}
    assert planned == {part: sum(t.nbytes for t in module.state_dict().values()) for part, module in loaded.items()}


def test_quantisation_is_of_decoders_alone() -> None:
    for part, is_smaller in (("autoregressive", False), ("vae", False), ("generation_decoder", True)):
        plain, small = (weight_bytes(demo_base(), part, torch.bfloat16, quantise) for quantise in (None, "fp8"))
        assert (small < 0.75 * plain) == is_smaller
        assert is_smaller or small == plain


def test_peaks_with_and_without_offload() -> None:
    plan = plan_memory(demo_base(), DRAWING_PARTS)
    autoregressive, drawing = plan.halves["autoregressive"], plan.halves["drawing"]
    weights = sum(autoregressive.weights.values()) + sum(drawing.weights.values())
    assert plan.whole == weights + max(autoregressive.working, drawing.working)
    assert plan.offloaded == max(autoregressive.total, drawing.total) < plan.whole
    assert plan.peak == plan.whole
    assert plan_memory(demo_base(), DRAWING_PARTS, offload=True).peak == plan.offloaded
    alone = plan_memory(demo_base(), ["autoregressive"])
    assert set(alone.halves) == {"autoregressive"}
    assert "--offload" not in " ".join(name for name, _ in alone.rows())  # there is nothing to offload
    assert dict(plan.rows())["peak, whole"] == f"{plan.whole / GB:.3f}"


def test_computation_grows_with_the_picture_and_the_dtype() -> None:
    drawing = ("generation_decoder", "vae")
    small, large = (working_bytes(demo_base(), drawing, torch.float32, (side, side)) for side in (96, 1024))
    assert large > small
    assert working_bytes(demo_base(), drawing, torch.bfloat16, (1024, 1024)) == large // 2
    asked = plan_memory(demo_base(), drawing, size=(1024, 1024)).halves["drawing"]
    assert asked.working == large
    assert plan_memory(demo_base(), drawing).halves["drawing"].working == small  # the manifest's own size


def plan(
    free: float, offload: bool = False, quantise: str | None = None, dtype: torch.dtype = torch.float32
) -> MemoryPlan:
    halves = {
        "autoregressive": HalfPlan({"autoregressive": 16 * 10**9}, 10**9),
        "drawing": HalfPlan({"generation_decoder": 24 * 10**9, "vae": 10**9}, 2 * 10**9),
    }
    return MemoryPlan("cuda", dtype, quantise, offload, halves, int(free * GB))


def test_too_little_memory_is_refused_with_the_numbers_and_the_ways_out() -> None:
    plan(43).check()
    plan(27, offload=True).check()
    with pytest.raises(ResourceError, match=r"needs 43\.00 GB on cuda in fp32, which has 42\.90 GB free") as refused:
        plan(42.9).check()
    for way in ("--offload (27.00 GB)", "--quantise fp8", "--dtype bf16", "another --device"):
        assert way in str(refused.value)
    with pytest.raises(ResourceError, match=r"needs 27\.00 GB on cuda in bf16") as refused:
        plan(26, offload=True, quantise="fp8", dtype=torch.bfloat16).check()
    for way in ("--offload", "--quantise", "--dtype"):  # are used already
        assert way not in str(refused.value)


def test_free_memory_of_the_cpu_is_what_can_be_had() -> None:
    assert 0 < free_bytes("cpu") <= psutil.virtual_memory().total


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_free_memory_of_a_gpu_is_its_own() -> None:
    assert 0 < free_bytes("cuda") <= torch.cuda.get_device_properties(0).total_memory


def test_folders_that_cannot_be_planned_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no part editing_decoder"):
        plan_memory(demo_base(), ["editing_decoder"])
    folder = shutil.copytree(demo_base(), tmp_path / "model")
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=re.escape("config.json can't be read")):
        plan_memory(folder, ["vae"])
    (folder / "decoders" / "generation" / "conditioner.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ModelError, match=r"conditioner\.safetensors is not a readable safetensors file"):
        plan_memory(folder, ["generation_decoder"])
