"""What jobs say that they used: summed over attempts, with the workers' part, and told by MLflow and the model card."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from test_train import make_config, recorded

from nexusgen import shapes
from nexusgen.errors import QuarantineError
from pipelines import embedded, process_use
from pipelines.accounting import (
    Account,
    Prices,
    Usage,
    account_uri,
    cost_of,
    finish_account,
    read_attempts,
    usage_of,
)
from pipelines.embed import EmbedConfig, embed
from pipelines.loop import Ranks, run_training
from pipelines.pack import PackConfig, pack
from pipelines.runtime import CpuMeter, RayCluster
from pipelines.tracking import connect
from pipelines.train import train

pytestmark = pytest.mark.usefixtures("no_server")
REPORT = {"host": "elsewhere", "pid": 1, "cpu_seconds": 7.0, "bytes_read": 30, "bytes_written": 40, "work": {}}


def test_usage_adds_up_and_has_the_names_of_the_metrics() -> None:
    first = Usage(3600, 7200, 5, 10, 20, None)
    both = first + Usage(1800, 0, 1, 1, 1, 2.0)
    assert both == Usage(5400, 7200, 6, 11, 21, 2.0)
    assert both.metrics() == {
        "job/cpu_hours": 1.5,
        "job/gpu_hours": 2.0,
        "job/samples": 6.0,
        "job/bytes_read": 11.0,
        "job/bytes_written": 21.0,
        "job/cost_usd": 2.0,
    }
    assert "job/cost_usd" not in first.metrics()
    assert cost_of(3600, 7200, Prices(gpu_hour=2.5, cpu_hour=0.1)) == pytest.approx(5.1)
    assert cost_of(3600, 7200, None) is None


def test_attempts_add_up_until_the_thing_is_made(tmp_path: Path) -> None:
    uri = account_uri(str(tmp_path), "embed", "n", "vision")
    killed = Account(uri, "r1", "same")
    killed.add(4, [REPORT])  # enters itself; then its process dies
    other = Account(uri, "r2", "other")
    other.add(100, [REPORT])
    second = Account(uri, "r3", "same", Prices(cpu_hour=3600))
    second.add(6, [REPORT])
    total = second.finish()
    assert (total.samples, total.cpu_seconds, total.bytes_read, total.bytes_written) == (10, 14.0, 60, 80)
    assert total.cost_usd == pytest.approx(7.0)  # of the attempt that had prices
    third = Account(uri, "r4", "same")
    third.add(1)
    assert third.finish().samples == 1  # what was told before isn't told again
    assert usage_of(read_attempts(uri)).samples == 111
    assert [one["finished"] for one in read_attempts(uri)] == [True, False, True, True]


def test_gpus_count_while_they_are_allocated(tmp_path: Path) -> None:
    account = Account(str(tmp_path / "a.json"), "r", "x")
    account.hold_gpus(8, for_s=100.0)
    with account.gpus(2):
        pass
    assert 800 <= account.so_far().gpu_seconds < 900


def test_a_workers_report_counts_unless_the_meter_sees_it(tmp_path: Path) -> None:
    with CpuMeter() as meter:
        account = Account(str(tmp_path / "a.json"), "r", "x", meter=meter)
        own = process_use.report()  # of this very process
        account.add(1, [own | {"cpu_seconds": 1000.0, "bytes_read": 10**9}, REPORT])
        used = account.so_far()
    assert 7.0 <= used.cpu_seconds < 1000
    assert 30 <= used.bytes_read < 10**9


def test_embed_and_pack_tell_what_all_processes_used_over_restarts(
    tmp_path: Path, base: Path, ray_cluster: RayCluster
) -> None:
    storage = str(tmp_path / "storage")
    prices = Prices(cpu_hour=1.0)
    packed = pack(PackConfig(storage=storage, name="n", counts={"generation": 6}, samples_per_shard=3, prices=prices))
    (tmp_path / "storage" / "tars" / "n" / "broken.tar").write_bytes(b"no tar" * 100)
    config = EmbedConfig(
        storage=storage, name="n", input=f"{storage}/tars/n", mode="vision", model=str(base), prices=prices
    )
    with pytest.raises(QuarantineError):
        embed(config)
    report = embed(config.model_copy(update={"max_quarantine_fraction": 1.0}))
    client = connect(storage)

    of_pack = client.get_run(read_attempts(account_uri(storage, "pack", "n"))[0]["run_id"]).data.metrics
    assert of_pack["job/samples"] == 6
    assert of_pack["job/bytes_written"] >= packed.outputs["bytes"]
    assert of_pack["job/cost_usd"] == pytest.approx(of_pack["job/cpu_hours"])

    attempts = read_attempts(account_uri(storage, "embed", "n", "vision"))
    assert [one["samples"] for one in attempts] == [7, 0]  # the second only tried the broken shard again
    metrics = client.get_run(report.outputs["run_id"]).data.metrics
    assert metrics["job/samples"] == 7
    assert metrics["job/cpu_hours"] == pytest.approx(sum(one["cpu_seconds"] for one in attempts) / 3600)
    assert attempts[0]["cpu_seconds"] > 0.5  # an encoder of another process has imported torch
    assert metrics["job/bytes_read"] >= packed.outputs["bytes"]
    assert metrics["job/bytes_written"] >= sum(info.num_bytes for info in embedded.list_slices(storage, "n", "vision"))
    samples, seconds, cpu_seconds = attempts[0]["work"]["samples"]  # of the encoders alone, models loaded
    assert samples == 7
    assert 0 < seconds < attempts[0]["seconds"]
    assert 0 < cpu_seconds < attempts[0]["cpu_seconds"]


def test_what_pack_does_once_is_no_samples_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes.short_prompts.cache_clear()
    clock, listed = process_use.clock, list[int]()

    def observed() -> tuple[float, float]:
        listed.append(shapes.short_prompts.cache_info().currsize)
        return clock()

    monkeypatch.setattr(process_use, "clock", observed)
    pack(PackConfig(storage=str(tmp_path), name="n", counts={"generation": 2}))
    assert listed[0] == 2  # both languages' prompts, which take a second
    shapes.short_prompts.cache_clear()
    pack(PackConfig(storage=str(tmp_path), name="other", counts={"understanding": 1}))
    assert shapes.short_prompts.cache_info().currsize == 0  # which needs none


def test_a_training_counts_all_ranks_and_restarts(
    storage_uri: str, model: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: Any
) -> None:
    config = make_config(storage_uri, model, name="counted", num_steps=6, checkpoint_every=3, num_workers=2)
    uri = account_uri(storage_uri, "train", "counted", "ar")
    report = train(config)
    metrics = connect(storage_uri).get_run(report.outputs["run_id"]).data.metrics
    assert metrics["job/samples"] == 36
    assert metrics["job/cpu_hours"] * 3600 == pytest.approx(report.cpu_seconds, rel=0.05)  # of both ranks
    assert metrics["job/bytes_read"] > 0
    written = sum(
        path.stat().st_size
        for path in Path(storage_uri, "checkpoints/counted/ar/step-000006").iterdir()
        if path.suffix == ".distcp"
    )
    assert metrics["job/bytes_written"] >= 2 * written  # two checkpoints

    broken = make_config(storage_uri, model, name="broken", num_steps=6, checkpoint_every=3)
    uri = account_uri(storage_uri, "train", "broken", "ar")
    with recorded(monkeypatch, stop_after=5), pytest.raises(KeyboardInterrupt):
        run_training(broken, "r", Ranks(), None)
    run_training(broken, "r", Ranks(), None)
    first, second = read_attempts(uri)
    assert second["samples"] == 18  # from the checkpoint of step 3 on
    assert second["work"]["steps"][0] == 3
    assert second["work"]["checkpoints"][0] == 1
    total = finish_account(uri, "r")
    assert total.samples == first["samples"] + 18
    assert total.cpu_seconds == pytest.approx(first["cpu_seconds"] + second["cpu_seconds"])


def test_a_trainings_gpus_count_since_its_work_began(storage_uri: str, model: Path) -> None:
    config = make_config(storage_uri, model, name="gpus", num_steps=1, gpus_per_worker=1, precision="fp32")
    started = time.monotonic()
    run_training(config, "r", Ranks(), None)  # in this process, which is older
    (attempt,) = read_attempts(account_uri(storage_uri, "train", "gpus", "ar"))
    assert 0 < attempt["gpu_seconds"] <= time.monotonic() - started


def test_the_card_sums_over_the_lineage(tmp_path: Path, base: Path) -> None:
    from test_registry import NAME, train_by_hand

    from pipelines import checkpoint
    from pipelines.register import RegisterConfig, register

    storage = str(tmp_path)
    pack(PackConfig(storage=storage, name=NAME, counts={"generation": 4}))
    embed(EmbedConfig(storage=storage, name=NAME, input=f"{storage}/tars/{NAME}", mode="vision", model=str(base)))
    found = embedded.read_manifest(storage, NAME, "vision")
    data = checkpoint.DataInput(name=f"{NAME}/vision", uri="/e", digest=found.digest, run_id=found.run_id)
    for stage in ("ar", "generation_decoder"):
        run_id = train_by_hand(storage, base, stage, [data], 0.0)
        for one in (run_id, "of another training"):
            account = Account(account_uri(storage, "train", NAME, stage), one, one, Prices(gpu_hour=3.6))
            account.hold_gpus(1, for_s=1000.0)
            account.add(10)
            account.finish()
    made = register(RegisterConfig(storage=storage, name=NAME, model=str(base))).outputs
    text = Path(made["model"], "README.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines() if line.startswith("| ")}
    assert rows["train ar"][2].strip() == "10"
    assert rows["train ar"][5].strip() == "1.00"
    assert {f"embed {NAME}/vision", f"pack {NAME}", "register", "train generation_decoder", "all"} <= rows.keys()
    assert rows["all"][5].strip() == "2.00"
    jobs = [job for job in rows if job.startswith(("embed", "pack", "train")) or job == "register"]
    total = sum(int(rows[job][2]) for job in jobs)
    assert int(rows["all"][2]) == total == 4 + 4 + 10 + 10
