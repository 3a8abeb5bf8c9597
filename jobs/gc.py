"""`nexusgen gc [--dry-run]`: list what nobody needs in a storage, and delete it."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from typing import TYPE_CHECKING

from jobs.command import DEFAULT_STORAGE, Outcome, add_json_argument, format_table, main_of, report_progress
from nexusgen.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.housekeeping import Found

NAME = "gc"
HELP = "List and delete what nobody needs: orphaned slices, checkpoints, models without an alias, half-written folders."
UNITS = {"m": 60, "h": 3600, "d": 86400}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[--storage URI] [--older-than AGE] [--dry-run] [--json]."""
    parser.add_argument("--storage", metavar="URI", default=DEFAULT_STORAGE, help="what to tidy (default: %(default)s)")
    parser.add_argument(
        "--older-than",
        metavar="AGE",
        default="24h",
        help="leave alone what was written since, like 90m, 24h or 7d; longer than a job may be silent, so that those "
        "under way are safe (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="list it and delete nothing")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """List, and delete if asked to."""
    from pipelines.housekeeping import delete_garbage, find_garbage

    found = find_garbage(arguments.storage, parse_age(arguments.older_than))
    table = describe(found)
    data = {"dry_run": arguments.dry_run, "found": [one.to_json() for one in found]}
    num_bytes = sum(one.num_bytes for one in found)
    if arguments.dry_run or not found:
        return Outcome(table, data | {"bytes": num_bytes, "freed": 0})
    report_progress(table)
    freed = delete_garbage(arguments.storage, found)
    return Outcome(f"{table}\nfreed: {freed / 1e9:,.3f} GB", data | {"bytes": num_bytes, "freed": freed})


def parse_age(text: str) -> float:
    """Seconds of an age like 90m, 24h or 7d. Raises: UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd])", text)
    if match is None:
        raise UsageError(f"--older-than {text}: wanted a number of minutes, hours or days, like 90m, 24h or 7d")
    return float(match[1]) * UNITS[match[2]]


def describe(found: Sequence[Found]) -> str:
    """A line for each, and the sum by kind."""
    if not found:
        return "nothing that nobody needs"
    rows = [(one.uri, one.kind, f"{one.num_bytes / 1e6:,.1f}", one.reason) for one in found]
    sizes = Counter[str]()
    for one in found:
        sizes[one.kind] += one.num_bytes
    sums = ", ".join(f"{kind} {size / 1e9:,.3f} GB" for kind, size in sorted(sizes.items()))
    return f"{format_table(('what', 'kind', 'MB', 'why'), rows)}\n{len(found)} in all: {sums}"


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
