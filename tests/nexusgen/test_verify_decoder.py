"""Every recorded number of the reference's generation decoder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexusgen.comparison import FP32_TOLERANCE, Case
from nexusgen.verify_decoder import verify_generation_decoder

GOLDEN = Path(__file__).parent.parent / "golden" / "gen_decoder"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {case.name.removeprefix("generation_decoder."): case for case in verify_generation_decoder(GOLDEN)}


def test_every_case_agrees(cases: dict[str, Case]) -> None:
    assert [case for case in cases.values() if not case.passed] == []


def test_every_kind_of_number_is_compared(cases: dict[str, Case]) -> None:
    wanted = {"context", "pred.out", "pred.out_bf16", "sched1000.weights", "euler.cfg3.trajectory", "train1.loss"}
    assert wanted <= set(cases)
    assert len([name for name in cases if ".grad." in name]) == 8
    assert all(case.tolerance <= FP32_TOLERANCE for name, case in cases.items() if name.startswith("euler"))


def test_one_wrong_weight_fails(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN, tmp_path / "golden")
    state = torch.load(folder / "generation_decoder.bin", weights_only=True)
    state["pipe.dit.blocks.1.attn.norm_q_b.weight"][3] *= 1.01
    torch.save(state, folder / "generation_decoder.bin")
    failed = {case.name for case in verify_generation_decoder(folder) if not case.passed}
    assert "generation_decoder.weights.tensors" in failed
    assert "generation_decoder.pred.out" in failed
    assert "generation_decoder.context" not in failed


def test_a_recorded_nan_fails(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN, tmp_path / "golden")
    recorded = load_file(folder / "io.safetensors")
    recorded["pred.out"][0, 0, 0, 0] = float("nan")
    save_file(recorded, folder / "io.safetensors")
    failed = {case.name for case in verify_generation_decoder(folder) if not case.passed}
    assert failed == {"generation_decoder.pred.out"}
