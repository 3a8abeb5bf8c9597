"""`nexusgen reproduce`, whole, at a tiny size: data from nothing, trials, reports, and what reports say of numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs import cli, reproduce
from nexusgen import shapes
from pipelines.reproduce import ARMS
from pipelines.trial_report import _prefill_verdicts, table

TINY = (
    "pack.counts={generation: 48}",
    "train_ar.num_steps=3",
    "train_ar.batch_samples=4",
    "train_ar.validation_fraction=0.3",
    "train_generation_decoder.num_steps=2",
    "train_generation_decoder.batch_samples=4",
    "num_samples=5",
    "per_category=1",
    "num_explicit=2",
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the experiments share."""
    return tmp_path_factory.mktemp("reproduce")


def run(capfd: pytest.CaptureFixture[str], out: Path, name: str, *more: str) -> dict[str, Any]:
    code = cli.main(["reproduce", name, "--out", str(out), "--seeds", "2", "--json", *TINY, *more])
    captured = capfd.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster", "no_server")
def test_prefill_ablation_makes_its_table_and_figures_and_keeps_what_is_finished(
    out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = run(capfd, out, "prefill-ablation")
    assert set(found["trials"]) == {"prefilled", "naive", "naive-longer"}
    assert found["trials"]["naive-longer"][0]["training"]["settings"]["training"]["num_steps"] == 4  # of 3, by half
    assert all(len(trials) == 2 for trials in found["trials"].values())
    trial = found["trials"]["naive"][1]
    assert trial["training"]["settings"]["training"]["seed"] == 1
    assert trial["errors"]["generation"]["n"] == 5
    assert set(trial["scores"]) == {*shapes.CATEGORIES, "explicit"}
    text = (out / "prefill-ablation" / "report.md").read_text()
    assert "nexusgen reproduce prefill-ablation --out DIR --seeds 2" in text
    assert "| naive, free-running | " in text
    assert {one["verdict"].partition(":")[0] for one in found["verdicts"]} <= {"holds", "FAILS", "can't be told"}
    for name in ("errors", "scores"):
        with Image.open(out / "prefill-ablation" / f"{name}.png") as figure:
            assert np.asarray(figure.convert("L")).std() > 10

    weights = out / "trials" / "ar" / "naive-1" / "weights.safetensors"
    written = weights.stat().st_mtime_ns
    measured = weights.with_name("measured.json")
    measured.unlink()  # as if it had been killed while it measured
    again = run(capfd, out, "prefill-ablation")
    assert weights.stat().st_mtime_ns == written
    assert again["trials"]["naive"][1]["scores"] == trial["scores"]
    assert measured.is_file()

    longer = run(capfd, out, "prefill-ablation", "train_ar.num_steps=4")
    assert weights.stat().st_mtime_ns > written
    assert longer["trials"]["naive"][1]["training"]["curve"][-1]["step"] == 4


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster", "no_server")
def test_other_experiments_share_trials(out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(capfd, out, "prefill-ablation")
    shared = out / "trials" / "ar" / "prefilled-0" / "weights.safetensors"
    written = shared.stat().st_mtime_ns
    losses = run(capfd, out, "loss-weights")
    assert set(losses["trials"]) == {"prefilled", "without-mse", "without-cosine"}
    decoders = run(capfd, out, "decoder-inputs")
    assert set(decoders["trials"]) == {"encoder", "predicted"}
    trial = decoders["trials"]["predicted"][0]
    assert set(trial["scores"]) == set(trial["scores_of_true"]) == {*shapes.CATEGORIES, "explicit"}
    assert "trained on predicted, drawn from true" in (out / "decoder-inputs" / "report.md").read_text()
    assert shared.stat().st_mtime_ns == written


def test_command_knows_every_experiment() -> None:
    assert set(reproduce.EXPERIMENTS) == set(ARMS)


def test_unknown_experiments_and_keys_are_refused(out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "everything", "--out", str(out)]) == 2
    assert "prefill-ablation" in capfd.readouterr().err
    assert cli.main(["reproduce", "loss-weights", "--out", str(out), "num_sed=2"]) == 2
    assert "did you mean 'num_seeds'?" in capfd.readouterr().err
    assert cli.main(["reproduce", "loss-weights", "--out", str(out), "train_ar.validation_fraction=0"]) == 2
    assert "held-out samples" in capfd.readouterr().err
    assert cli.main(["reproduce", "loss-weights", "--out", "s3://bucket/somewhere"]) == 2
    assert "a local folder" in capfd.readouterr().err


def trial(forced: float, free: list[float], score: float) -> dict[str, Any]:
    """A made-up trial of 40 samples and 40 prompts of each category, `score` of which are right."""
    errors = {
        "teacher_forced": {"mse": [forced] * 3, "mse_by_sample": list(np.linspace(0.9, 1.1, 40) * forced)},
        "free_running": {"mse": free, "mse_by_sample": list(np.linspace(0.9, 1.1, 40) * np.mean(free))},
    }
    right = [float(number < 40 * score) for number in range(40)]
    return {"errors": {"generation": errors}, "scores": dict.fromkeys([*shapes.CATEGORIES, "explicit"], right)}


def verdicts(prefilled: dict[str, Any], naive: dict[str, Any]) -> list[str]:
    return [one.verdict for one in _prefill_verdicts({"prefilled": [prefilled] * 3, "naive": [naive] * 3})]


def test_verdicts_follow_from_the_numbers() -> None:
    as_claimed = verdicts(trial(0.06, [0.05, 0.06, 0.07], 0.9), trial(0.05, [0.05, 0.4, 1.0], 0.2))
    assert as_claimed == ["holds"] * 6
    badly_trained = verdicts(trial(0.06, [0.05, 0.06, 0.07], 0.9), trial(0.5, [0.5, 0.5, 0.5], 0.9))
    assert [one.partition(":")[0] for one in badly_trained[:4]] == ["FAILS", "can't be told", "FAILS", "holds"]
    assert all(one.startswith("can't be told") for one in badly_trained[4:])
    reversed_ = verdicts(trial(0.06, [0.05, 0.06, 0.07], 0.2), trial(0.01, [0.01, 0.01, 0.01], 0.9))
    assert reversed_[0] == "holds"
    assert reversed_[2:] == ["FAILS", *["FAILS: the other way round"] * 3]


def test_table_is_markdown() -> None:
    assert table(["a", "b"], [["x", "1"]]).splitlines() == ["| a | b |", "| --- | ---: |", "| x | 1 |"]
