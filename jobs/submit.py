"""`nexusgen submit JOB CONFIG [key=value ...] --address URL`: a job on a running cluster."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.command import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    Outcome,
    add_config_arguments,
    add_json_argument,
    main_of,
    report_progress,
)

if TYPE_CHECKING:
    from nexusgen.config import Config
    from pipelines.submit import Work
    from pipelines.submit_api import JobApi, JobState

NAME = "submit"
HELP = "Run a job on a Ray cluster: submit it once, follow it, continue it after a failure."

JOBS = ("road", "pack", "embed", "train", "register", "evaluate", "serve")
SECOND_INTERRUPT_S = 5.0  # after a Ctrl-C, for another one
PLACES = ("storage", "input", "images", "model", "against", "canary", "also")  # keys that may name a folder
FILES = ("drop_keys", "prompts")  # keys that name a file, which travels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """JOB CONFIG [key=value ...] --address URL and how it is run there."""
    parser.add_argument("job", choices=JOBS, metavar="JOB", help=f"one of {', '.join(JOBS)}")
    add_config_arguments(parser)
    add_address_argument(parser)
    parser.add_argument(
        "--follow",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show the job's log until it ends; Ctrl-C leaves it running, a second one stops it (default: yes)",
    )
    parser.add_argument("--id", help="name of the job on the cluster (default: made of job, project and settings)")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[,NAME]",
        help="send these variables of this shell along; secrets among them can be read by all who have the token",
    )
    parser.add_argument(
        "--installed", action="store_true", help="use the cluster's installed nexusgen instead of sending this one"
    )
    add_json_argument(parser)


def add_address_argument(parser: argparse.ArgumentParser) -> None:
    """--address URL."""
    parser.add_argument(
        "--address", required=True, metavar="URL", help="the cluster's dashboard, like http://head:8265"
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Check all that can be checked here, submit, follow."""
    from pipelines import submit
    from pipelines.submit_api import JobApi

    work = _read_work(arguments.job, arguments.config, arguments.overrides)
    named = [name for names in arguments.env for name in names.split(",") if name]
    variables = submit.variables_of(named)
    secrets = submit.secrets_among(named)
    if secrets:
        report_progress(f"submit: whoever has the cluster's token can read {', '.join(secrets)} of this job")
    api = JobApi(arguments.address)
    api.check_versions()
    ship_code = not arguments.installed and submit.checkout() is not None
    job_id, is_new = submit.submit(api, work, arguments.id or work.id, variables, ship_code=ship_code)
    report_progress(f"submit: job {job_id} {'is submitted' if is_new else 'runs already; attached to it'}")
    if not arguments.follow:
        return Outcome(_how_to_go_on(job_id, api.url), _to_json(api.job(job_id), is_new, api.url))
    state = follow(api, job_id)
    return Outcome(describe(state), _to_json(state, is_new, api.url), exit_code_of(state))


def follow(api: JobApi, job_id: str) -> JobState:
    """Show a job's log on standard error until it is over.

    Ctrl-C leaves it running, a second one soon after it stops it; either raises KeyboardInterrupt.
    """
    try:
        return api.follow(job_id, _show)
    except KeyboardInterrupt:
        report_progress(
            f"\nleft job {job_id}, which goes on. Ctrl-C within {SECOND_INTERRUPT_S:g} s stops it.\n"
            f"{_how_to_go_on(job_id, api.url)}"
        )
        try:
            time.sleep(SECOND_INTERRUPT_S)
        except KeyboardInterrupt:
            api.stop(job_id)
            report_progress(f"job {job_id} is told to stop; submitted again, it goes on from what is finished")
        raise


def exit_code_of(state: JobState) -> int:
    """The job's own exit code where it is one of a command's."""
    if state.status == "SUCCEEDED":
        return EXIT_DONE
    if state.status == "STOPPED":
        return EXIT_INTERRUPTED
    return state.exit_code if state.exit_code in (EXIT_USAGE, EXIT_INTERRUPTED) else EXIT_FAILED


