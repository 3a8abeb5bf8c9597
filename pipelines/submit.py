"""Submitting: what travels to a cluster with a job (code, configuration, variables), and its name there.

A job's id says what it does: the job, its stage or mode, its project, and a digest of its resolved configuration.
Submitted again while it runs, it is attached to; after its end, the next attempt begins under ID-2, ID-3, ..., and does
what isn't done yet. Other work on the same places waits until it is over: two drivers would undo each other's.

Variables of the caller's travel by name, and secrets only when they are asked for: Ray shows a job's variables to
everyone who has the cluster's token and writes them into its nodes' logs. A cluster that holds its credentials itself,
in the environment that its nodes were started in, gives them to drivers and workers without showing them.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexusgen import __version__
from nexusgen.errors import UsageError
from pipelines.runtime import ADDRESS_VARIABLES, SECRET_VARIABLES, holds_secret
from pipelines.storage import is_remote
from pipelines.submit_api import JobApi, JobState

PACKAGES = ("nexusgen", "pipelines", "jobs")
CONFIG_FOLDER = "config"  # in the job's working folder
DIGEST, PLACES = "nexusgen.digest", "nexusgen.places"  # of a job's metadata
STOP_WAIT_S = 120  # from the order to end until it is killed: a step and its upload must find room


@dataclass(frozen=True)
class Work:
    """What is to be done: `arguments` of the command line in the job's folder, and the files it reads there."""

    job: str
    name: str
    digest: str  # of the job, its resolved configuration and the files that this names
    arguments: tuple[str, ...]
    files: Mapping[str, Path]  # by their place in the job's folder
    part: str = ""  # a training's stage, an embedding's mode
    places: tuple[str, ...] = ()  # what this work alone may write at the time

    @property
    def id(self) -> str:
        """The same for the same work."""
        words = (self.job, self.part, re.sub(r"[^A-Za-z0-9_-]+", "-", self.name), self.digest)
        return "-".join(word for word in words if word)


def digest_of(job: str, resolved_config: str) -> str:
    """Names a job's work: the same job with the same settings does the same."""
    return hashlib.sha256(f"{job}\n{resolved_config}".encode()).hexdigest()[:8]


def checkout() -> Path | None:
    """The folder of the sources that run here; None if they are installed, as in an image."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() else None


def check_reachable(key: str, value: Any) -> None:
    """See that other machines can find what a setting names. Raises: UsageError for a path of this machine's."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str) and not (is_remote(one) or one.startswith(("/", "models:/"))):
            raise UsageError(
                f"{key}={one} is relative to a folder of this machine, and a job on a cluster has another: "
                f"name an s3:// URI, or an absolute path that every node sees"
            )


def variables_of(named: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that travel with a job: ADDRESS_VARIABLES that are set, and those that are named.

    Raises: UsageError for a named one that isn't set, or an address that would take a password along unasked.
    """
    environment = os.environ if environment is None else environment
    for name in named:
        if name not in environment:
            raise UsageError(f"--env {name}: there is no such variable here; set it, or leave it to the cluster")
    found = {name: environment[name] for name in (*ADDRESS_VARIABLES, *named) if environment.get(name)}
    for name, value in found.items():
        if name not in named and holds_secret(value):
            raise UsageError(
                f"{name} holds a user or password, and whoever has the cluster's token can read a job's variables: "
                f"set it where the cluster's nodes are started and unset it here, or send it with --env {name}"
            )
    return found


def secrets_among(names: Sequence[str]) -> list[str]:
    """Those that are secret."""
    return [name for name in names if name in SECRET_VARIABLES]


def submit(api: JobApi, work: Work, base_id: str, variables: Mapping[str, str], *, ship_code: bool) -> tuple[str, bool]:
    """Submit `work` under `base_id`, unless an attempt of it runs. Gives the attempt's id, and whether it is new.

    Raises: UsageError if a job that runs would be in its way; ResourceError if the cluster refuses it.
    """
    while True:
        states = api.jobs()
        check_no_other(states, work, base_id, api.url)
        attempts = attempts_of(states, base_id)
        if attempts and not attempts[-1].is_over:
            return attempts[-1].id, False
        number = _number(attempts[-1].id, base_id) + 1 if attempts else 1
        job_id = base_id if number == 1 else f"{base_id}-{number}"
        command = shlex.join([api.interpreter(), "-m", "jobs.cli", work.job, *work.arguments])
        with staged(work.files, ship_code=ship_code) as folder:
            try:
                api.submit(
                    entrypoint=f"exec {command}",  # so that an order to end reaches it, and no shell in between
                    submission_id=job_id,
                    runtime_env={
                        "working_dir": str(folder),
                        "env_vars": {**variables, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
                    },
                    metadata={
                        "nexusgen.job": work.job,
                        "nexusgen.name": work.name,
                        "nexusgen.version": __version__,
                        "nexusgen.attempt": str(number),
                        DIGEST: work.digest,
                        PLACES: "\n".join(work.places),
                    },
                )
                return job_id, True
            except FileExistsError:  # somebody submitted the same work meanwhile
                continue


def check_no_other(states: Sequence[JobState], work: Work, base_id: str, url: str) -> None:
    """See that no job runs that has this id and does something else, or that writes where this one would.

    Raises: UsageError naming the job, and how to stop it.
    """
    for state in states:
        metadata = state.metadata or {}
        if state.is_over or DIGEST not in metadata:  # not of `submit`
            continue
        if _number(state.id, base_id):
            common = [] if metadata[DIGEST] == work.digest else ["under this id, with other settings"]
        else:
            common = sorted(set(work.places) & set(metadata.get(PLACES, "").split("\n")))
        if common:
            what = common[0] if _number(state.id, base_id) else f"and writes {common[0]}, as this one would"
            raise UsageError(
                f"job {state.id} runs {what}: wait for its end, or stop it (a training saves first) and submit again: "
                f"nexusgen jobs stop {state.id} --address {url}"
            )


def attempts_of(states: Sequence[JobState], base_id: str) -> list[JobState]:
    """The attempts at a piece of work, by number."""
    found = [state for state in states if _number(state.id, base_id)]
    return sorted(found, key=lambda state: _number(state.id, base_id))


def _number(job_id: str, base_id: str) -> int:
    """Which attempt an id means; 0 for another work's."""
    if job_id == base_id:
        return 1
    rest = job_id.removeprefix(f"{base_id}-")
    return int(rest) if rest != job_id and rest.isdecimal() else 0


@contextmanager
def staged(files: Mapping[str, Path], *, ship_code: bool) -> Iterator[Path]:
    """A folder with what travels: the files, and the packages' sources. Ray sends it once for each content."""
    with tempfile.TemporaryDirectory(prefix="nexusgen-submit-") as name:
        folder = Path(name)
        if ship_code:
            root = Path(__file__).resolve().parents[1]
            for package in PACKAGES:
                shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        for place, source in files.items():
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        yield folder
