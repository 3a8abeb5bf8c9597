"""Real servers for tests, on this machine only; killed with all their workers when the block ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    """A port that nobody listens to at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[None]:
    """An MLflow tracking server that keeps its database and artefacts in `folder`, also over a restart."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "art")]
    variables = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with _server(command, variables, f"http://127.0.0.1:{port}/health", folder / "mlflow.log"):
        yield


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


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
