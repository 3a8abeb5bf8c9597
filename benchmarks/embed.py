"""The embed job against its limit and its rivals, on the same tower, threads and images.

    (a) our job: two encoder actors on two cores
    (b) the limit: a bare loop in one process that does nothing but encode batches that lie ready
    (c) the reference's way: one image at a time, one file per image
    (d) stock Ray Data: read_webdataset, map_batches with the same tower and batch, write_parquet

Each computes on one thread per process. A side's time is that of many images less that of few, so that its start
doesn't count; sides take turns, and the median of the rounds counts. Peak memory is the sum of proportional set sizes
of driver, workers, Ray's daemons and object store. At the end the rows are read back into training batches.

    python benchmarks/embed.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embed_data import make_model, write_shard
from pss import PeakMemory
from report import Report

from nexusgen.images import decode_image, image_for_role, to_patches
from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.model.manifest import read_manifest
from nexusgen.model.weights import load_model
from nexusgen.schema import Sample
from pipelines.embed import EmbedConfig, embed
from pipelines.encoders import VisionEncoder
from pipelines.shards import ShardReader

WIDTH, DEPTH = 192, 4  # of the vision tower: some tens of milliseconds an image on one thread
BATCH_PATCHES = 8192  # 25 images
NUM_ACTORS = 2
SAMPLES_PER_SHARD = 64


def load_encoder(model: Path) -> VisionEncoder:
    """The tower on one thread."""
    torch.set_num_threads(1)
    loaded = load_model(model, ["autoregressive"]).autoregressive
    assert loaded is not None
    return VisionEncoder(loaded, BATCH_PATCHES)


def our_job(model: Path, shards: list[Path], folder: Path) -> None:
    """(a)"""
    settings = {"storage": str(folder), "name": "n", "mode": "vision", "model": str(model), "slice_samples": 32}
    config = EmbedConfig.model_validate({**settings, "input": [str(p) for p in shards], "num_encoders": NUM_ACTORS})
    report = embed(config)
    assert report.samples == len(shards) * SAMPLES_PER_SHARD, report


def bare_loop(encoder: VisionEncoder, shards: list[Path]) -> float:
    """(b) Seconds of encoding alone; pictures of a few images lie ready and come round again."""
    samples = samples_of(shards[0])
    ready = [encoder.picture(decode_image(sample.images[0]), "input") for sample in samples]
    size = BATCH_PATCHES // ready[0].cost
    total = len(shards) * SAMPLES_PER_SHARD
    started = time.perf_counter()
    for first in range(0, total, size):
        encoder.encode([ready[i % len(ready)] for i in range(first, min(first + size, total))])
    return time.perf_counter() - started


def one_by_one(encoder: VisionEncoder, shards: list[Path], folder: Path) -> float:
    """(c) Seconds of reading, decoding, encoding and saving each image on its own."""
    folder.mkdir(parents=True)
    model: AutoregressiveModel = encoder.model
    started = time.perf_counter()
    for shard in shards:
        for sample in samples_of(shard):
            image = image_for_role(decode_image(sample.images[0]), "input", encoder.geometry)
            with torch.no_grad():
                embeddings = model.encode_images(*to_patches([image], encoder.geometry))
            torch.save(embeddings.bfloat16(), folder / f"{sample.key}.pt")
    return time.perf_counter() - started


class StockEncoder:
    """(d)'s actor: what a user of Ray Data writes."""

    def __init__(self, model: str) -> None:
        self.encoder = load_encoder(Path(model))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        geometry = self.encoder.geometry
        images = [image_for_role(decode_image(data), "input", geometry) for data in batch["0.jpg"]]
        with torch.no_grad():
            embeddings = self.encoder.model.encode_images(*to_patches(images, geometry))
        parts = embeddings.bfloat16().view(torch.uint8).chunk(len(images))
        return {"key": batch["__key__"], "json": batch["json"], "data": [part.numpy().tobytes() for part in parts]}


def stock_ray(model: Path, shards: list[Path], folder: Path) -> None:
    """(d)"""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.read_webdataset([str(p) for p in shards], decoder=None).map_batches(
        StockEncoder,
        fn_constructor_args=(str(model),),
        batch_size=25,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=NUM_ACTORS),
    )
    dataset.write_parquet(str(folder))


