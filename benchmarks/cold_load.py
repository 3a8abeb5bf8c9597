"""A model fetched from S3 before it can be loaded: one large file by many ranged reads, against one stream.

S3 is a moto server behind a proxy that limits the speed of each connection, as S3 does: on the loopback alone one
stream is as fast as many. The rival is what was done before: files side by side, each as one stream. Each way runs in
a process of its own, which copies a folder with one large file; its bytes are compared, and its growth of anonymous
memory is told. Ranges and buffers are smaller than the product's, as the file is.

    python benchmarks/cold_load.py [--quick] [--json] [--scratch DIR]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "pipelines")]
from faulty_s3 import FaultyS3, faulty_s3  # noqa: E402
from report import Report  # noqa: E402
from servers import free_port, s3_server  # noqa: E402

from pipelines import storage  # noqa: E402

MB = 1e6
NUM_RANGES = 32  # of the file: two rounds of the readers
SPEED = 2_000_000  # bytes per second of one connection
LEAST_GAIN = 4.0  # of 16 readers; the proxy and the server compute on the same cores
MOST_MEMORY_MB = 64.0
# Copies a folder and prints seconds, growth of RssAnon in bytes, and the digest of the large file.
READER = """
import hashlib, json, shutil, sys, tempfile, threading, time
from pathlib import Path
from pipelines import storage

way, uri, range_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
storage.RANGE_BYTES, storage.READ_BUFFER_BYTES = range_bytes, range_bytes // 2
storage.exists(uri)  # what the first request imports and connects

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

before = peak = anonymous()
is_over = threading.Event()

def watch():
    global peak
    while not is_over.wait(0.01):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
with tempfile.TemporaryDirectory() as scratch:
    began = time.monotonic()
    if way == "ranges":
        tempfile.tempdir = scratch
        path = storage.fetch_folder(uri) / "weights"
    else:
        path = Path(scratch) / "weights"
        with storage.open_input(f"{uri}/weights") as stream, path.open("wb") as out:
            shutil.copyfileobj(stream, out, storage.READ_BUFFER_BYTES)
    seconds = time.monotonic() - began
    is_over.set()
    thread.join()
    print(json.dumps([seconds, peak - before, hashlib.sha256(path.read_bytes()).hexdigest()]))
"""


def measure(way: str, uri: str, range_bytes: int) -> tuple[float, float, str]:
    """Seconds, growth of memory in bytes, and digest of the copy."""
    command = [sys.executable, "-c", READER, way, uri, str(range_bytes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=900)
    seconds, growth, digest = json.loads(done.stdout)
    return seconds, growth, digest


def main() -> int:
    """Print the measures; 1 if a wanted figure isn't reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a file of 32 MiB instead of 128")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.add_argument("--scratch", type=Path, help="where 0.5 GB may lie for a while (default: the system's)")
    arguments = parser.parse_args()
    size = (32 if arguments.quick else 128) << 20
    report = Report()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        tempfile.tempdir = scratch
        port = free_port()
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "TMPDIR": scratch,
        }
        source = Path(scratch) / "source"
        source.mkdir()
        (source / "weights").write_bytes(os.urandom(size))
        (source / "nexusgen.json").write_bytes(b"{}")
        wanted = hashlib.sha256((source / "weights").read_bytes()).hexdigest()
        with s3_server(Path(scratch), port, "bucket"), faulty_s3(FaultyS3(port, 0.0)) as proxy:
            storage.upload_folder(source, "s3://bucket/model")
            proxy.bytes_per_s = float(SPEED)
            os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.port}"
            speeds = {}
            for way in ("one stream", "ranges"):
                proxy.most_reads_at_once = 0
                seconds, growth, digest = measure(way, "s3://bucket/model", size // NUM_RANGES)
                if digest != wanted:
                    raise SystemExit(f"{way}: the copy differs from what was stored")
                speeds[way] = size / seconds
                report.tell(f"{way}: MB/s, at {SPEED / MB:g} MB/s a connection ({seconds:.1f} s)", speeds[way] / MB)
                report.tell(f"{way}: reads at once", proxy.most_reads_at_once)
                report.at_most(f"{way}: growth of anonymous memory, MB", growth / MB, MOST_MEMORY_MB)
            report.at_least("ranges over one stream", speeds["ranges"] / speeds["one stream"], LEAST_GAIN)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
