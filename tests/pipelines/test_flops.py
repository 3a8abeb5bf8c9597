"""The arithmetic of a step, against torch's own count of a real one, and the share of a device that it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import make_config
from torch.utils.flop_counter import FlopCounterMode

from nexusgen.geometry import Geometry
from nexusgen.losses import total_loss
from nexusgen.model.decoder import VisionDecoder, released_decoder_config
from nexusgen.model.manifest import read_manifest
from nexusgen.model.weights import hollow_autoregressive
from pipelines import tracking
from pipelines.flops import ModelWork, Utilisation, find_utilisation, peak_flops, work_of
from pipelines.follow import Follower, StepRecord
from pipelines.loop import open_training
from pipelines.lora import LoraConfig
from pipelines.stage_data import StageSource
from pipelines.stages import STAGES, StageName, StepRandom, build_stage

SIZES = Path(__file__).parents[1] / "nexusgen"


def test_flops_by_hand() -> None:
    work = ModelWork(trained=1000, frozen=100, num_layers=2, hidden=8)
    # Two samples of 5 tokens. Forward of a token: 2 x 1100, and 4 x 2 x 8 x 5 for attention.
    assert work.flops(10, 2) == 10 * (3 * (2200 + 320) - 200) == 10 * (6 * 1000 + 4 * 100 + 12 * 2 * 8 * 5)
    assert work.flops(10, 2, recomputes=True) == 10 * (8 * 1000 + 6 * 100 + 16 * 2 * 8 * 5)
    assert work.flops(20, 4) == 2 * work.flops(10, 2)
    assert work.flops(10, 1) > work.flops(10, 2)  # longer samples attend to more


@pytest.mark.parametrize(("stage", "lora"), [*((stage, None) for stage in STAGES), ("ar", LoraConfig(rank=4))])
def test_flops_are_those_that_torch_counts_in_a_step(
    stage: StageName, lora: LoraConfig | None, storage_uri: str, model: Path
) -> None:
    """But for what is told: output layers at each token; modulations once a sample; embeddings of an editing decoder
    alone go through its merger. In the tiny models these are larger shares than in the released ones."""
    config = make_config(storage_uri, model, stage=stage)
    built = build_stage(stage, model, "uniform", 0.0, lora)
    data, plan = open_training(config, read_manifest(model))
    rows = np.flatnonzero(data.train_table.lengths == np.median(data.train_table.lengths))[:4]
    batch = StageSource(data, built).batch(data.train[rows])
    built.module.train()
    counter = FlopCounterMode(display=False)
    with counter:
        total_loss(built.loss(batch, StepRandom(0, 0)), built.weights).backward()
    ours = work_of(built.module).flops(plan.num_tokens(rows), len(rows))
    print(stage, lora is not None, counter.get_total_flops() / ours)
    assert counter.get_total_flops() / ours == pytest.approx(1.0, abs=0.2)


def test_the_released_sizes() -> None:
    """What multiplies a token: of Qwen2.5-VL all but the table of token embeddings; of FLUX.1 all but modulations."""
    language_model = hollow_autoregressive(SIZES / "qwen2_5_vl_7b", Geometry())
    language_model.qwen.model.visual = torch.nn.Identity()
    all_of_it = sum(parameter.numel() for parameter in language_model.parameters())
    assert work_of(language_model) == ModelWork(all_of_it - (152_064 + 81) * 3584, 0, 28, 3584)
    config, sizes = released_decoder_config()
    with torch.device("meta"):
        decoder = VisionDecoder.from_config(config, sizes)
    work = work_of(decoder)
    double, single = 19 * 2 * (6 * 3072 * 3072 + 6 * 3072), 38 * (3 * 3072 * 3072 + 3 * 3072)
    last = 2 * 3072 * 3072 + 2 * 3072
    embedders = sum(parameter.numel() for parameter in decoder.transformer.time_text_embed.parameters())
    streams = (
        19 * 2 * (12 * 3072 * 3072 + 9 * 3072 + 4 * 3072 + 2 * 128)
    )  # attention and MLP of both, half of it counts
    all_of_it = sum(parameter.numel() for parameter in decoder.parameters())
    assert all_of_it - work.trained == pytest.approx(double + single + last + embedders + streams / 2, rel=1e-4)
    assert (work.num_layers, work.hidden) == (57, 3072)
    assert work.flops(1024 + 81, 1) == pytest.approx(45.7e12, rel=0.01)  # a picture of 512x512


def test_a_matrix_that_is_table_and_output_layer_counts_once() -> None:
    module = hollow_autoregressive(SIZES / "qwen2_5_vl_3b", Geometry())
    module.qwen.model.visual = torch.nn.Identity()
    all_of_it = sum(parameter.numel() for parameter in module.parameters())
    assert work_of(module) == ModelWork(all_of_it - 81 * 2048, 0, 36, 2048)


def test_peaks_are_known_by_the_names_that_torch_tells() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA H200": 989e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L4": 121e12,
        "NVIDIA A10": 125e12,
    }
    assert {name: peak_flops(name) for name in names} == names
    assert [peak_flops(name) for name in ("NVIDIA A10G", "NVIDIA L40", "NVIDIA GB200", "Radeon")] == [None] * 4


def test_the_share_is_logged_where_a_peak_is_known_and_nowhere_else(
    storage_uri: str, model: Path, storage: Path
) -> None:
    module = torch.nn.Identity()
    assert find_utilisation(module, torch.device("cpu"), 2, "bf16") is None
    work = ModelWork(trained=1_000_000, frozen=0, num_layers=1, hidden=1)
    utilisation = Utilisation(work, peak=2 * 1e9)  # two devices
    assert utilisation.of(100, 10, 2.0) == pytest.approx((6e6 * 100 + 12 * 10 * 100) / (2.0 * 2e9))
    config = make_config(str(storage), model, log_every=2, num_steps=2)
    for measure in (utilisation, None):
        with tracking.job_run(str(storage), "mfu", "train", "", stage="ar") as run:
            follower = Follower(config, run, str(storage), 0, utilisation=measure)
            for step, seconds in enumerate((0.5, 1.5)):
                losses = {"ce": 1.0}
                follower.follow(StepRecord(step, 1.0, losses, 1.0, 1e-3, 5, 50, seconds, 0.0), 0)
        metrics = tracking.connect(str(storage)).get_run(run.run_id).data.metrics
        assert metrics["train/tokens_per_s"] == 50.0
        assert metrics.get("train/mfu") == (pytest.approx(utilisation.of(100, 10, 2.0)) if measure else None)
