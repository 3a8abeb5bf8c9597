"""A Ray cluster of several nodes on this machine, each by its own `ray start`, as on machines of their own.

It asks for a token, and its nodes' environment holds what a real cluster's would: credentials. All ports are free ones,
so it disturbs no other Ray here. Nodes are killed as if their machine lost power.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
from servers import free_port

NODE_PATIENCE_S = 300.0
MOST_STARTS_AGAIN = 4  # Ray gives its own processes 30 s to find each other, which a busy machine exceeds
OBJECT_STORE_BYTES = 150_000_000
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


class Nodes:
    """The nodes of one cluster: `head` and `workers` are their `ray start` processes."""

    def __init__(self, folder: Path, environment: Mapping[str, str], worker_cpus: int = 2) -> None:
        """Nothing is started yet; `environment` is the nodes', beside what this process has."""
        self.folder = folder
        self.port, self.dashboard_port, self.client_port = free_port(), free_port(), free_port()
        self.token_path = folder / "ray_token"
        self.token_path.write_text(secrets.token_hex(32), encoding="utf-8")
        self.head: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []
        self._num_started = 0
        self._lock = threading.Lock()
        self._worker_cpus = worker_cpus
        # Short: a socket's path has at most 107 characters.
        self._scratch = tempfile.TemporaryDirectory(prefix="nodes-", ignore_cleanup_errors=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        self._environment = {
            **kept,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_prestart_worker_first_driver": "0",
            **environment,
        }

    @property
    def url(self) -> str:
        """Of the dashboard, where jobs are submitted."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    def start_head(self, *options: str) -> None:
        """Start the head, which runs drivers alone, and wait until it is one of its cluster's nodes.

        On a busy machine that is tried again.
        """
        for is_last in (False, False, True):
            self.head = self._start(
                "head",
                *("--head", f"--port={self.port}", "--dashboard-host=127.0.0.1"),
                *(f"--dashboard-port={self.dashboard_port}", f"--ray-client-server-port={self.client_port}"),
                *("--num-cpus=0", f"--temp-dir={self._scratch.name}", *options),
            )
            if self._comes_up(1, self.head, "head"):
                return
            kill_tree(self.head)
            self._kill_strays()
            assert not is_last, self.log("head")

    def start_worker(self) -> None:
        """Start one more node; it joins when it is ready."""
        self._num_started += 1
        # A folder of its own, as a machine has: in a shared one, a node that goes takes the others' code with it.
        folder = f"--temp-dir={self._scratch.name}/{self._num_started}"
        address = f"--address=127.0.0.1:{self.port}"
        name = f"worker-{self._num_started}"
        self.workers.append(self._start(name, address, f"--num-cpus={self._worker_cpus}", folder))

    def replace_ended(self) -> int:
        """Start another node for each that ended by itself; gives their number."""
        with self._lock:
            ended = [process for process in self.workers if process.poll() is not None]
            for process in ended:
                self.workers.remove(process)
                self.start_worker()
        return len(ended)

    def wait_for_workers(self) -> None:
        """Wait until all nodes have joined; those that Ray gave up are started again, a few times in all."""
        deadline = time.monotonic() + NODE_PATIENCE_S
        num_again = 0
        while self.num_alive() < 1 + len(self.workers):
            num_again += self.replace_ended()
            assert num_again <= MOST_STARTS_AGAIN, self.log(f"worker-{self._num_started}")
            assert time.monotonic() < deadline, self.log(f"worker-{self._num_started}")
            time.sleep(0.5)

    def log(self, name: str) -> str:
        """What a node has printed."""
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-3000:]

    def ray_logs(self) -> Iterator[Path]:
        """Every log that Ray's own processes write on these nodes."""
        for path in Path(self._scratch.name).rglob("logs/**/*"):
            if path.is_file():
                yield path

    def kill_worker(self, index: int = 0) -> None:
        """End a node and all on it at once."""
        with self._lock:
            kill_tree(self.workers.pop(index))

    def kill_head(self) -> None:
        """End the head, and with it the cluster's memory and every driver."""
        assert self.head is not None
        kill_tree(self.head)
        self.head = None

    def close(self) -> None:
        """End all."""
        for process in (*self.workers, *([self.head] if self.head else [])):
            kill_tree(process)
        self.workers, self.head = [], None
        self._kill_strays()
        self._scratch.cleanup()

    def _start(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        command = [*RAY, "start", "--block", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        command += ["--dashboard-agent-listen-port=0", *options]  # Ray's own is one port for all nodes
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=self._environment, start_new_session=True)

    def _comes_up(self, num_nodes: int, process: subprocess.Popen[bytes], name: str) -> bool:
        """Wait for so many nodes; False if this one ends by itself."""
        deadline = time.monotonic() + NODE_PATIENCE_S
        while self.num_alive() < num_nodes:
            if process.poll() is not None:
                return False
            assert time.monotonic() < deadline, f"{name} isn't there in {NODE_PATIENCE_S:g} s"
            time.sleep(0.5)
        return True

    def _kill_strays(self) -> None:
        """Kill what was started while its parents were being killed."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(self._scratch.name in word for word in process.cmdline()):
                    process.kill()

    def num_alive(self) -> int:
        """Nodes that the cluster counts as alive, its head among them; 0 while it doesn't answer."""
        request = urllib.request.Request(f"{self.url}/nodes?view=summary")
        request.add_header("Authorization", f"Bearer {self.token_path.read_text(encoding='utf-8')}")
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                summary = json.load(response)["data"]["summary"]
        except (urllib.error.URLError, OSError, ValueError):
            return 0
        return sum(node["raylet"].get("state") == "ALIVE" for node in summary)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and everything below it."""
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(process.pid)
        for one in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                one.kill()
    process.wait()


@contextlib.contextmanager
def nodes(folder: Path, num_workers: int, environment: Mapping[str, str]) -> Iterator[Nodes]:
    """A cluster with a head and this many more nodes, which ends with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Nodes(folder, environment)
    try:
        made.start_head()
        for _ in range(num_workers):
            made.start_worker()
        made.wait_for_workers()
        yield made
    finally:
        made.close()
