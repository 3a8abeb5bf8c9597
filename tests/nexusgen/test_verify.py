import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexusgen import flow_matching, positions, verify_autoregressive
from nexusgen.comparison import compare, compare_exact, compare_l2
from nexusgen.errors import InputError, ModelError
from nexusgen.model import weights
from nexusgen.verify import verify

GOLDEN = Path(__file__).parent.parent / "golden"
TRAIN = ("mixed", "text", "understanding")


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


def changed(tmp_path: Path, file: str, change: Callable[[dict], None]) -> Path:
    """A copy of the autoregressive set, with one file of tensors, or `expected.json`, changed."""
    folder = shutil.copytree(GOLDEN / "ar", tmp_path / "ar")
    if file.endswith(".json"):
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))
    else:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)
    return folder


def rename(old: str, new: str) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(
    ("file", "change", "failing"),
    [
        ("train_mixed.safetensors", rename("logits", "logitz"), ["train_mixed.safetensors: logitz"]),
        (
            "train_text.safetensors",
            lambda tensors: tensors.update({"grad.model.layers.9.up": torch.zeros(1)}),
            ["train_text.safetensors: grad.model.layers.9.up"],
        ),
        ("expected.json", lambda content: content.update(train={}), [f"train_{n}.safetensors" for n in TRAIN]),
        (
            "expected.json",
            lambda content: content.pop("generate"),
            [f"gen_{n}.safetensors" for n in ("edit0", "t2i0", "t2i1", "t2i2")],
        ),
        ("expected.json", lambda content: content["train"]["text"].update(ce=5.85), ["train.text.expected.ce"]),
        (
            "expected.json",
            lambda content: content["generate"]["t2i1"]["new_tokens"].reverse(),
            ["generate.t2i1.expected.new_tokens"],
        ),
        ("vision.safetensors", lambda tensors: tensors.pop("embeds.odd"), ["vision.odd.embeddings"]),
        (
            "vision.safetensors",
            lambda tensors: tensors["embeds.joint_edit_source+odd+target0"].mul_(1.001),
            ["vision.joint.edit_source+odd+target0"],
        ),
        (
            "gen_t2i0.safetensors",
            lambda tensors: tensors.pop("teacher_image_embeds"),
            ["generate.t2i0.teacher_image_embeddings"],
        ),
        ("train_mixed.safetensors", lambda tensors: tensors["image_grid_thw"].add_(2), ["train.mixed.grids"]),
        (
            "gen_t2i2.safetensors",
            lambda tensors: tensors["step_logits"][3].fill_(float("nan")),
            ["generate.t2i2.step_logits"],
        ),
    ],
)
def test_nothing_recorded_passes_unseen(tmp_path, file, change, failing):
    folder = changed(tmp_path, file, change)
    assert [name.partition(" (")[0] for name in failed(folder)] == failing


def test_inputs_that_do_not_fit_together_fail_by_name(tmp_path):
    folder = changed(tmp_path, "train_text.safetensors", lambda t: t.update(input_ids=t["input_ids"][:, :-1].clone()))
    names = failed(folder)
    assert any(name.startswith("train.text (not compared") for name in names)
    assert all("train" in name and "text" in name for name in names)


def test_a_set_may_lack_files_and_says_which_cases_it_skips(tmp_path):
    folder = shutil.copytree(GOLDEN / "ar", tmp_path / "ar")
    for name in ("train_mixed", "gen_t2i0", "vision_targets"):
        (folder / f"{name}.safetensors").unlink()
    skipped = []
    cases = list(verify(folder, skipped.append))
    assert all(case.passed for case in cases)
    assert [text.partition(":")[0] for text in skipped] == ["train.mixed", "generate.t2i0"]
    assert {case.name.split(".")[1] for case in cases if case.name.startswith("train")} == {"understanding", "text"}


@pytest.mark.parametrize(
    ("file", "content", "kind", "said"),
    [
        ("expected.json", b"{", InputError, r"expected\.json: the file: Invalid JSON"),
        (
            "expected.json",
            b'{"train": {"text": {}}}',
            InputError,
            r"expected\.json: train\.text\.images: Field required",
        ),
        ("gen_t2i0.safetensors", None, ModelError, r"gen_t2i0\.safetensors is not a readable safetensors file"),
        ("vision.safetensors", None, ModelError, r"vision\.safetensors is not a readable safetensors file"),
    ],
)
def test_damaged_files_are_named_in_one_line(tmp_path, file, content, kind, said):
    folder = shutil.copytree(GOLDEN / "ar", tmp_path / "ar")
    (folder / file).write_bytes(content if content is not None else (folder / file).read_bytes()[:5000])
    with pytest.raises(kind, match=said):
        list(verify(folder))


@pytest.mark.parametrize(("place", "file"), [("ar", "expected.json"), ("gen_decoder", "io.safetensors")])
def test_a_set_that_cannot_be_run_fails_beside_others(tmp_path, place, file):
    folder = shutil.copytree(GOLDEN, tmp_path / "golden")
    (folder / place / file).unlink()
    assert failed(folder) == [f"{place} (not compared: the set lacks {file})"]


def test_nan_and_another_shape_fail():
    assert not compare_l2("shape", torch.ones(2, 3, 4), torch.ones(1, 3, 1), 1.0).passed
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
