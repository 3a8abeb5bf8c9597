"""Real servers for tests, on this machine only; killed with all their workers when the block ends."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


def free_port() -> int:
    """A port that nobody listens to.

    It is none of those that the system gives to outgoing connections (on Linux from 32768 on), nor of those that Ray
    gives its workers (10002 to 19999): one of these may be taken before a server comes to listen.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("100 ports in a row are taken")


@contextmanager
def mlflow_server(folder: Path, port: int, database: str = "") -> Iterator[None]:
    """An MLflow tracking server that keeps its artefacts in `folder`, and there its database, too, if none is given."""
    database = database or f"sqlite:///{folder}/server.db"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database, "--artifacts-destination", str(folder / "art")]
    variables = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with _server(command, variables, f"http://127.0.0.1:{port}/health", folder / "mlflow.log"):
        yield


@contextmanager
def postgres_server(port: int) -> Iterator[str]:
    """A PostgreSQL database for MLflow; gives its URI. It doesn't run as root, so root starts it as user `postgres`."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # Debian's, which aren't on PATH
    initdb = shutil.which("initdb", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)]))
    assert initdb is not None, "PostgreSQL is missing: apt-get install postgresql"
    user = "postgres" if os.getuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as name:
        if user is not None:
            shutil.chown(name, user)
        command = [initdb, "--pgdata", f"{name}/data", "--username", "mlflow", "--auth", "trust", "--no-sync"]
        subprocess.run(command, user=user, cwd=name, check=True, stdout=subprocess.DEVNULL)
        command = [str(Path(initdb).with_name("postgres")), "-D", f"{name}/data", "-p", str(port), "-k", name]
        with Path(name, "log").open("wb") as log:
            server = subprocess.Popen(
                [*command, "-h", "127.0.0.1"], user=user, cwd=name, stdout=log, stderr=log, start_new_session=True
            )
        try:
            deadline = time.monotonic() + 60
            while not _accepts(port):
                assert server.poll() is None, Path(name, "log").read_text()
                assert time.monotonic() < deadline, "PostgreSQL doesn't start"
                time.sleep(0.2)
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGQUIT)  # at once, with all its processes
            server.wait()


@contextmanager
def s3_server(folder: Path, port: int, bucket: str) -> Iterator[None]:
    """An S3 of moto's with one bucket; it forgets everything when it ends."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _server(command, {}, f"http://127.0.0.1:{port}/moto-api/", folder / "s3.log"):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{bucket}", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()
        yield


@contextmanager
def _server(command: Sequence[str], variables: Mapping[str, str], health: str, log: Path) -> Iterator[None]:
    with log.open("ab") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **variables}, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while not _answers(health):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{command[2]} doesn't start"
            time.sleep(0.2)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
