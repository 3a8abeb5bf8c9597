import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexusgen import flow_matching, positions, verify_autoregressive
from nexusgen.comparison import compare, compare_exact
from nexusgen.errors import InputError
from nexusgen.model import weights
from nexusgen.verify import verify

GOLDEN = Path(__file__).parent.parent / "golden"


def failed(folder: Path) -> list[str]:
    return [case.name for case in verify(folder) if not case.passed]


def test_every_recorded_case_of_the_shipped_set_passes():
    cases = list(verify(GOLDEN))
    assert [case.name for case in cases if not case.passed] == []
    assert len(cases) >= 90


def test_the_set_in_the_test_data_passes(test_data):
    assert failed(test_data / "golden") == []


def test_one_changed_weight_fails(tmp_path):
    folder = tmp_path / "ar"
    shutil.copytree(GOLDEN / "ar", folder)
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.01
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert any(name.endswith("logits") for name in failed(folder))


def test_a_shifted_position_fails(monkeypatch):
    def shifted(height, width):
        return positions.image_offsets(height, width)[[0, 2, 1]]

    monkeypatch.setattr("nexusgen.replies.image_offsets", shifted)
    assert any("image_embeddings" in name for name in failed(GOLDEN / "ar"))


def test_a_swapped_key_mapping_fails(monkeypatch):
    def swapped(name):
        name = name.replace("layers.0", "layers.X").replace("layers.1", "layers.0").replace("layers.X", "layers.1")
        return module_key(name)

    module_key = weights.module_key
    monkeypatch.setattr(weights, "module_key", swapped)
    assert any("logits" in name for name in failed(GOLDEN / "ar"))


def test_another_scheduler_table_fails(monkeypatch):
    make = flow_matching.make_scheduler
    monkeypatch.setattr(flow_matching, "make_scheduler", lambda: make(shift=2.9))
    assert any("sched" in name for name in failed(GOLDEN / "gen_decoder"))


def test_a_folder_without_a_golden_set_is_refused(tmp_path):
    with pytest.raises(InputError, match="no golden set"):
        list(verify(tmp_path))


def test_nan_and_another_shape_fail():
    assert not compare("nan", torch.tensor([float("nan")]), torch.tensor([1.0]), 1.0).passed
    assert not compare("shape", torch.zeros(2), torch.zeros(3), 1.0).passed
    assert compare("equal", torch.ones(2), torch.ones(2), 0.0).passed
    assert not compare_exact("ids", torch.tensor([1, 2]), torch.tensor([1, 3])).passed


def test_near_ties_excuse_only_what_follows_them():
    got, want = torch.tensor([1, 2, 3]), torch.tensor([1, 9, 3])
    decided = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    tie = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    steps = torch.arange(3)
    assert verify_autoregressive._decided_mismatches(got, want, steps, decided) == 1
    assert verify_autoregressive._decided_mismatches(got, want, steps, tie) == 0
