"""Embedding under fire: drivers, encoders and nodes are killed, a tenth of S3 requests fail; nothing may be lost.

A Ray of three nodes on this machine (the head runs no workers), input and storage on an S3 behind `faulty_s3.py`. Kills
are SIGKILL, drawn from a seed; two of three come while a write is under way: the proxy holds it, finds the process that
sent it, kills, and then carries the write out or drops it. A killed node is replaced; a killed driver's command is run
again. What came out is compared with an undisturbed run over the same input, and with a plain `tarfile` count.

    python benchmarks/chaos_data.py [--quick] [--json] [--seed N]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "pipelines")]

import psutil  # noqa: E402 (the project's own folders come first)
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from servers import free_port, s3_server  # noqa: E402

from benchmarks.faulty_s3 import FaultyS3, faulty_s3  # noqa: E402
from benchmarks.report import Report  # noqa: E402
from pipelines import storage  # noqa: E402

BUCKET = "bucket"
SLICE_SAMPLES = 8
SAMPLES_PER_SHARD = 40
BROKEN_EVERY = 40  # one sample in so many can't be used
FAULT_SHARE = 0.1
NUM_WORKER_NODES = 2
NODE_CPUS = 3  # logical; one node is enough for all encoders and the reader
NUM_ENCODERS = 2
WRITE_DELAY_S = 2.0  # of each write while there are kills to come: the job mustn't end before them
PATIENCE_S = 90.0
KINDS = ("driver", "encoder", "node")
_SLICE = re.compile(r"-[0-9a-f]{8}-\d{5}\.(parquet|json)$")  # written by encoders


def s3_environment(port: int) -> dict[str, str]:
    """What a client of the S3 at this port needs."""
    return {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }


# ---- input ----------------------------------------------------------------------------------------------------------


def make_tars(folder: Path, num_samples: int) -> list[Path]:
    """Tars of the demo world, made by `nexusgen pack`, with one sample in BROKEN_EVERY broken."""
    counts = {"generation": num_samples // 2, "editing": num_samples // 4, "understanding": num_samples // 4}
    settings = [f"storage={folder}/packed", "name=chaos", f"counts={json.dumps(counts)}"]
    settings += [f"samples_per_shard={SAMPLES_PER_SHARD}"]
    command = [sys.executable, "-m", "jobs.pack", str(ROOT / "jobs/configs/demo/pack.yaml"), *settings]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (folder / "tars").mkdir()
    number = 0
    made = []
    for source in sorted((folder / "packed" / "tars" / "chaos").glob("*.tar")):
        target = folder / "tars" / source.name
        with tarfile.open(source) as packed, tarfile.open(target, "w") as out:
            for member in packed:
                content = packed.extractfile(member)
                assert content is not None
                data = content.read()
                if member.name.endswith(".json"):
                    number += 1
                    if number % BROKEN_EVERY == 0:
                        data = b"{broken"
                member.size = len(data)
                out.addfile(member, io.BytesIO(data))
        made.append(target)
    return made


def count_samples(tars: Sequence[Path], folder_uri: str) -> Counter[tuple[str, str]]:
    """Every (shard, key) of the input, by `tarfile` alone."""
    found: set[tuple[str, str]] = set()
    for path in tars:
        with tarfile.open(path) as tar:
            found |= {(f"{folder_uri}/{path.name}", name.split(".")[0]) for name in tar.getnames()}
    return Counter(found)


# ---- the cluster ----------------------------------------------------------------------------------------------------


class LocalCluster:
    """Three Ray nodes on this machine with a token of their own; no AWS_* reaches them but through a job."""

    def __init__(self, folder: Path) -> None:
        token = folder / "ray_token"
        token.write_text(secrets.token_hex(32), encoding="utf-8")
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
        from ray.cluster_utils import Cluster

        sizes = {"object_store_memory": 200_000_000, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **sizes})
        self.nodes: list[Any] = []
        for _ in range(NUM_WORKER_NODES):
            self.add_node()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add_node(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=200_000_000))

    def raylets(self) -> dict[int, Any]:
        """Worker nodes by the pid of their raylet."""
        return {node.all_processes["raylet"][0].process.pid: node for node in self.nodes}

    def encoders(self) -> list[int]:
        """Pids of the encoder actors."""
        found = []
        for raylet in self.raylets():
            with contextlib.suppress(psutil.Error):
                for process in psutil.Process(raylet).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        title = " ".join(process.cmdline())
                        if "ray::" in title and "SliceEncoder" in title:
                            found.append(process.pid)
        return found

    def kill_node(self, raylet: int) -> None:
        """As if its machine lost power: the raylet and all its workers at once; then a new node takes its place."""
        node = self.raylets()[raylet]
        processes = [psutil.Process(raylet), *psutil.Process(raylet).children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)
        self.add_node()

    def close(self) -> None:
        self.cluster.shutdown()


# ---- the job --------------------------------------------------------------------------------------------------------


@dataclass
class Driver:
    """`nexusgen embed`, run again until it has ended by itself; its output is kept in `log`."""

    command: list[str]
    environment: Mapping[str, str]
    log: Path
    starts: int = 0
    failures: int = 0  # ends that nobody caused
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        with self.log.open("ab") as log, self.log.with_suffix(".json").open("wb") as out:
            self.process = subprocess.Popen(self.command, cwd=ROOT, env=dict(self.environment), stdout=out, stderr=log)
        self.starts += 1

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def is_done(self) -> bool:
        """Whether it has ended well; after an end of another kind it is started again, a few times."""
        assert self.process is not None
        code = self.process.poll()
        if code is None or code == 0:
            return code == 0
        self.failures += 1
        if self.failures > 3:
            raise RuntimeError(f"embed fails again and again:\n{self.log.read_text(encoding='utf-8')[-3000:]}")
        self.start()
        return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.start()

    def finish(self) -> dict[str, Any]:
        """Wait for its end; gives its report."""
        while not self.is_done():
            time.sleep(0.05)
        return dict(json.loads(self.log.with_suffix(".json").read_bytes()))

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def embed_command(storage_uri: str, name: str, input_uri: str, num_encoders: int) -> list[str]:
    config = str(ROOT / "jobs/configs/demo/embed_vision.yaml")
    settings = [f"storage={storage_uri}", f"name={name}", f"input={input_uri}", f"slice_samples={SLICE_SAMPLES}"]
    return [sys.executable, "-m", "jobs.embed", config, *settings, f"num_encoders={num_encoders}", "--json"]


# ---- kills ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    kind: str
    in_write: str  # the path of the write that was under way; empty where none was held
    seconds: float  # since the beginning


class Killer:
    """Kills what the seed says, when a write of it is under way or at any time."""

    def __init__(self, proxy: FaultyS3, cluster: LocalCluster | None, driver: Driver, seed: int) -> None:
        self.proxy, self.cluster, self.driver = proxy, cluster, driver
        self.random = random.Random(seed)
        self.kills: list[Kill] = []
        self._started = time.monotonic()

    def run(self, num_kills: int) -> None:
        """All kills, or as many as the job lives to see."""
        kinds = [KINDS[number % len(KINDS)] for number in range(num_kills)]
        self.random.shuffle(kinds)
        for number, kind in enumerate(kinds):
            killed = (
                self.kill_in_write(kind, skip=self.random.randrange(6), drop=self.random.random() < 0.5)
                if number % 3 != 2
                else self.kill_any_time(kind, num_writes=self.random.randrange(1, 6))
            )
            if killed is None:
                return
            self.kills.append(killed)
            print(f"kill {number + 1}: {killed}", file=sys.stderr, flush=True)

    def kill_in_write(self, kind: str, *, skip: int, drop: bool) -> Kill | None:
        """Let `skip` writes pass and kill while the next is held, which then is dropped or carried out.

        Gives None if the job ends before.
        """
        passed = 0

        def is_wanted(path: str, client_port: int) -> bool:
            nonlocal passed
            is_fit = bool(_SLICE.search(path)) or (kind == "driver" and _is_record(path))
            passed += is_fit
            return is_fit and passed > skip

        hold = self.proxy.hold(is_wanted)
        try:
            pid = None
            while pid is None:
                if not self._wait(hold.caught.is_set):
                    return None
                pid = self.driver.pid if kind == "driver" else self._sender(hold.client_port)
                if pid is None:  # it has given up meanwhile
                    hold.release(drop=True)
                    hold = self.proxy.hold(hold.wanted)
            self._kill(kind, pid)
            return Kill(kind, hold.path, time.monotonic() - self._started)
        finally:
            hold.release(drop=drop)
            self.proxy.unhold()

    def kill_any_time(self, kind: str, *, num_writes: int) -> Kill | None:
        """Kill soon after `num_writes` more writes. Gives None if the job ends before."""
        assert self.cluster is not None
        cluster = self.cluster
        num_writes += len(self.proxy.writes)
        while self._wait(lambda: len(self.proxy.writes) >= num_writes and bool(cluster.encoders())):
            time.sleep(self.random.random())
            encoders = cluster.encoders()
            if self.driver.is_done():
                break
            if not encoders:
                continue  # they have just gone: others come
            self._kill(kind, self.driver.pid if kind == "driver" else self.random.choice(encoders))
            return Kill(kind, "", time.monotonic() - self._started)
        return None

    def _kill(self, kind: str, pid: int) -> None:
        if kind == "driver":
            self.driver.kill()
        elif kind == "encoder":
            os.kill(pid, signal.SIGKILL)
        else:
            assert self.cluster is not None  # only a cluster's nodes are killed
            parents = [process.pid for process in psutil.Process(pid).parents()]
            (raylet,) = set(parents) & set(self.cluster.raylets())
            self.cluster.kill_node(raylet)

    def _wait(self, is_true: Any) -> bool:
        """Wait until something is so; False if the job ends before."""
        deadline = time.monotonic() + PATIENCE_S
        while not is_true():
            if self.driver.is_done():
                return False
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"no write in {PATIENCE_S:g} s:\n{self.driver.log.read_text(encoding='utf-8')[-3000:]}"
                )
            time.sleep(0.02)
        return True

    def _sender(self, client_port: int) -> int | None:
        """The process at the other end of a connection to the proxy."""
        for found in psutil.net_connections("tcp"):
            is_ours = (
                found.laddr and found.raddr and (found.laddr.port, found.raddr.port) == (client_port, self.proxy.port)
            )
            if is_ours and found.pid is not None:
                return found.pid
        return None


def _is_record(path: str) -> bool:
    """Whether the driver writes this: a shard's end or the manifest. Its probe of the storage isn't one."""
    return bool(re.search(r"/embedded/.*\.(json|yaml)$", path))


# ---- the account ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What an embed job left: sha256 of each slice, every (shard, key) in data or quarantine, and the manifest."""

    slices: dict[str, str]
    samples: Counter[tuple[str, str]]
    manifest: dict[str, Any]

    @classmethod
    def read(cls, folder: str) -> Result:
        """Read by plain pyarrow, from the files that are there."""
        slices, samples = {}, Counter[tuple[str, str]]()
        for place in (folder, f"{folder}/quarantine"):
            for uri in storage.list_files(place):
                if uri.endswith(".parquet"):
                    data = storage.read_bytes(uri)
                    slices[uri.removeprefix(folder)] = hashlib.sha256(data).hexdigest()
                    rows = pq.read_table(pa.BufferReader(data), columns=["shard", "key"]).to_pylist()
                    samples.update((row["shard"], row["key"]) for row in rows)
        return cls(slices, samples, json.loads(storage.read_bytes(f"{folder}/manifest.json")))