def describe(state: JobState) -> str:
    """How a job ended, in one line."""
    seconds = f" after {state.ended - state.started:.0f} s" if state.ended and state.started else ""
    if state.status == "SUCCEEDED":
        return f"job {state.id}: done{seconds}"
    if state.status == "STOPPED":
        return f"job {state.id}: stopped{seconds}; submitted again, it goes on from what is finished"
    if state.exit_code is not None and state.exit_code > 0:
        return f"job {state.id}: failed{seconds} with exit code {state.exit_code}; the reason is at the end of its log"
    reason = " ".join(state.message.split())[:300]
    return f"job {state.id}: lost{seconds} ({reason}); submitted again, it goes on from what is finished"


def _how_to_go_on(job_id: str, url: str) -> str:
    at = f"{job_id} --address {url}"
    return f"follow it: nexusgen jobs logs {at} --follow\nstop it:   nexusgen jobs stop {at}"


def _show(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def _to_json(state: JobState, is_new: bool, url: str) -> dict[str, Any]:
    return {
        "id": state.id,
        "address": url,
        "submitted": is_new,
        "status": state.status,
        "exit_code": exit_code_of(state) if state.is_over else None,
    }


def _read_work(job: str, path: Path, overrides: list[str]) -> Work:
    """The work that a command line names, checked. Raises: ConfigError or UsageError, before anything is sent."""
    from nexusgen.config import dump_config, read_values
    from nexusgen.errors import UsageError
    from pipelines import submit
    from pipelines.storage import is_remote

    values = read_values(path, overrides)
    config = _load(job, path, overrides)
    for key in PLACES:
        value = values.get(key)
        if value is not None and value != "demo-base":
            submit.check_reachable(key, value)
    files = {f"{submit.CONFIG_FOLDER}/{file.name}": file for file in (path, *_sections(job, path))}
    resolved, sent = dump_config(config), []
    for key, value in _named_files(config):
        if is_remote(value) or value.startswith("/"):
            continue
        if not Path(value).is_file():
            raise UsageError(f"{key}={value}: there is no such file here to be sent; correct it, or name an s3:// URI")
        place = f"{submit.CONFIG_FOLDER}/{key}/{Path(value).name}"
        files[place] = Path(value)
        sent.append(f"{key}={json.dumps(place)}")
        resolved += hashlib.sha256(Path(value).read_bytes()).hexdigest()
    return submit.Work(
        job=job,
        name=str(getattr(config, "name", "model")),
        digest=submit.digest_of(job, resolved),
        arguments=(f"{submit.CONFIG_FOLDER}/{path.name}", *overrides, *sent),
        files=files,
        part=str(getattr(config, "stage", getattr(config, "mode", ""))),
        places=tuple(_written(job, config)),
    )


def _named_files(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Files that a configuration names, or one of a road's sections, by their keys."""
    for key, value in config:
        if hasattr(type(value), "model_fields"):
            yield from _named_files(value, f"{prefix}{key}.")
        elif key in FILES and value is not None:
            yield f"{prefix}{key}", value


def _written(job: str, config: Any) -> list[str]:
    """What a job alone may write at the time. Versions and evaluations lie under digests, and get in nobody's way."""
    from pipelines.storage import join

    if job == "road":
        parts = {key: getattr(config, key) for key in type(config).model_fields}
        return [place for key, one in parts.items() for place in _written(key.partition("_")[0], one)]
    if job == "pack":
        return [join(config.storage, "tars", config.name)]
    if job == "embed":
        return [join(config.storage, "embedded", config.name, config.mode)]
    if job == "train":
        return [join(config.storage, "checkpoints", config.name, config.stage)]
    return ["the cluster's server"] if job == "serve" else []


def _load(job: str, path: Path, overrides: list[str]) -> Config:
    """The configuration of a job, by its class."""
    from nexusgen.config import load_config

    if job == "road":
        from jobs.chain import load_road

        return load_road(path, overrides)
    module = importlib.import_module(f"pipelines.{job}")
    return load_config(getattr(module, f"{job.capitalize()}Config"), path, overrides)


def _sections(job: str, path: Path) -> list[Path]:
    """Files beside a road's configuration that it reads, too."""
    if job != "road":
        return []
    from jobs.chain import SECTIONS

    files = [path.parent / f"{section}.yaml" for section in SECTIONS]
    return [file for file in files if file.is_file()]


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
