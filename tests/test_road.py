"""The whole road with a handful of steps: tar shards -> embeddings -> both stages -> a version -> an HTTP answer."""

from __future__ import annotations

import base64
import io
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from tiny_training import make_tiny_model

from jobs import cli
from jobs.command import DEMO_CONFIGS
from pipelines import tracking

# Small enough for a minute, and still every job with its real work.
SETTINGS = (
    "name=road",
    "pack.counts={generation: 48, editing: 8, understanding: 16}",
    "pack.samples_per_shard=24",
    "embed_vision.slice_samples=16",
    "embed_latents.slice_samples=16",
    "train_ar.num_steps=6",
    "train_ar.batch_samples=8",
    "train_ar.warmup_steps=1",
    "train_generation_decoder.num_steps=6",
    "train_generation_decoder.batch_samples=8",
    "train_generation_decoder.warmup_steps=1",
    "evaluate.per_category=1",
    "evaluate.num_explicit=2",
    "evaluate.num_questions=4",
    "evaluate.steps=2",
    "promote.thresholds={}",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with random weights: the road's numbers mean nothing here, its joints do."""
    return make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("road") / "storage"


def walk(folder: Path, base: Path, capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    settings = [f"storage={folder}", f"model={base}", *SETTINGS]
    assert cli.main(["road", str(DEMO_CONFIGS / "road.yaml"), *settings, "--json"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


@pytest.fixture(scope="module")
def report(ray_cluster: Any, folder: Path, base: Path) -> dict[str, Any]:
    """What the first walk printed."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs.road", str(DEMO_CONFIGS / "road.yaml"), f"storage={folder}", f"model={base}"]
        + [*SETTINGS, "--json"],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return json.loads(done.stdout)