def num_redone(proxy: FaultyS3, kill_times: Sequence[float]) -> int:
    """Slices whose rows were sent before a kill and again after it."""
    periods: dict[str, set[int]] = {}
    for path, when in proxy.writes:
        if _SLICE.search(path) and path.endswith(".parquet") and "/quarantine/" not in path:
            periods.setdefault(path, set()).add(sum(when > time for time in kill_times))
    return sum(len(found) > 1 for found in periods.values())


def account(report: Report, expected: Counter[tuple[str, str]], calm: Result, chaos: Result) -> None:
    """Compare what is there with what was read, and with the undisturbed run."""
    report.tell("samples in the input, by tarfile", len(expected))
    report.tell("of them in quarantine", sum(calm.manifest["quarantined"].values()))
    for name, result in (("undisturbed", calm), ("with kills", chaos)):
        report.at_most(f"{name}: samples lost", (expected - result.samples).total(), 0)
        report.at_most(f"{name}: samples doubled or unknown", (result.samples - expected).total(), 0)
    differing = {
        file for file in calm.slices.keys() | chaos.slices.keys() if calm.slices.get(file) != chaos.slices.get(file)
    }
    report.tell("files of slices", len(calm.slices))
    report.at_most("files of slices that differ in a bit", len(differing), 0)
    entered = {f"/{entry['uri']}": entry["sha256"] for entry in chaos.manifest["slices"] if entry["num_rows"]}
    stored = {file: digest for file, digest in chaos.slices.items() if not file.startswith("/quarantine")}
    report.at_most("slices that the manifest tells otherwise", len(entered.items() ^ stored.items()), 0)
    report.at_least("digest equal to the undisturbed run's", calm.manifest["digest"] == chaos.manifest["digest"], 1)


