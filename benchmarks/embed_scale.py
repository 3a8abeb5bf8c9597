"""The embed job at scale: memory that doesn't grow with the data, and a quick start whatever the number of shards.

Memory: tars of noise, which nothing compresses, of 10 and of 100 times a size, both more than twice Ray's object store;
peak memory is the sum of proportional set sizes of driver, workers, Ray's daemons and object store.
Start: 100,000 names of one small tar; seconds from the start of the command to the first slice in the storage.

    python benchmarks/embed_scale.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from embed_data import write_shard
from pss import PeakMemory
from report import Report

STORE_BYTES = 100_000_000  # Ray's least is 75 MB
UNIT_BYTES = 25_000_000  # 10 of them are more than twice the store
NOISE_SIDE = 900  # pixels: 2.4 MB an image
CONFIG = Path(__file__).parent.parent / "jobs" / "configs" / "demo" / "embed_vision.yaml"

EMBED = """
import sys, ray
from pipelines.embed import EmbedConfig, embed
from nexusgen.config import load_config
from pathlib import Path
ray.init(num_cpus=8, object_store_memory=int(sys.argv[1]), include_dashboard=False, log_to_driver=False)
embed(load_config(EmbedConfig, Path(sys.argv[2]), sys.argv[3:]))
"""


def peak_memory(folder: Path, num_shards: int) -> float:
    """Peak bytes of embedding `num_shards` names of one tar of UNIT_BYTES; the job runs in a process of its own."""
    tar = folder / "noise.tar"
    if not tar.exists():
        write_shard(tar, round(UNIT_BYTES / (3 * NOISE_SIDE**2)), 0, side=NOISE_SIDE, noise=True)
    names = folder / f"shards-{num_shards}"
    make_names(names, tar, num_shards)
    overrides = [f"storage={folder}/out-{num_shards}", "name=n", f"input={names}", "slice_bytes=8000000"]
    job = subprocess.Popen([sys.executable, "-c", EMBED, str(STORE_BYTES), str(CONFIG), *overrides])
    with PeakMemory(job.pid) as memory:
        code = job.wait()
    if code:
        raise SystemExit(f"the embed job failed with exit code {code}")
    return memory.peak_bytes


def first_slice_s(folder: Path, num_names: int) -> float:
    """Seconds from the start of `nexusgen embed` to its first slice."""
    tar = folder / "small.tar"
    write_shard(tar, 4, 1)
    names = folder / "names"
    make_names(names, tar, num_names)
    storage = folder / "out"
    command = [str(Path(sys.executable).parent / "nexusgen"), "embed", str(CONFIG)]
    started = time.monotonic()
    job = subprocess.Popen([*command, f"storage={storage}", "name=n", f"input={names}"], start_new_session=True)
    try:
        while not any((storage / "embedded" / "n" / "vision").glob("*.parquet")):
            if job.poll() is not None:
                raise SystemExit(f"the embed job ended with exit code {job.returncode} before its first slice")
            time.sleep(0.1)
        return time.monotonic() - started
    finally:
        job.send_signal(signal.SIGINT)
        try:
            job.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)


def make_names(folder: Path, tar: Path, count: int) -> None:
    """So many names of one tar."""
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:06d}.tar").symlink_to(tar)


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="10 times against 20 times the size")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    report = Report()
    much = 20 if arguments.quick else 100
    with tempfile.TemporaryDirectory() as name:
        report.at_most("100,000 names of one tar: seconds to the first slice", first_slice_s(Path(name), 100_000), 30)
    with tempfile.TemporaryDirectory() as name:
        little_peak, much_peak = (peak_memory(Path(name), size) for size in (10, much))
    report.tell("data over the object store's size at 10 times", 10 * UNIT_BYTES / STORE_BYTES)
    report.tell("peak memory in GB at 10 times", little_peak / 1e9)
    report.tell(f"peak memory in GB at {much} times", much_peak / 1e9)
    report.at_most(f"peak memory at {much} times over that at 10 times", much_peak / little_peak, 1.1)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
