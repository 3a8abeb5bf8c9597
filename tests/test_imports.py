"""Importing any module does nothing: no file made, no environment read, no thread, process or connection started."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import jobs
import nexusgen
import pipelines

ROOT = Path(__file__).parents[1]

# Imports the modules that it is given, and prints what happened besides.
WATCH = """
import importlib, json, os, sys, threading

OURS = ("nexusgen", "pipelines", "jobs")
seen = {"environment": [], "connections": [], "processes": []}
read = os._Environ.__getitem__

def reading(self, key):
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") in ("os", "_collections_abc"):  # os.getenv, os.environ.get
        frame = frame.f_back
    name = frame.f_globals.get("__name__", "")
    if name.split(".")[0] in OURS:
        seen["environment"].append(f"{key} by {name}")
    return read(self, key)

def watch(event, arguments):
    if event == "socket.connect":
        seen["connections"].append(str(arguments[1]))
    elif event in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
        seen["processes"].append(str(arguments[:2]))

os._Environ.__getitem__ = reading
sys.addaudithook(watch)
for name in sys.argv[1:]:
    importlib.import_module(name)
seen["threads"] = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
seen["packages"] = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps(seen))
"""


def modules(package: Any) -> list[str]:
    """Names of a package and of all that it holds."""
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [package.__name__, *(one.name for one in found)]


def import_watched(names: Sequence[str], home: Path) -> dict[str, list[str]]:
    """Import modules in a fresh interpreter whose working, home and temporary folder is `home`."""
    places = {name: str(home) for name in ("HOME", "TMPDIR", "MPLCONFIGDIR", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-B", "-c", WATCH, *names],
        cwd=home,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **places},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_walk_finds_every_module() -> None:
    for package in (nexusgen, pipelines, jobs):
        folder = ROOT / package.__name__
        files = {path for path in folder.rglob("*.py") if path.name != "__init__.py"}
        files = {path for path in files if "demo_base" not in path.parts}  # a model folder, data to us
        packages = {path.parent for path in folder.rglob("__init__.py")}
        assert len(modules(package)) == len(files) + len(packages)


@pytest.mark.parametrize("packages", [(nexusgen,), (pipelines, jobs)], ids=["nexusgen", "the rest"])
def test_importing_does_nothing(packages: Sequence[Any], tmp_path: Path) -> None:
    seen = import_watched([name for package in packages for name in modules(package)], tmp_path)
    assert seen["environment"] == []
    assert seen["connections"] == []
    assert seen["processes"] == []
    assert seen["threads"] == []
    # torch makes an empty folder for its compiler as soon as diffusers imports it.
    assert [path for path in tmp_path.rglob("*") if not path.name.startswith("torchinductor_")] == []
    if packages == (nexusgen,):
        assert {"ray", "mlflow", "fastapi"}.isdisjoint(seen["packages"])


def test_the_command_line_is_light(tmp_path: Path) -> None:
    """`nexusgen --help` and a misspelt option wait for no library."""
    seen = import_watched(["jobs.cli"], tmp_path)
    assert {"torch", "transformers", "diffusers", "ray", "mlflow", "pyarrow"}.isdisjoint(seen["packages"])


def test_a_job_and_its_readers_start_without_torch(tmp_path: Path) -> None:
    """The driver of `embed` and its reading workers need none of the model's libraries."""
    seen = import_watched(["jobs.embed", "pipelines.embed", "pipelines.slices"], tmp_path)
    assert {"torch", "transformers", "diffusers", "ray", "mlflow"}.isdisjoint(seen["packages"])