@contextlib.contextmanager
def environment_of(values: Mapping[str, str]) -> Iterator[None]:
    """These variables for this process, too, while it looks at the result."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run_chaos(report: Report, folder: Path, num_samples: int, num_kills: int, seed: int) -> None:
    """The whole experiment; what it finds goes into the report."""
    tars = make_tars(folder, num_samples)
    input_uri, storage_uri = f"s3://{BUCKET}/tars", f"s3://{BUCKET}/{folder.name}"
    port = free_port()
    with contextlib.ExitStack() as stack:
        stack.enter_context(s3_server(folder, port, BUCKET))
        proxy = stack.enter_context(faulty_s3(FaultyS3(port, FAULT_SHARE, seed, silence_s=15.0)))
        cluster = LocalCluster(folder)
        stack.callback(cluster.close)
        direct = s3_environment(port)
        with environment_of(direct):
            for tar in tars:
                storage.write_bytes_atomic(f"{input_uri}/{tar.name}", tar.read_bytes())
        variables = {**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)}
        variables["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"

        calm = Driver(
            embed_command(f"{folder}/calm", "calm", input_uri, NUM_ENCODERS),
            {**variables, **direct},
            folder / "calm.log",
        )
        stack.callback(calm.close)
        calm.start()
        report.tell("undisturbed: seconds", calm.finish()["seconds"])

        driver = Driver(
            embed_command(storage_uri, "chaos", input_uri, NUM_ENCODERS),
            {**variables, **s3_environment(proxy.port)},
            folder / "chaos.log",
        )
        stack.callback(driver.close)
        proxy.write_delay_s = WRITE_DELAY_S
        started = time.monotonic()
        driver.start()
        killer = Killer(proxy, cluster, driver, seed)
        killer.run(num_kills)
        proxy.write_delay_s = 0.0
        last = driver.finish()
        seconds = time.monotonic() - started

        report.at_least("kills", len(killer.kills), num_kills)
        for kind in KINDS:
            report.tell(f"kills of a {kind}", sum(kill.kind == kind for kill in killer.kills))
        in_write = sum(bool(kill.in_write) for kill in killer.kills)
        report.at_least("kills during a write, share", in_write / max(len(killer.kills), 1), 0.5)
        report.tell("with kills: seconds", seconds)
        report.tell("S3 requests", sum(proxy.counts[method] for method in ("GET", "HEAD", "PUT", "POST", "DELETE")))
        report.tell("S3 requests that were failed", proxy.num_faults)
        print(dict(proxy.counts), file=sys.stderr)
        report.tell("starts of the driver", driver.starts)
        report.at_most("ends of the driver that no kill caused", driver.failures, 0)
        report.at_most("tracebacks it printed", driver.log.read_text(encoding="utf-8").count("Traceback"), 0)
        kill_times = [killer._started + kill.seconds for kill in killer.kills]
        report.at_least("slices redone", num_redone(proxy, kill_times), 1)
        report.tell("slices that the last run re-used", last["outputs"]["slices_reused"])
        with environment_of(direct):
            result = Result.read(f"{storage_uri}/embedded/chaos/vision")
        account(
            report, count_samples(tars, input_uri), Result.read(f"{folder}/calm/embedded/calm/vision"), result
        )  # fmt: skip


def main() -> int:
    """Print the measures; 1 if a wanted figure isn't reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="3 kills instead of 20")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.add_argument("--seed", type=int, default=0, help="of kills and faults")
    arguments = parser.parse_args()
    num_samples, num_kills = (320, 3) if arguments.quick else (2400, 20)
    report = Report()
    with tempfile.TemporaryDirectory(prefix="nexusgen-chaos-") as folder:
        run_chaos(report, Path(folder), num_samples, num_kills, arguments.seed)
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
