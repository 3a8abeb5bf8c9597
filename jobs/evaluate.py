"""`nexusgen evaluate CONFIG [key=value ...] [--against MODEL]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jobs.command import Outcome, add_config_arguments, add_json_argument, format_table, main_of, read_config

if TYPE_CHECKING:
    from pipelines.runtime import JobReport

NAME = "evaluate"
HELP = "Score a model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] [--against MODEL] [--json]."""
    add_config_arguments(parser)
    parser.add_argument(
        "--against",
        metavar="MODEL",
        help="compare with another model item by item, as with against=MODEL: models:/nexusgen@champion or a folder",
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Read the configuration and run the job."""
    from pipelines.evaluate import EvaluateConfig, evaluate

    if arguments.against is not None:
        arguments.overrides.append(f"against={json.dumps(arguments.against)}")
    report = evaluate(read_config(EvaluateConfig, arguments))
    return Outcome(describe(report), report.to_json())


def describe(report: JobReport) -> str:
    """A table for each suite: every score with its interval and n and, compared, the paired difference with its own."""
    outputs = report.outputs
    against = outputs.get("against")
    first = f"evaluate: {'re-used' if report.reused else 'done'} in {report.seconds:.1f} s, {report.samples} items"
    lines = [first, f"  model {outputs['model']} ({outputs['fingerprint']})"]
    if against is not None:
        lines += [f"  against {against['model']} ({against['fingerprint']}), on the same items"]
    for (suite, scores), folder in zip(outputs["scores"].items(), outputs["sheets"], strict=True):
        found = against["differences"][suite] if against is not None else None
        lines += ["", _table(suite, scores, outputs["intervals"][suite], found), f"  {folder}"]
    if against is not None:
        lines += ["", "* differs beyond chance: the 95 % interval of the paired differences leaves out 0"]
    return "\n".join(lines)


def _table(
    suite: str, scores: Mapping[str, Any], intervals: Mapping[str, Any], differences: Mapping[str, Any] | None
) -> str:
    header = [suite, "score", "95 % interval", "n"]
    rows = []
    for name, value in _flatten(scores):
        interval = intervals.get(name)
        row = [name, f"{value:.3f}", *(("", "") if interval is None else (_bounds(interval), str(interval["n"])))]
        if differences is not None:
            row += _difference(differences.get(name))
        rows.append(row)
    return format_table(header + (["difference", "95 % interval  "] if differences is not None else []), rows)


def _bounds(interval: Mapping[str, Any], sign: str = "") -> str:
    return f"{interval['low']:{sign}.3f} to {interval['high']:{sign}.3f}"


def _difference(interval: Mapping[str, Any] | None) -> list[str]:
    if interval is None:
        return ["", ""]
    is_sure = interval["low"] > 0 or interval["high"] < 0
    return [f"{interval['value']:+.3f}", f"{_bounds(interval, '+')} {'*' if is_sure else ' '}"]


def _flatten(scores: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Scores under flat names; `n`, the number of items, stands in the first line."""
    for name, value in scores.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        elif prefix + name != "n":
            yield prefix + name, float(value)


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
