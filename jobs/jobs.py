"""`nexusgen jobs list|logs ID|stop ID --address URL`: the jobs that were submitted to a cluster."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from jobs.command import EXIT_FAILED, Outcome, add_json_argument, format_table, main_of, report_progress
from jobs.submit import add_address_argument, describe, exit_code_of, follow

if TYPE_CHECKING:
    from pipelines.submit_api import JobApi, JobState

NAME = "jobs"
HELP = "List a cluster's jobs, show the log of one, or stop one."

STOP_POLL_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """list | logs ID [--follow] | stop ID, each with --address URL [--json]."""
    actions = parser.add_subparsers(dest="action", metavar="list|logs|stop", required=True)
    listing = actions.add_parser("list", help="all jobs that the cluster remembers, oldest first")
    logs = actions.add_parser("logs", help="what a job has printed")
    logs.add_argument("id", metavar="ID")
    logs.add_argument("--follow", action="store_true", help="until it ends; gives the job's exit code")
    stop = actions.add_parser("stop", help="tell a job to end, and wait until it has: a training saves first")
    stop.add_argument("id", metavar="ID")
    for action in (listing, logs, stop):
        add_address_argument(action)
        add_json_argument(action)


def run(arguments: argparse.Namespace) -> Outcome:
    """Do what is asked."""
    from pipelines.submit_api import JobApi

    api = JobApi(arguments.address)
    actions: dict[str, Callable[[JobApi, argparse.Namespace], Outcome]] = {"list": _list, "logs": _logs, "stop": _stop}
    return actions[arguments.action](api, arguments)


def _list(api: JobApi, arguments: argparse.Namespace) -> Outcome:
    states = api.jobs()
    rows = [[state.id, state.status.lower(), _time(state.started), _took(state), _code(state)] for state in states]
    table = format_table(["job", "status", "started (UTC)", "seconds", "exit code"], rows)
    return Outcome(table if states else f"no job was submitted to {api.url}", {"jobs": list(map(to_json, states))})


def _logs(api: JobApi, arguments: argparse.Namespace) -> Outcome:
    if not arguments.follow:
        text = api.logs(arguments.id)
        return Outcome(text.rstrip("\n"), {"id": arguments.id, "logs": text})
    state = follow(api, arguments.id)
    return Outcome(describe(state), to_json(state), exit_code_of(state))


def _stop(api: JobApi, arguments: argparse.Namespace) -> Outcome:
    from pipelines.submit import STOP_WAIT_S

    if api.stop(arguments.id):
        report_progress(f"jobs: {arguments.id} is told to end; it has {STOP_WAIT_S} s to save")
    deadline = time.monotonic() + 2 * STOP_WAIT_S
    while not (state := api.job(arguments.id)).is_over and time.monotonic() < deadline:
        time.sleep(STOP_POLL_S)
    if state.is_over:
        return Outcome(describe(state), to_json(state))
    return Outcome(f"job {state.id}: still {state.status} after {2 * STOP_WAIT_S} s", to_json(state), EXIT_FAILED)


def to_json(state: JobState) -> dict[str, object]:
    """What scripts get of a job."""
    return {
        "id": state.id,
        "status": state.status,
        "started": state.started,
        "ended": state.ended,
        "exit_code": exit_code_of(state) if state.is_over else None,
        **{name.removeprefix("nexusgen."): value for name, value in (state.metadata or {}).items()},
    }


def _time(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)) if seconds else ""


def _took(state: JobState) -> str:
    if state.started is None:
        return ""
    return f"{(state.ended or time.time()) - state.started:.0f}"


def _code(state: JobState) -> str:
    code = exit_code_of(state) if state.is_over else None
    return "" if code is None else str(code)


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
