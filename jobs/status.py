"""`nexusgen status [--storage URI] [--endpoint URL] [--json]`: where a project stands."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from jobs.command import DEFAULT_STORAGE, Outcome, add_json_argument, format_table, main_of

if TYPE_CHECKING:
    from pipelines.status import EmbeddedStatus, Status, TrainingStatus

NAME = "status"
HELP = "Tell how far a storage's jobs are, which versions there are, and what is served."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[--storage URI] [--endpoint URL] [--json]."""
    parser.add_argument(
        "--storage", metavar="URI", default=DEFAULT_STORAGE, help="folder or s3:// URI (default: %(default)s)"
    )
    parser.add_argument("--endpoint", metavar="URL", default="", help="a server of `nexusgen serve`, to be asked too")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Look and tell."""
    from pipelines.status import read_status

    status = read_status(arguments.storage, arguments.endpoint)
    return Outcome(describe(status), status.to_json())


def describe(status: Status) -> str:
    """The tables, and what couldn't be asked."""
    lines = [f"storage {status.storage}: {', '.join(status.projects) or 'nothing yet'}"]
    if status.embedded:
        header = ["embedded", "slices", "samples", "in quarantine"]
        lines += ["", format_table(header, list(map(_embedded_row, status.embedded)))]
    if status.trainings:
        header = ["training", "", "step", "last checkpoint"]
        lines += ["", format_table(header, list(map(_training_row, status.trainings)))]
        lines += [f"{one.name} {one.stage}: {one.note}" for one in status.trainings if one.note]
    if status.models:
        rows = [[name, ", ".join(status.evaluations.get(name, ())) or "none"] for name in status.models]
        lines += ["", format_table(["model folder", "evaluations"], rows)]
    lines += [
        "",
        f"MLflow {status.tracking}".rstrip() + (f": {status.tracking_error}" if status.tracking_error else ""),
    ]
    if status.versions:
        rows = [[str(v.version), v.fingerprint, v.project, ", ".join(v.aliases), v.gate[:60]] for v in status.versions]
        lines += [format_table(["version", "model folder", "project", "aliases", "gate"], rows)]
    if status.runs:
        rows = [
            [r.run, r.project, r.status.lower(), _time(r.started), r.note.splitlines()[0][:60] if r.note else ""]
            for r in status.runs
        ]
        lines += ["", format_table(["run", "project", "status", "started (UTC)", "why"], rows)]
    if status.endpoint_error:
        lines += ["", f"endpoint {status.endpoint}: {status.endpoint_error}"]
    elif status.serving:
        refused = f", refused: {status.serving['refused']}" if status.serving.get("refused") else ""
        served = f"version {status.serving.get('version')} ({status.serving.get('fingerprint')})"
        lines += ["", f"endpoint {status.endpoint}: serves {status.serving.get('model')}, {served}{refused}"]
    return "\n".join(lines)


def _embedded_row(one: EmbeddedStatus) -> list[str]:
    if one.quarantine_rate is None:
        return [f"{one.name} {one.mode}", f"{one.slices} so far", "", ""]
    share = f"{one.quarantined} ({one.quarantine_rate:.2%})"
    return [f"{one.name} {one.mode}", str(one.slices), str(one.embedded), share]


def _training_row(one: TrainingStatus) -> list[str]:
    step = f"{one.step}/{one.num_steps}" if one.num_steps is not None else str(one.step)
    is_aged = one.state == "silent" and one.age_s is not None
    state = f"silent for {one.age_s:.0f} s" if is_aged else one.state
    return [f"{one.name} {one.stage}", state, step, str(one.checkpoint_step) if one.checkpoint else "none"]


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
