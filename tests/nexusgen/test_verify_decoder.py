"""Every recorded number of the reference's two decoders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexusgen import flow_matching, verify_decoder
from nexusgen.comparison import FP32_TOLERANCE, Case
from nexusgen.errors import InputError, ModelError
from nexusgen.model import decoder as decoder_module
from nexusgen.model import decoder_keys

GOLDEN = Path(__file__).parent.parent / "golden"
SETS = {"generation": GOLDEN / "gen_decoder", "editing": GOLDEN / "edit_decoder"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=sorted(SETS))
def cases(request: pytest.FixtureRequest) -> dict[str, Case]:
    return {c.name.partition("_decoder.")[2]: c for c in verify_decoder.verify_decoder(SETS[request.param])}


def failures(folder: Path) -> set[str]:
    return {case.name.partition("_decoder.")[2] for case in verify_decoder.verify_decoder(folder) if not case.passed}


def test_every_case_agrees(cases: dict[str, Case]) -> None:
    assert [case for case in cases.values() if not case.passed] == []


def test_every_kind_of_number_is_compared(cases: dict[str, Case]) -> None:
    wanted = {"context", "pred.out", "pred.out_bf16", "sched1000.weights", "euler.cfg3.trajectory", "train1.loss"}
    if "odd.context" in cases:
        wanted |= {"context_without_ref", "merger_position_ids", "odd.position_ids", "text_ids", "euler.noref2.final"}
    assert wanted <= set(cases)
    assert len([name for name in cases if ".grad." in name]) == 8
    assert all(case.tolerance <= FP32_TOLERANCE for name, case in cases.items() if name.startswith("euler"))


def test_every_recorded_tensor_is_compared_or_an_input(cases: dict[str, Case]) -> None:
    kind = "editing" if "odd.context" in cases else "generation"
    inputs = {"embeds", "ref_embeds", "pooled_clip", "neg_prompt_emb", "pred.latents", "pred.timestep"}
    inputs |= {"train.latents", "train.noise", "euler.start_noise_seed42", "odd.embeds", "odd.ref_embeds"}
    renamed = {"train.text_ids": "text_ids", "train.image_ids": "image_ids"}
    recorded = {renamed.get(name, name) for name in load_file(SETS[kind] / "io.safetensors")}
    assert recorded - inputs <= set(cases)


@pytest.mark.parametrize(
    ("kind", "weight", "wrong", "untouched"),
    [
        ("generation", "pipe.dit.blocks.1.attn.norm_q_b.weight", "pred.out", "context"),
        ("editing", "embedding_merger.layers.0.self_attn.v_proj.bias", "context_without_ref", "pred.out"),
    ],
)
def test_one_wrong_weight_fails(tmp_path: Path, kind: str, weight: str, wrong: str, untouched: str) -> None:
    folder = shutil.copytree(SETS[kind], tmp_path / "golden")
    (path,) = folder.glob("*.bin")
    state = torch.load(path, weights_only=True)
    state[weight][3] += 0.01
    torch.save(state, path)
    failed = failures(folder)
    assert {"weights.tensors", wrong} <= failed
    assert untouched not in failed


def test_a_recorded_nan_fails(tmp_path: Path) -> None:
    folder = shutil.copytree(SETS["generation"], tmp_path / "golden")
    recorded = load_file(folder / "io.safetensors")
    recorded["pred.out"][0, 0, 0, 0] = float("nan")
    save_file(recorded, folder / "io.safetensors")
    assert failures(folder) == {"pred.out"}


def test_a_subset_of_the_cases_is_enough(tmp_path: Path) -> None:
    folder = shutil.copytree(SETS["editing"], tmp_path / "golden")
    recorded = load_file(folder / "io.safetensors")
    kept = {name: recorded[name] for name in ("embeds", "context_without_ref", "sched50.sigmas")}
    save_file(kept, folder / "io.safetensors")
    (folder / "weights.safetensors").unlink()
    skipped: list[str] = []
    cases = list(verify_decoder.verify_decoder(folder, skipped.append))
    absent = ["train0", "train1", "euler.nocfg", "euler.cfg3"]
    assert [text.partition(":")[0] for text in skipped] == [f"editing_decoder.{name}" for name in absent]
    assert all(case.passed for case in cases)
    assert [case.name for case in cases] == ["editing_decoder.context_without_ref", "editing_decoder.sched50.sigmas"]


def test_what_cannot_be_compared_fails_by_name(tmp_path: Path) -> None:
    folder = shutil.copytree(SETS["generation"], tmp_path / "golden")
    recorded = load_file(folder / "io.safetensors")
    del recorded["euler.start_noise_seed42"], recorded["euler.nocfg.final"]
    save_file({**recorded, "unknown": torch.zeros(1)}, folder / "io.safetensors")
    names = {name.partition(" ")[0] for name in failures(folder)}
    assert names == {"euler.nocfg.trajectory", "euler.cfg3.trajectory", "euler.cfg3.final", "unknown"}


@pytest.mark.parametrize("key", ["timestep", "sigma", "weight", "loss", "mse", "grad_norm_dit", "grad_norm_adapter"])
def test_every_number_of_a_training_step_is_compared(tmp_path: Path, key: str) -> None:
    folder = shutil.copytree(SETS["generation"], tmp_path / "golden")
    expected = json.loads((folder / "expected.json").read_text())
    expected["train"][1][key] *= 1.0001
    expected["train"][0][f"{key}z"] = 1.0
    (folder / "expected.json").write_text(json.dumps(expected))
    names = {name.partition(" (")[0] for name in failures(folder)}
    assert names == {f"train1.expected.{key}", f"train0.expected.{key}z"}


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("generation", {"dit": {}}, r"dit\.axes: Field required"),
        ("generation", {"train": [{"timestep_id": 1000}]}, r"train\.0\.timestep_id"),
        ("generation", {"euler.nocfg": {"cfg_scale": 1.0}}, r"euler\.nocfg: Field required"),
        ("editing", {"merger_config": None}, "merger_config is missing"),
    ],
)
def test_what_is_wrong_in_expected_json_is_named(tmp_path: Path, kind: str, change: dict, said: str) -> None:
    folder = shutil.copytree(SETS[kind], tmp_path / "golden")
    expected = json.loads((folder / "expected.json").read_text())
    (folder / "expected.json").write_text(json.dumps(expected | change))
    with pytest.raises(InputError, match=rf"expected\.json: {said}"):
        failures(folder)


def test_a_cut_file_of_tensors_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(SETS["generation"], tmp_path / "golden")
    (folder / "io.safetensors").write_bytes((folder / "io.safetensors").read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"io\.safetensors is not a readable safetensors file"):
        failures(folder)


def _shifted_position(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = decoder_module.flux_token_ids

    def shifted(*arguments: object, **options: object) -> torch.Tensor:
        ids = plain(*arguments, **options)  # type: ignore[arg-type]
        ids[7, 2] += 1e-3
        return ids

    monkeypatch.setattr(decoder_module, "flux_token_ids", shifted)


def _swapped_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    table = decoder_keys._SAME_TENSOR
    q, k = "blocks.{n}.attn.norm_q_a", "blocks.{n}.attn.norm_k_a"
    for released, ours in ((q, table[k]), (k, table[q])):
        monkeypatch.setitem(table, released, ours)
        monkeypatch.setitem(decoder_keys._SAME_TENSOR_BACK, ours, released)


def _wrong_table(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = flow_matching.training_table
    monkeypatch.setattr(flow_matching, "training_table", lambda _: plain(flow_matching.make_scheduler(3.001)))


@pytest.mark.parametrize("kind", sorted(SETS))
@pytest.mark.parametrize(
    ("sabotage", "seen_in"),
    [(_shifted_position, "text_ids"), (_swapped_keys, "pred.out"), (_wrong_table, "sched1000.timesteps")],
)
def test_sabotage_is_noticed(
    monkeypatch: pytest.MonkeyPatch, kind: str, sabotage: Callable[[pytest.MonkeyPatch], None], seen_in: str
) -> None:
    sabotage(monkeypatch)
    assert seen_in in failures(SETS[kind])
