"""Plans: every formula by hand, the checkpoint interval against a simulation, rates from accounts."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nexusgen.errors import UsageError
from nexusgen.geometry import Geometry
from nexusgen.model.decoder import VisionDecoder, released_decoder_config
from nexusgen.model.manifest import demo_base
from nexusgen.model.weights import hollow_autoregressive
from pipelines.flops import work_of
from pipelines.lora import LoraConfig, add_adapters
from pipelines.plan import (
    Request,
    Training,
    make_plan,
    plan_storage,
    step_flops,
    training_workers,
    units_of,
)
from pipelines.plan_goodput import Failures
from pipelines.plan_rates import Calibration, Rate, calibrate, parse_devices, read_assumptions
from pipelines.plan_sizes import RELEASED, Shares, adapted_of, sizes_of
from pipelines.stages import hollow_stage

SIZES = Path(__file__).parents[1] / "nexusgen"
SAMPLES = 26_300_000


def a_training(**values: Any) -> Training:
    return replace(
        Training(
            num_steps=616_000,
            batch_samples=128,
            batch_tokens=None,
            recomputes=True,
            checkpoint_every=3000,
            keep_checkpoints=2,
            virtual_streams=64,
            sharded=True,
            num_workers=8,
        ),
        **values,
    )


def a_request(**values: Any) -> Request:
    assumptions = read_assumptions()
    given: dict[str, Any] = {
        "samples": SAMPLES,
        "shares": Shares.of(assumptions.shares),
        "shares_from": "a test",
        "sizes": RELEASED,
        "sizes_from": "a test",
        "devices": parse_devices("64xH100"),
        "price": 2.0,
        "is_packed": False,
        "dtypes": {"vision": "bfloat16", "latents": "bfloat16", "predicted": "int8"},
        "encoders": {"vision": 8, "latents": 8, "predicted": 8},
        "trainings": {
            "ar": a_training(),
            "generation_decoder": a_training(num_steps=50_000, recomputes=False, virtual_streams=128),
            "editing_decoder": a_training(num_steps=50_000, recomputes=False, virtual_streams=128),
        },
        "items": {"generation": 144, "understanding": 192},
        "assumptions": assumptions,
    }
    return Request(**(given | values))


# --- sizes and storage ---


def test_the_released_sizes_are_those_of_its_modules() -> None:
    model = hollow_autoregressive(SIZES / "qwen2_5_vl_7b", Geometry())
    tower = sum(parameter.numel() for parameter in model.qwen.model.visual.parameters())
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert RELEASED.tower_parameters == tower
    assert RELEASED.parameters["ar"] == everything - tower
    import torch

    model.qwen.model.visual = torch.nn.Identity()
    assert RELEASED.autoregressive == work_of(model)
    assert RELEASED.adapted == adapted_of(model)
    lora = LoraConfig(rank=8, targets=("q_proj", "down_proj"))
    add_adapters(model, lora, torch.bfloat16)
    assert RELEASED.work("ar", lora) == work_of(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert RELEASED.trained_parameters("ar", lora) == trained
    for kind in ("generation", "editing"):
        config, sizes = released_decoder_config(kind)  # type: ignore[arg-type]
        with torch.device("meta"):
            decoder = VisionDecoder.from_config(config, sizes)
        found = RELEASED.decoder if kind == "generation" else RELEASED.editing_decoder
        assert found == work_of(decoder)
        assert RELEASED.parameters[f"{kind}_decoder"] == sum(p.numel() for p in decoder.parameters())


def test_storage_is_count_times_bytes() -> None:
    request = a_request()
    rows = {row.kind: row for row in plan_storage(request)}
    drawn = SAMPLES * (13.3 + 6.3) / 25.4
    assert rows["vision/target"].bytes == pytest.approx(drawn * 81 * 3584 * 2)
    assert rows["vision/target"].bytes_each == 580_608
    assert rows["vision/input"].bytes == pytest.approx(SAMPLES * (5.8 + 6.3) / 25.4 * 335 * 3584 * 2)
    assert rows["latents"].bytes == pytest.approx(drawn * 16 * 64 * 64 * 2)
    edits = SAMPLES * 6.3 / 25.4
    assert rows["predicted/reference"].bytes == pytest.approx(edits * 324 * (3584 + 4))  # int8 with a scale
    exact = a_request(dtypes={"vision": "bfloat16", "latents": "bfloat16", "predicted": "bfloat16"})
    assert {row.kind: row for row in plan_storage(exact)}["predicted/reference"].bytes_each == 324 * 3584 * 2
    assert rows["checkpoints/ar"].bytes_each == pytest.approx(91.5e9, rel=0.01)
    assert rows["checkpoints/generation_decoder"].bytes_each == pytest.approx(143.2e9, rel=0.01)
    total = make_plan(request).to_json()["storage_bytes"]
    assert total == pytest.approx(sum(row.bytes for row in rows.values()))


def test_all_of_one_task() -> None:
    pictures = a_request(shares=Shares.of({"generation": 1.0}))
    rows = {row.kind: row.bytes for row in plan_storage(pictures)}
    assert rows["vision/target"] == rows["vision/crop"] == SAMPLES * 580_608
    assert rows["vision/input"] == rows["predicted/reference"] == 0
    assert make_plan(pictures).jobs


def test_sizes_of_a_folder() -> None:
    sizes = sizes_of(demo_base())
    lora = LoraConfig(rank=4)
    with_adapters = hollow_stage("ar", demo_base(), "logit_normal", lora=lora).module
    trained = sum(parameter.numel() for parameter in with_adapters.parameters() if parameter.requires_grad)
    assert sizes.trained_parameters("ar", lora) == trained
    assert sizes.work("ar", lora) == work_of(with_adapters)
    assert (sizes.target_tokens, sizes.reference_tokens, sizes.image_pixels) == (9, 36, 96 * 96)
    assert sizes.steps == 8
    assert sizes.passes == 1
    assert sizes.latent_tokens == 36
    assert sizes.autoregressive.trained < sizes.parameters["ar"]


# --- hours and cost ---


def test_hours_are_operations_over_peak_and_utilisation() -> None:
    request = a_request()
    jobs = {row.job: row for row in make_plan(request).jobs}
    flops = 616_000 * step_flops(request, "ar")
    hours = flops / (989e12 * 0.4) / 3600
    assert jobs["train ar"].gpu_hours == pytest.approx(hours)
    assert jobs["train ar"].cost_usd == pytest.approx(2.0 * hours)
    assert jobs["train ar"].seconds == pytest.approx(hours * 3600 / 64)
    assert f"{hours:,.1f} GPU hours" in jobs["train ar"].formula
    pictures = SAMPLES * (13.3 + 6.3) / 25.4
    assert jobs["embed latents"].gpu_hours == pytest.approx(pictures * 1.118e12 / (989e12 * 0.4) / 3600)
    assert "pack" not in jobs
    assert make_plan(request).bottleneck.startswith("train ar")
    slower = {row.job: row for row in make_plan(a_request(devices=parse_devices("64xA100"))).jobs}
    assert (slower["train ar"].gpu_hours or 0) / hours == pytest.approx(989 / 312)
    free = make_plan(a_request(price=None)).to_json()
    assert free["cost_usd"] is None
    assert free["gpu_hours"] == pytest.approx(sum(row.gpu_hours or 0 for row in jobs.values()))


def test_steps_under_a_token_budget() -> None:
    trainings = dict(a_request().trainings)
    trainings["ar"] = a_training(batch_samples=1, batch_tokens=128_000)
    request = a_request(trainings=trainings, shares=Shares.of({"generation": 1.0}))
    assert step_flops(request, "ar") == pytest.approx(
        RELEASED.autoregressive.flops(128_000, 128_000 / 181, recomputes=True)
    )


def test_workers_divide_the_streams() -> None:
    assert training_workers(a_training(virtual_streams=64), 64) == 64
    assert training_workers(a_training(virtual_streams=64), 60) == 32
    assert training_workers(a_training(virtual_streams=6), 4) == 3
    told = make_plan(a_request(devices=parse_devices("60xH100"))).workers["train ar"]
    assert told == "num_workers=32 (divides virtual_streams=64; 28 GPUs idle)"


def test_stored_against_online() -> None:
    trainings = dict(a_request().trainings)
    once = a_request(trainings=trainings | {"ar": a_training(num_steps=SAMPLES // 128)})
    assert make_plan(once).online["cheaper"] == "online"  # in a single epoch nothing is used twice
    often = make_plan(a_request(trainings=trainings | {"ar": a_training(num_steps=100 * SAMPLES // 128)})).online
    assert often["online_gpu_hours"] == pytest.approx(100 * often["stored_gpu_hours"], rel=1e-4)
    for found in (make_plan(once).online, often):
        at_break_even = found["break_even_epochs"] * found["stored_gpu_hours"] * 2.0
        assert at_break_even == pytest.approx(found["stored_usd"])


@pytest.mark.parametrize("text", ["8", "xH100", "0xH100", "8xT800", "8x", "2xCPU", "-1xA100", "8.5xH100"])
def test_wrong_devices_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--gpus .*(wanted NxKIND|known are .*H100|give 1xCPU)"):
        parse_devices(text)


# --- checkpoints ---


def simulate(failures: Failures, interval_s: float, seed: int) -> float:
    """The share of time that trains, over many random failures."""
    rng = random.Random(seed)
    clock = useful = 0.0
    next_failure = rng.expovariate(1 / failures.mean_s)
    for _ in range(3000):
        while True:  # one interval, until it gets through
            end = clock + interval_s + failures.checkpoint_s
            if end <= next_failure:
                clock = end
                break
            clock = next_failure
            next_failure = clock + rng.expovariate(1 / failures.mean_s)
            while clock + failures.restart_s > next_failure:  # a restart may fail, too
                clock = next_failure
                next_failure = clock + rng.expovariate(1 / failures.mean_s)
            clock += failures.restart_s
        useful += interval_s
    return useful / clock


@pytest.mark.parametrize("mean_s", [3_600.0, 36_000.0])
def test_goodput_is_that_of_a_simulation(mean_s: float) -> None:
    failures = Failures(mean_s=mean_s, checkpoint_s=60.0, restart_s=300.0)
    best = failures.best_interval_s
    for interval in (best / 4, best, 4 * best):
        assert simulate(failures, interval, seed=1) == pytest.approx(failures.goodput(interval), abs=0.02)
    for other in (best / 3, 3 * best):
        assert simulate(failures, best, seed=2) > simulate(failures, other, seed=2)


def test_the_best_interval_is_best_by_the_formula() -> None:
    failures = Failures(mean_s=10_000.0, checkpoint_s=100.0, restart_s=200.0)
    best = failures.best_interval_s
    assert best == pytest.approx(failures.young_interval_s, rel=0.1)
    tried = max(range(100, 10_000, 10), key=failures.goodput)
    assert best == pytest.approx(tried, rel=0.02)
    assert Failures(mean_s=10.0, checkpoint_s=100.0, restart_s=0.0).best_interval_s == 10.0
    assert failures.goodput(1e9) == 0.0


def test_more_machines_fail_more_often() -> None:
    few, many = (make_plan(a_request(devices=parse_devices(f"{n}xH100"))).goodput["ar"] for n in (8, 64))
    assert few["mean_s_between_failures"] == 8 * many["mean_s_between_failures"]
    assert few["goodput"] > many["goodput"] >= many["configured_goodput"]
    assert many["best_checkpoint_every"] >= 1


# --- measured rates ---


def test_rates_are_what_workers_did_and_the_rest_is_fixed() -> None:
    attempts = [{"workers": 2, "work": {"samples": [100.0, 20.0, 16.0]}}]
    found = calibrate(attempts, seconds=17.0, cpu_seconds=30.0)
    assert found.fixed_seconds == pytest.approx(7.0)  # 20 s of two workers side by side are 10 by the wall
    assert found.fixed_cpu_seconds == pytest.approx(14.0)
    assert found.predict({"samples": 1000.0}) == (pytest.approx(107.0), pytest.approx(174.0))


def test_a_calibrated_plan_scales_each_kind_of_work() -> None:
    training = Calibration(30.0, 30.0, 10.0, 5.0, {"steps": Rate(10, 1.0, 0.9), "checkpoints": Rate(1, 4.0, 3.0)})
    request = a_request(
        devices=parse_devices("1xCPU"),
        trainings=dict(a_request().trainings) | {"ar": a_training(num_steps=100, checkpoint_every=40)},
        calibrations={"train ar": training, "promote": Calibration(1.0, 0.5, 1.0, 0.5, {})},
    )
    assert units_of(request, "train ar") == {"steps": 100.0, "checkpoints": 3.0}
    plan = make_plan(request)
    row, promote = plan.jobs
    assert row.seconds == 10 + 100 + 3 * 4
    assert row.cpu_seconds == 5 + 90 + 9
    assert row.gpu_hours is None
    assert "100 steps x 1,000.000 ms" in row.formula
    assert promote.seconds == 1.0
    assert plan.goodput == {}
