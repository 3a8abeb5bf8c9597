"""A site that jobs are submitted to: Ray nodes that hold the credentials, MLflow and S3 servers, a user beside them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_nodes import Nodes, nodes
from servers import free_port, mlflow_server, s3_server

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "bucket"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "held-by-the-nodes",
    "AWS_SECRET_ACCESS_KEY": "held-by-the-nodes-alone",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN": "held-by-the-nodes-for-nobody",  # unused, as the keys come first
}


@dataclass(frozen=True)
class Site:
    """`environment` is the user's: addresses and the cluster's token, no credentials."""

    folder: Path
    nodes: Nodes
    environment: Mapping[str, str]

    @property
    def address(self) -> str:
        return self.nodes.url

    def start(self, *words: object, **variables: str) -> subprocess.Popen[str]:
        """`nexusgen WORDS` in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *map(str, words)],
            cwd=ROOT,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: object, **variables: str) -> tuple[int, str, str]:
        """Its exit code, standard output and standard error."""
        process = self.start(*words, **variables)
        out, err = process.communicate(timeout=1200)
        return process.returncode, out, err

    def submit(self, job: str, config: Path, *words: object, **variables: str) -> tuple[int, dict[str, Any], str]:
        """Submit and follow; gives the exit code, what --json printed, and the log."""
        code, out, err = self.run("submit", job, config, *words, "--address", self.address, "--json", **variables)
        return code, json.loads(out) if out else {}, err

    def jobs(self) -> list[dict[str, Any]]:
        """What `nexusgen jobs list` knows."""
        code, out, err = self.run("jobs", "list", "--address", self.address, "--json")
        assert code == 0, err
        return list(json.loads(out)["jobs"])


@contextlib.contextmanager
def site(
    folder: Path,
    num_workers: int,
    tracking_server: Callable[[Path, int], contextlib.AbstractContextManager[None]] = mlflow_server,
) -> Iterator[Site]:
    """All of it, until the block ends."""
    s3_port, mlflow_port = free_port(), free_port()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "MLFLOW_"))}
    with contextlib.ExitStack() as stack:
        stack.enter_context(s3_server(folder, s3_port, BUCKET))
        ray = stack.enter_context(nodes(folder / "nodes", num_workers, SECRETS))
        stack.enter_context(tracking_server(folder, mlflow_port))
        environment = {
            **kept,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mlflow_port}",
            "RAY_AUTH_TOKEN_PATH": str(ray.token_path),
            "PYTHONPATH": str(ROOT),
        }
        yield Site(folder, ray, environment)
