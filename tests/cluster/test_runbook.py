"""What README.md and cluster/README.md tell to type: blocks marked `bash run` are run, the others say why they aren't,
and every command of ours, Ray's and MLflow's in them is parsed by its own program."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fences import Block, blocks, commands
from manifests import ROOT
from references import wrong_words

FILES = ("README.md", "cluster/README.md")
LEFT_OUT = ("[.]*", "runs", "tests", "benchmarks", "secrets", "__pycache__", "build", "dist", "*.egg-info")
PATIENCE_S = 240


@pytest.mark.parametrize("file", FILES)
def test_every_block_is_run_or_says_why_not(file: str) -> None:
    found = blocks(ROOT / file)
    assert found
    assert (ROOT / file).read_text().count("\n```bash") == len(found)
    silent = [block.where for block in found if not block.is_run and not block.reason]
    assert silent == [], "say <!-- not run: WHAT IT NEEDS --> in the line before the block"
    assert [block.where for block in found if block.is_run and block.reason] == []


@pytest.mark.parametrize("file", FILES)
def test_commands_are_understood(file: str) -> None:
    problems = [
        f"{block.where}: {problem}"
        for block in blocks(ROOT / file)
        for words in commands(block)
        for problem in wrong_words(words)
    ]
    assert problems == []


def test_wrong_command_is_found() -> None:
    text = "own=(storage=runs/mine)\nX=1 .venv/bin/nexusgen trian a.yaml && ray get-auth-tokem | cat  # why\n"
    words = list(commands(Block(text, False, "", "here")))
    assert words == [["nexusgen", "trian", "a.yaml"], ["ray", "get-auth-tokem"]]
    assert all(list(wrong_words(one)) for one in words)
    text = ".venv/bin/nexusgen embed jobs/configs/demo/embed_vision.yaml inptu=x > out.txt\n"
    (one,) = commands(Block(text, False, "", "here"))
    assert "inptu" in next(wrong_words(one))


def test_compose_is_asked_from_inside() -> None:
    """Its storage and MLflow have names and keys in its containers alone."""
    inside = list(
        commands(Block("docker compose -f a.yaml exec ray-head nexusgen statsu --storage x", False, "", "here"))
    )
    assert inside == [["nexusgen", "statsu", "--storage", "x"]]
    lines = [line for block in blocks(ROOT / "cluster" / "README.md") for line in block.text.splitlines()]
    asking = [line for line in lines if "--storage s3://nexusgen/" in line]
    assert len(asking) > 1
    assert [line for line in asking if not line.startswith("docker compose ")] == []


@pytest.mark.parametrize("file", FILES)
def test_blocks_run(file: str, tmp_path: Path) -> None:
    """In a copy of the checkout, in one shell for each file."""
    marked = [block.text for block in blocks(ROOT / file) if block.is_run]
    if not marked:
        pytest.skip(f"no block of {file} is marked `bash run`")
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (checkout / ".venv").symlink_to(sys.prefix)
    script = "\n".join(["set -euo pipefail", *marked])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    environment |= {"PYTHONPATH": str(checkout), "PYTHONWARNINGS": "ignore"}
    told = tmp_path / "told"
    with told.open("w") as log:
        shell = subprocess.Popen(
            ["bash", "-c", script], cwd=checkout, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        exit_code = shell.wait(PATIENCE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGTERM)  # what a block that failed left running
    assert exit_code == 0, told.read_text()[-4000:]
