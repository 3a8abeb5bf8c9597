"""The embed job against its limit and its rivals, on the same tower, threads and images.

    (a) our job: two encoder actors on two cores
    (b) the limit: a bare loop in one process that does nothing but encode batches that lie ready; beside it, what such
        a loop does while another one keeps the other core busy, which costs it caches and memory bandwidth
    (c) the reference's way: one image at a time, one file per image
    (d) stock Ray Data: read_webdataset, map_batches with the same tower and batch, write_parquet

Each side runs in a process of its own and computes on one thread per process. Its speed is that of its steady state: of
(a) and (d) between the files that the actors write, without the first and the last of each, so that neither start nor
end counts. Sides take turns; figures are medians of rounds, ratios the medians of each round's ratio. Peak memory,
taken in a run of its own, is the sum of proportional set sizes of the process and all that it started: driver, workers,
Ray's daemons, object store. At the end the rows are read back into training batches.

    python benchmarks/embed.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from embed_data import make_model, write_shard
from pss import PeakMemory
from report import Report

from nexusgen.images import decode_image, image_for_role, to_patches
from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.model.manifest import read_manifest
from nexusgen.model.weights import load_model
from nexusgen.schema import Sample
from pipelines.encoders import VisionEncoder
from pipelines.shards import ShardReader

WIDTH, DEPTH = 128, 12  # of the vision tower: some tens of milliseconds an image on one thread
BATCH_IMAGES = 6
BATCH_PATCHES = 2048  # embed's default, which hold as many
NUM_ACTORS = 2
SAMPLES_PER_SHARD = 21 * BATCH_IMAGES


def load_encoder(model: Path) -> VisionEncoder:
    """The tower on one thread."""
    torch.set_num_threads(1)
    loaded = load_model(model, ["autoregressive"]).autoregressive
    assert loaded is not None
    return VisionEncoder(loaded, BATCH_PATCHES)


def our_job(model: Path, shards: list[Path], folder: Path) -> float:
    """(a) Images per second."""
    from pipelines.embed import EmbedConfig, embed

    settings = {"storage": str(folder), "name": "n", "mode": "vision", "model": str(model)}
    config = EmbedConfig.model_validate({**settings, "input": [str(p) for p in shards], "num_encoders": NUM_ACTORS})
    report = embed(config)
    assert report.samples == len(shards) * SAMPLES_PER_SHARD, report
    return steady_rate(folder / "embedded" / "n" / "vision")


def bare_loop(model: Path, shards: list[Path], folder: Path) -> float:
    """(b) Images per second; pictures of one shard lie ready and come round again."""
    encoder = load_encoder(model)
    ready = [encoder.picture(decode_image(sample.images[0]), "input") for sample in samples_of(shards[0])]
    assert BATCH_PATCHES // ready[0].cost == BATCH_IMAGES
    batches = [ready[first : first + BATCH_IMAGES] for first in range(0, len(ready), BATCH_IMAGES)] * len(shards)
    encoder.encode(ready[:BATCH_IMAGES])  # warm
    started = time.perf_counter()
    for batch in batches:
        encoder.encode(batch)
    return len(batches) * BATCH_IMAGES / (time.perf_counter() - started)


def one_by_one(model: Path, shards: list[Path], folder: Path) -> float:
    """(c) Images per second of reading, decoding, encoding and saving each image on its own."""
    encoder = load_encoder(model)
    folder.mkdir(parents=True)
    autoregressive: AutoregressiveModel = encoder.model
    started = time.perf_counter()
    for shard in shards:
        for sample in samples_of(shard):
            image = image_for_role(decode_image(sample.images[0]), "input", encoder.geometry)
            with torch.no_grad():
                embeddings = autoregressive.encode_images(*to_patches([image], encoder.geometry))
            torch.save(embeddings.bfloat16(), folder / f"{sample.key}.pt")
    return len(shards) * SAMPLES_PER_SHARD / (time.perf_counter() - started)


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


def stock_ray(model: Path, shards: list[Path], folder: Path) -> float:
    """(d) Images per second."""
    import ray.data

    from pipelines.runtime import ray_cluster

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    with ray_cluster(NUM_ACTORS + 1, "stock Ray Data"):
        dataset = ray.data.read_webdataset([str(p) for p in shards], decoder=None).map_batches(
            StockEncoder,
            fn_constructor_args=(str(model),),
            batch_size=BATCH_IMAGES,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=NUM_ACTORS),
        )
        dataset.write_parquet(str(folder))
    return steady_rate(folder)


def steady_rate(folder: Path) -> float:
    """Images per second by the Parquet files of a folder, the first and the last of each actor left out.

    It is the slope of a line through the number of rows over time: whether actors write at the same moment or in turn
    makes no difference to it.
    """
    files = sorted((path.stat().st_mtime_ns, path) for path in folder.glob("*.parquet"))
    rows = np.cumsum([pq.read_metadata(path).num_rows for _, path in files])
    seconds = np.array([time_ns - files[0][0] for time_ns, _ in files]) / 1e9
    kept = slice(NUM_ACTORS - 1, len(files) - NUM_ACTORS)
    return float(np.polyfit(seconds[kept], rows[kept], 1)[0])


def samples_of(shard: Path) -> list[Sample]:
    """All samples of a shard, which must be good."""
    samples = [item for item in ShardReader(str(shard)) if isinstance(item, Sample)]
    assert len(samples) == SAMPLES_PER_SHARD
    return samples


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


SIDES: Mapping[str, tuple[str, Callable[[Path, list[Path], Path], float]]] = {
    "a": ("our job", our_job),
    "b": ("bare loop, one process", bare_loop),
    "c": ("one image, one file", one_by_one),
    "d": ("stock Ray Data", stock_ray),
}


def run_side(side: str, model: Path, tars: Path, num_shards: int, out: Path) -> float:
    """Images per second of a side in a process of its own."""
    with start_side(side, model, tars, num_shards, out) as process:
        printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"side ({side}) ended with exit code {process.returncode}")
    return float(printed.splitlines()[-1])


def peak_of(side: str, model: Path, tars: Path, num_shards: int, out: Path) -> int:
    """Peak bytes of a side, in a run of its own: reading the pages of fifteen processes would slow it down."""
    with start_side(side, model, tars, num_shards, out) as process, PeakMemory(process.pid) as memory:
        process.communicate()
    return memory.peak_bytes


def start_side(side: str, model: Path, tars: Path, num_shards: int, out: Path) -> subprocess.Popen[str]:
    """A process that runs one side."""
    command = [sys.executable, __file__, "--side", side, str(model), str(tars), str(num_shards), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def run_loops_at_once(model: Path, tars: Path, num_shards: int, out: Path) -> float:
    """Images per second of each of NUM_ACTORS bare loops that run at the same time."""
    with ThreadPoolExecutor(NUM_ACTORS) as pool:
        results = list(pool.map(lambda _: run_side("b", model, tars, num_shards, out), range(NUM_ACTORS)))
    return statistics.mean(results)


def measure(report: Report, rounds: int, num_shards: int) -> None:
    """Run every side in turn: (a) and (d) on all shards, (b) and (c), which need no start, on a quarter of them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model", WIDTH, DEPTH)
        (folder / "tars").mkdir()
        for number in range(num_shards):
            write_shard(folder / "tars" / f"{number:03d}.tar", SAMPLES_PER_SHARD, number)
        rates: dict[str, list[float]] = {side: [] for side in SIDES}
        at_once: list[float] = []
        for turn in range(rounds):
            for side in SIDES:
                shards = num_shards if side in "ad" else max(1, num_shards // 4)
                rates[side].append(run_side(side, model, folder / "tars", shards, folder / f"{side}-{turn}"))
                print(f"round {turn + 1}, ({side}): {rates[side][-1]:.1f} images/s", file=sys.stderr)
            at_once.append(run_loops_at_once(model, folder / "tars", max(1, num_shards // 4), folder))
            print(f"round {turn + 1}, two loops at once: {at_once[-1]:.1f} images/s each", file=sys.stderr)
        for side, (label, _) in SIDES.items():
            report.tell(f"({side}) {label}, images/s", statistics.median(rates[side]))
            peak = peak_of(side, model, folder / "tars", num_shards if side in "ad" else 1, folder / f"{side}-memory")
            report.tell(f"({side}) {label}, peak memory in GB", peak / 1e9)
        busy = min(NUM_ACTORS, os.cpu_count() or 1)

        def ratio(others: list[float]) -> float:
            return statistics.median(a / other for a, other in zip(rates["a"], others, strict=True))

        encoding = statistics.median(rates["b"])
        report.at_least("(b) encoding, ms per image on one thread", 1000 / encoding, 20)
        report.tell("(b) beside another one, images/s each", statistics.median(at_once))
        report.at_least("(a) over (b), per busy core", ratio(rates["b"]) / busy, 0.85)
        report.tell("(a) over (b) beside another one, per busy core", ratio(at_once) / busy)
        report.at_least("(a) over (c)", ratio(rates["c"]), 2)
        report.at_least("(a) over (d)", ratio(rates["d"]), 0.95)
        reading = num_shards * SAMPLES_PER_SHARD / read_back(model, folder / "a-0")
        report.tell("reading back into batches, images/s in one process", reading)
        report.at_least("reading back over encoding on one thread", reading / encoding, 10)


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer images, one round")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--side", nargs=5, help=argparse.SUPPRESS)  # run one side: its letter, MODEL TARS SHARDS OUT
    arguments = parser.parse_args()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if arguments.side:
        side, model, tars, num_shards, out = arguments.side
        shards = sorted(Path(tars).glob("*.tar"))[: int(num_shards)]
        print(SIDES[side][1](Path(model), shards, Path(out)))
        return 0
    report = Report()
    measure(report, rounds=1 if arguments.quick else 3, num_shards=10 if arguments.quick else 20)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
