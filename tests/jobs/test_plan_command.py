"""`nexusgen plan`: the shipped roads, wrong input, and rates measured by a real small walk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from jobs import cli
from jobs.chain import load_road
from jobs.command import DEMO_CONFIGS
from jobs.planning import request_of, small_road, walk_small, write_small_tar
from nexusgen.errors import InputError
from pipelines import tracking
from pipelines.pack import PackConfig, pack
from pipelines.plan import make_plan, units_of
from pipelines.plan_rates import on_this_machine, parse_devices
from pipelines.shards import ReadOptions, ShardReader

FULL_SIZE = DEMO_CONFIGS.parent / "7b" / "road.yaml"
DEMO = DEMO_CONFIGS / "road.yaml"


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    """Exit code, the object of --json (or None), and what standard error says."""
    code = cli.main(["plan", *arguments, "--json"])
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if printed.out else None, printed.err


def test_the_full_size(capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = plan(
        capsys, str(FULL_SIZE), "--samples", "26_300_000", "--gpus", "64xH100", "--price", "2.5", "promote.to=candidate"
    )
    assert code == 0
    rows = {row["kind"]: row for row in found["storage"]}
    assert rows["vision/target"]["bytes"] == pytest.approx(rows["vision/target"]["count"] * 580_608)
    assert found["cost_usd"] == pytest.approx(2.5 * found["gpu_hours"])
    assert [job["job"] for job in found["jobs"]] == [
        "embed vision",
        "embed latents",
        "train ar",
        "train generation_decoder",
        "embed predicted",
        "train editing_decoder",
        "evaluate",
    ]
    assert found["bottleneck"].startswith("train ar")
    assert found["goodput"]["ar"]["configured_checkpoint_every"] == 3000
    assert cli.main(["plan", str(FULL_SIZE), "--samples", "1000", "--gpus", "8xA100"]) == 0
    printed = capsys.readouterr().out
    assert "/ (312 TFLOP/s x 0.40) =" in printed
    assert "Young: sqrt(2 C M) =" in printed
    assert "the released model (s3://bucket/models/nexusgen-v2 isn't read)" in printed


def test_what_a_configuration_says_counts(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = [str(FULL_SIZE), "--samples", "1000000", "--gpus", "8xH200"]
    _, plain, _ = plan(capsys, *wanted)
    _, other, _ = plan(capsys, *wanted, "embed_vision.dtype=int8", "train_ar.num_steps=1232000")
    target, smaller = (
        next(row["bytes"] for row in found["storage"] if row["kind"] == "vision/target") for found in (plain, other)
    )
    assert smaller / target == pytest.approx(0.5, rel=0.01)
    hours = [next(job["gpu_hours"] for job in found["jobs"] if job["job"] == "train ar") for found in (plain, other)]
    assert hours[1] == pytest.approx(2 * hours[0])
    _, small, _ = plan(capsys, *wanted, "train_ar.lora={rank: 16}", "train_generation_decoder.ema_decay=0.99")
    room = {row["kind"]: (row["bytes"], row["formula"]) for row in small["storage"]}
    assert room["checkpoints/ar"] == (
        3 * 53_505_536 * 3 * 4,
        "3 x 53,505,536 weights (LoRA of rank 16), with two moments each, x 4 B",
    )
    whole = {row["kind"]: row["bytes"] for row in plain["storage"]}
    name = "checkpoints/generation_decoder"
    assert room[name][0] == pytest.approx(whole[name] * 4 / 3)
    assert "with two moments and an average each" in room[name][1]
    row = next(job for job in small["jobs"] if job["job"] == "train ar")
    assert row["gpu_hours"] < 0.8 * hours[0]
    assert "53,215,232 of the parameters trained (LoRA of rank 16)" in row["formula"]
    assert small["goodput"]["ar"]["checkpoint_s"] < 0.01 * plain["goodput"]["ar"]["checkpoint_s"]
    _, mixed, _ = plan(capsys, *wanted, "train_ar.mixture={generation: 1, editing: 1}")
    assert mixed["shares"] == {"understanding": 0.0, "generation": 0.5, "editing": 0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "0", "--gpus", "8xH100"], "--samples 0: wanted a whole number > 0, like 26300000"),
        (["--samples", "1e6", "--gpus", "8xH100"], "--samples 1e6: wanted a whole number"),
        (["--samples", "10", "--gpus", "H100"], "--gpus H100: wanted NxKIND"),
        (
            ["--samples", "10", "--gpus", "8xV100"],
            "the peak of 'V100' isn't known; known are B200, H200",
        ),
        (["--samples", "10", "--gpus", "8xH100", "--price", "-1"], "--price -1: wanted US dollars of a GPU hour"),
        (["--samples", "10", "--gpus", "8xH100", "--price", "nan"], "--price nan: wanted US dollars"),
        (["--samples", "10", "--gpus", "1xCPU"], "add --calibrate to measure them"),
        (["--samples", "10", "--gpus", "8xH100", "--calibrate"], "which has no GPU; leave out --calibrate"),
        (["--samples", "10", "--gpus", "1xCPU", "--calibrate"], "--calibrate takes a tenth of them, and needs 100"),
        (["--samples", "10", "--gpus", "8xH100", "train_ar.embeddings=online"], "train_ar.embeddings=online: a road"),
        (["--samples", "10", "--gpus", "8xH100", "embed_vision.mode=images"], "embed_vision.mode=images: a road's dec"),
        (["--samples", "10", "--gpus", "8xH100", "train_ar.nmu_steps=3"], "did you mean 'num_steps'"),
    ],
)
def test_wrong_input_is_named(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, said = plan(capsys, str(DEMO), *_joined(options))
    assert (code, found) == (2, None)
    assert message in said


def _joined(options: list[str]) -> list[str]:
    """--price=-1, as argparse takes -1 for an option."""
    joined: list[str] = []
    for option in options:
        if joined and joined[-1] == "--price":
            joined[-1] = f"--price={option}"
        else:
            joined.append(option)
    return joined


def test_the_small_road_has_a_tenth_at_most(tmp_path: Path) -> None:
    road = load_road(DEMO, [f"storage={tmp_path}/big"])
    small = small_road(road, 34_000, str(tmp_path))
    assert sum(small.pack.counts.values()) <= 3_400
    for stage in ("ar", "generation_decoder", "editing_decoder"):
        config, full = getattr(small, f"train_{stage}"), getattr(road, f"train_{stage}")
        assert config.num_steps * config.batch_samples <= 0.1 * full.num_steps * full.batch_samples
        assert config.storage == small.storage != road.storage
    for kind in ("per_category", "num_explicit", "num_questions", "num_edits"):
        assert getattr(small.evaluate, kind) <= 0.1 * getattr(road.evaluate, kind)


def test_the_small_road_reads_the_data_that_it_makes(tmp_path: Path) -> None:
    named = ["train_ar.data=[one, two]", "evaluate.data=held-out", "evaluate.suites=[held_out]"]
    road = load_road(DEMO, [f"storage={tmp_path}/big", *named])
    small = small_road(road, 34_000, str(tmp_path))
    assert small.train_ar.data_names == [road.name] == [small.embed_vision.name]
    assert small.evaluate.data == road.name
    assert small_road(load_road(DEMO), 34_000, str(tmp_path)).evaluate.data is None
    items = request_of(road, 34_000, parse_devices("1xCPU"), None).items
    assert items == {"drawn": road.evaluate.max_samples, "answered": road.evaluate.max_samples}
    both = load_road(DEMO, ["evaluate.suites=[demo_world, reconstruction]", "evaluate.max_samples=50"])
    items = dict(request_of(both, 34_000, parse_devices("1xCPU"), None).items)
    assert items == {"generation": 194, "explicit": 96, "understanding": 192, "editing": 190} | dict.fromkeys(
        ("autoencoder", "another"), 50
    )


def test_a_small_tar_of_own_tars(tmp_path: Path) -> None:
    pack(PackConfig(storage=str(tmp_path), name="n", counts={"generation": 30, "editing": 30}, samples_per_shard=10))
    tars = str(tmp_path / "tars" / "n")
    assert write_small_tar(tars, 12, tmp_path / "small.tar") == 12
    samples = list(ShardReader(str(tmp_path / "small.tar"), ReadOptions()))
    assert [sample.task for sample in samples] == ["editing"] * 6 + ["generation"] * 6  # type: ignore[union-attr]
    (tmp_path / "bad.tar").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"bad.tar' holds no usable sample to measure rates on"):
        write_small_tar(str(tmp_path / "bad.tar"), 3, tmp_path / "none.tar")


@pytest.mark.timeout(900)
def test_rates_are_measured_by_a_real_walk(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/elsewhere.db", "RAY_ADDRESS": "127.0.0.1:1"}
    for name, value in elsewhere.items():
        monkeypatch.setenv(name, value)
    registry_elsewhere = tracking.connect(str(tmp_path))
    settings = [
        f"storage={tmp_path}/big",
        "pack.counts={generation: 60, editing: 30, understanding: 30}",
        "embed_vision.num_encoders=1",
        "embed_latents.num_encoders=1",
        "embed_predicted.num_encoders=1",
        *(f"train_{stage}.num_steps=40" for stage in ("ar", "generation_decoder", "editing_decoder")),
        *(f"train_{stage}.batch_samples=4" for stage in ("ar", "generation_decoder", "editing_decoder")),
        "train_ar.mixture=null",
        "train_ar.data=[one, two]",  # neither is there, nor anywhere
        "evaluate.suites=[demo_world, held_out]",
        "evaluate.data=held-out",
        "evaluate.max_samples=40",
        "train_editing_decoder.num_workers=1",
        "evaluate.per_category=10",
        "evaluate.num_explicit=10",
        "evaluate.num_questions=20",
        "evaluate.num_edits=10",
        "evaluate.num_actors=1",
        "evaluate.steps=2",
    ]
    road = load_road(DEMO, settings)
    found = walk_small(road, 800, lambda text: None)
    assert registry_elsewhere.search_registered_models() == []
    assert registry_elsewhere.search_runs(["0"]) == []
    assert len(registry_elsewhere.search_experiments()) == 1  # MLflow's own
    assert {name: os.environ[name] for name in elsewhere} == elsewhere
    assert found["embed vision"].rates["samples"].units == 80
    assert found["train ar"].rates["steps"].units == 4
    assert found["train editing_decoder"].rates["checkpoints"].units == 1
    assert found["evaluate"].rates["understanding"].units == 2
    assert found["evaluate"].rates["drawn"].units == 4
    request = request_of(road, 800, parse_devices("1xCPU"), None)
    for job, rates in found.items():
        small = {kind: rate.units for kind, rate in rates.rates.items()}
        seconds, cpu_seconds = rates.predict(small)
        # What it was measured on; more, if its units had taken longer than all of it.
        assert seconds == pytest.approx(rates.seconds)
        assert cpu_seconds == pytest.approx(rates.cpu_seconds)
        assert all(rates.rates[kind].seconds > 0 for kind in units_of(request, job) if kind in rates.rates)
    plan = make_plan(type(request)(**{**vars(request), "calibrations": found}))
    assert {row.job for row in plan.jobs} == set(found)
    rows = {row.job: row for row in plan.jobs}
    assert "800 samples x" in rows["embed vision"].formula
    assert "40 drawn x" in rows["evaluate"].formula
    for job in ("pack", "embed vision", "train ar", "evaluate"):
        planned = sum(number * found[job].rates[kind].seconds for kind, number in units_of(request, job).items())
        assert rows[job].seconds == pytest.approx(found[job].fixed_seconds + planned)
        assert found[job].seconds < (rows[job].seconds or 0.0)  # as there is more to do
    assert not (tmp_path / "big").exists()


def test_what_is_measured_here_knows_no_cluster_and_no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def job() -> None:
        with on_this_machine():
            assert "RAY_ADDRESS" not in os.environ
            raise InputError("a job failed")

    with pytest.raises(InputError, match="a job failed"):
        job()
    assert os.environ["RAY_ADDRESS"] == "head:6379"
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_a_roads_prices_are_those_of_its_jobs() -> None:
    road = load_road(DEMO, ["prices={gpu_hour: 2.5}"])
    jobs = (road.pack, road.embed_vision, road.train_ar, road.evaluate)
    assert {job.prices for job in jobs} == {road.prices}
    assert road.prices is not None
    assert road.prices.gpu_hour == 2.5
    assert load_road(DEMO).train_ar.prices is None