def samples_of(shard: Path) -> list[Sample]:
    """All samples of a shard, which must be good."""
    samples = [item for item in ShardReader(str(shard)) if isinstance(item, Sample)]
    assert len(samples) == SAMPLES_PER_SHARD
    return samples


def timed(function: Callable[..., Any], *arguments: Any) -> float:
    """Wall seconds of a call."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def read_back(model: Path, storage: Path) -> float:
    """Seconds in which every row is read into training batches of 16."""
    from pipelines.stage_data import StageSource, open_data
    from pipelines.stages import build_stage

    stage: Any = build_stage("ar", model, "uniform")
    started = time.perf_counter()
    data = open_data(str(storage), ["n"], type(stage), read_manifest(model), 0.0)
    source: StageSource[Any, Any] = StageSource(data, stage)
    for rows in np.array_split(np.arange(len(data.train)), -(-len(data.train) // 16)):
        source.batch(rows)
    return time.perf_counter() - started


def measure(report: Report, rounds: int, few: int, many: int) -> None:
    """Run every side on `few` and on `many` shards."""
    from pipelines.runtime import ray_cluster

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model", WIDTH, DEPTH)
        shards = [folder / f"{number:03d}.tar" for number in range(many)]
        for number, shard in enumerate(shards):
            write_shard(shard, SAMPLES_PER_SHARD, number)
        num_images = (many - few) * SAMPLES_PER_SHARD
        seconds: dict[str, list[float]] = {side: [] for side in "abcd"}
        peaks: dict[str, int] = {}
        encoder = load_encoder(model)
        bare_loop(encoder, shards[:1])  # warm
        with ray_cluster(NUM_ACTORS + 1, "the benchmark"):
            # Ray's CPUs are logical: the two encoders are what is busy on two cores.
            sides: dict[str, Callable[[list[Path], Path], float]] = {
                "a": lambda chosen, out: timed(our_job, model, chosen, out),
                "b": lambda chosen, out: bare_loop(encoder, chosen),
                "c": lambda chosen, out: one_by_one(encoder, chosen, out),
                "d": lambda chosen, out: timed(stock_ray, model, chosen, out),
            }
            for turn in range(rounds):
                for side, run in sides.items():
                    times = []
                    for size in (few, many):
                        with PeakMemory() as memory:
                            times.append(run(shards[:size], folder / f"{side}-{turn}-{size}"))
                        peaks[side] = max(peaks.get(side, 0), memory.peak_bytes)
                    seconds[side].append(times[1] - times[0])
                    print(f"round {turn + 1}, ({side}): {num_images / seconds[side][-1]:.1f} images/s", file=sys.stderr)
        rate = {side: num_images / statistics.median(times) for side, times in seconds.items()}
        names = {"a": "our job", "b": "bare loop, one process", "c": "one image, one file", "d": "stock Ray Data"}
        report.at_least("(b) encoding, ms per image on one thread", 1000 / rate["b"], 20)
        for side, label in names.items():
            report.tell(f"({side}) {label}, images/s", rate[side])
            report.tell(f"({side}) {label}, peak memory in GB, Ray's daemons included", peaks[side] / 1e9)
        busy = min(NUM_ACTORS, os.cpu_count() or 1)
        report.at_least("(a) over (b), per busy core", rate["a"] / busy / rate["b"], 0.85)
        report.at_least("(a) over (c)", rate["a"] / rate["c"], 2)
        report.at_least("(a) over (d)", rate["a"] / rate["d"], 0.95)
        storage = folder / f"a-0-{many}"
        reading = many * SAMPLES_PER_SHARD / read_back(model, storage)
        report.tell("reading back into batches, images/s in one process", reading)
        report.at_least("reading back over encoding on one thread", reading / rate["b"], 10)
        shutil.rmtree(storage)


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer images, one round")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    report = Report()
    if arguments.quick:
        measure(report, rounds=1, few=2, many=6)
    else:
        measure(report, rounds=3, few=2, many=14)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
