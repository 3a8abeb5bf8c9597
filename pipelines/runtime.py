"""Where a job runs: one Ray cluster (a given one, or a local one), its CPU budget, and what a run of a job cost.

Ray waits without end and without a word when a job asks for more CPUs than are free, so `require_cpus` compares the
numbers first and refuses. On a laptop the local cluster counts at least 8 *logical* CPUs, whatever the machine has:
Ray Train reserves its workers' CPUs first and Ray Data then needs a free one. Logical CPUs only limit how many things
Ray starts; each worker computes on one thread.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

import psutil

from nexusgen.errors import ResourceError
from pipelines.autoscaling import CPU_REQUEST

MIN_LOCAL_CPUS = 8  # logical; Train's workers, Data's readers and Serve's replicas fit side by side
LOCAL_OBJECT_STORE_BYTES = 2_000_000_000  # Ray's own default is 30 % of the memory
CPU_SAMPLE_S = 1.0
FREE_CPU_PATIENCE_S = 10.0  # CPUs of a job that has just ended are given back with a delay
JOIN_PATIENCE_S = 900.0  # a submitted job waits so long for its cluster's nodes: machines are found, images pulled
ASK_S = 30.0  # between two askings for nodes, and two lines about it

# Ray shows a job's variables to whoever has the cluster's token, and logs them.
SECRET_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "NEXUSGEN_API_KEYS",
    "NEXUSGEN_JUDGE_API_KEY",
)
# What is no secret, unless it holds one.
ADDRESS_VARIABLES = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)
_SECRET_IN_URI = re.compile(r"://[^/@\s]+@|[?&][^=&]*(?:key|password|secret|token)[^=&]*=", re.IGNORECASE)
_FORWARDED = (
    "NEXUSGEN_API_KEYS",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
)
_FORWARDED_PREFIXES = ("AWS_",)
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set in the driver of a submitted job


@dataclass(frozen=True)
class JobReport:
    """What one run of a job did and cost; `outputs` are its artefacts (URIs, run ids, scores) by name."""

    job: str
    seconds: float
    cpu_seconds: float
    samples: int | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    outputs: dict[str, Any] = field(default_factory=dict)
    reused: bool = False

    @property
    def samples_per_s(self) -> float | None:
        """Samples per wall second; None where nothing was processed."""
        if not self.samples or self.seconds <= 0:
            return None
        return self.samples / self.seconds

    def to_json(self) -> dict[str, Any]:
        """A mapping that `json.dumps` takes and `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> JobReport:
        """Rebuild a report from `to_json`'s mapping."""
        return cls(**values)


@dataclass(frozen=True)
class RayCluster:
    """The cluster at hand: its CPUs as Ray counts them, and whether this process started it."""

    total_cpus: float
    free_cpus: float
    is_local: bool


@contextmanager
def ray_cluster(num_cpus_needed: float, why: str, *, local_cpus: int | None = None) -> Iterator[RayCluster]:
    """Give a Ray cluster on which `num_cpus_needed` CPUs are free, for the job described by `why`.

    An initialised Ray is used as it is; else the one at RAY_ADDRESS; else a quiet local one is started, and stopped at
    the end, with `local_cpus` logical CPUs (default: at least MIN_LOCAL_CPUS).
    Raises: ResourceError, before the job starts anything, if fewer CPUs are free or no cluster answers.
    """
    address = os.environ.get("RAY_ADDRESS")
    is_started_here = not is_ray_initialised()
    if is_started_here:
        if not address:
            total = float(local_cpus or max(MIN_LOCAL_CPUS, os.cpu_count() or 1))
            _check_cpus(num_cpus_needed, total, total, why, is_local=True)  # no need to start Ray to refuse
        _start_ray(address, local_cpus)
    import ray

    try:
        total, free = require_cpus(num_cpus_needed, why)
        yield RayCluster(total, free, is_local=is_started_here and not address)
    finally:
        if is_started_here:
            CPU_REQUEST.take_back()
            ray.shutdown()


def require_cpus(num_cpus_needed: float, why: str, *, patience_s: float = FREE_CPU_PATIENCE_S) -> tuple[float, float]:
    """Refuse now what Ray would wait for without end. Returns the cluster's CPUs: (total, free).

    A cluster large enough but busy is asked again for `patience_s` seconds. A submitted job, where nobody sits in
    front, waits JOIN_PATIENCE_S, also where the cluster is too small: after a failure its nodes come back one by one,
    and an autoscaler, which knows nothing of a job that hasn't begun, is asked for what is missing.
    Raises: ResourceError with the numbers needed, free and in all.
    """
    import ray

    waits_for_nodes = is_submitted()
    started = time.monotonic()
    asked_at: float | None = None
    while True:
        total = float(ray.cluster_resources().get("CPU", 0.0))
        free = float(ray.available_resources().get("CPU", 0.0))
        if free >= num_cpus_needed:
            CPU_REQUEST.take_back_later()
            return total, free
        now = time.monotonic()
        is_over = now - started >= (JOIN_PATIENCE_S if waits_for_nodes else patience_s)
        if is_over or (total < num_cpus_needed and not waits_for_nodes):
            CPU_REQUEST.take_back()
            _check_cpus(num_cpus_needed, total, free, why, is_local=not os.environ.get("RAY_ADDRESS"))
        # CPUs that a job which has just ended gives back need no nodes.
        is_short = total < num_cpus_needed or now - started >= patience_s
        if waits_for_nodes and is_short and (asked_at is None or now - asked_at >= ASK_S):
            asked_at = now
            CPU_REQUEST.make(total - free + num_cpus_needed)
            print(
                f"{why} needs {num_cpus_needed:g} CPUs, {free:g} of the cluster's {total:g} are free: asking for more, "
                f"waiting {JOIN_PATIENCE_S - (now - started):.0f} s for them",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(0.25)


class CpuMeter:
    """Measures a block of code: `seconds` by the wall clock, `cpu_seconds` of this process and all it started.

    The local Ray cluster's processes descend from this one and are counted; those of a cluster at RAY_ADDRESS are not.
    Processes are sampled every second: of one that ends between two samples, the last second may be missing.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._ended: float | None = None
        self._at_start: dict[tuple[int, float], float] = {}
        self._last_seen: dict[tuple[int, float], float] = {}
        self._known: dict[tuple[int, float], psutil.Process] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cpu-meter", daemon=True)

    def __enter__(self) -> CpuMeter:
        self._started = time.monotonic()
        self._sample()
        self._at_start = dict(self._last_seen)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
        self._ended = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall seconds since the block began, until now or its end."""
        return (self._ended or time.monotonic()) - self._started

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds (user and system) since the block began, as of the last sample."""
        with self._lock:
            return sum(used - self._at_start.get(process, 0.0) for process, used in self._last_seen.items())

    def refresh(self) -> None:
        """Take a sample now."""
        self._sample()

    def covers(self, host: str, pid: int) -> bool:
        """Whether the CPU seconds of a process, by the name of its machine and its number, are among those measured."""
        if host != socket.gethostname():
            return False
        with self._lock:
            is_known = any(pid == known for known, _ in self._known)
        if is_known:
            return True
        self._sample()  # it may be younger than the last sample
        with self._lock:
            return any(pid == known for known, _ in self._known)

    def _watch(self) -> None:
        while not self._stop.wait(CPU_SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        own = psutil.Process()
        with self._lock:
            for process in [own, *own.children(recursive=True)]:
                self._known.setdefault((process.pid, process.create_time()), process)
            # Known processes are asked one by one: an orphan no longer appears among the children, but still works.
            for identity, process in list(self._known.items()):
                try:
                    times = process.cpu_times()
                except psutil.Error:
                    del self._known[identity]
                    continue
                self._last_seen[identity] = times.user + times.system


def holds_secret(address: str) -> bool:
    """Whether an address has a user or password in it, in front of its host or among its parameters."""
    return _SECRET_IN_URI.search(address) is not None


def is_submitted() -> bool:
    """Whether this process is the driver of a job that was submitted to a cluster, where nobody sits in front of it."""
    return _JOB_CONFIG in os.environ


def is_ray_initialised() -> bool:
    """Whether this process is connected to Ray; doesn't import it."""
    ray = sys.modules.get("ray")  # importing ray takes a second, and a refusal needs none of it
    return ray is not None and bool(ray.is_initialized())


def _check_cpus(needed: float, total: float, free: float, why: str, *, is_local: bool) -> None:
    if free >= needed:
        return
    if is_local:
        fix = "use fewer workers, or a larger cluster through RAY_ADDRESS"
    else:
        fix = "use fewer workers, wait for the other jobs to end, or add nodes"
    raise ResourceError(f"{why} needs {needed:g} CPUs, but only {free:g} of Ray's {total:g} are free: {fix}")


def _start_ray(address: str | None, local_cpus: int | None) -> None:
    """Connect to `address`, or start a local cluster without dashboard, quiet and small in memory."""
    # Read by Ray's own processes, which inherit our environment, when they start.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(MIN_LOCAL_CPUS))  # fewer, and Ray warns of many
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # idle workers, a second of two cores for each two
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 lets anything else on a busy laptop starve the job
    if address:
        _check_reachable(address)
    import ray

    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": _worker_environment()},
    }
    if address:
        options["address"] = address
    else:
        options |= {
            "address": "local",
            "num_cpus": local_cpus or max(MIN_LOCAL_CPUS, os.cpu_count() or 1),
            "object_store_memory": min(LOCAL_OBJECT_STORE_BYTES, int(0.3 * psutil.virtual_memory().available)),
            "include_dashboard": False,
        }
    try:
        ray.init(**options)
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        where = f"no usable Ray cluster at RAY_ADDRESS={address}" if address else "the local Ray cluster doesn't start"
        raise ResourceError(f"{where}: {error}") from error


def _check_reachable(address: str) -> None:
    """Ray tries a dead address for minutes; a closed port shows at once. Names without a port (`auto`) are Ray's."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ResourceError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): start it, correct the address, "
            "or unset RAY_ADDRESS to use this machine"
        ) from None


def _worker_environment() -> dict[str, str]:
    """Variables that workers need wherever they run; Ray refuses those that a submitted job already carries.

    A submitted job's driver passes on addresses alone, and none with a password: it has all else from the job, which
    gives it to workers itself, or from its node, as the workers do. Ray shows what is passed on here, too.
    """
    # An actor computes in another thread than its first, and decodes in more: with an arena for each, the C library
    # keeps giving large buffers back to the system and asking for them anew, half of all system time of `embed`.
    wanted = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    if not is_submitted():
        for name, value in os.environ.items():
            if name in _FORWARDED or name.startswith(_FORWARDED_PREFIXES):
                wanted[name] = value
        return wanted
    for name in ADDRESS_VARIABLES:
        if (address := os.environ.get(name)) and not holds_secret(address):
            wanted[name] = address
    carried = json.loads(os.environ[_JOB_CONFIG]).get("runtime_env", {}).get("env_vars", {})
    return {name: value for name, value in wanted.items() if name not in carried}
