"""`nexusgen demo [--out DIR]`: the road with the shipped configuration, from nothing to a model that draws."""

from __future__ import annotations

import argparse
import json
import sys

from jobs import road
from jobs.command import DEFAULT_STORAGE, DEMO_CONFIGS, Outcome, add_json_argument, main_of

NAME = "demo"
HELP = "Run the whole road in the demo world; a quarter of an hour on two cores."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[--out DIR] [--json]."""
    parser.add_argument("--out", default=DEFAULT_STORAGE, metavar="DIR", help="storage folder (default: %(default)s)")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Walk the demo's road."""
    return road.walk(DEMO_CONFIGS / "road.yaml", [f"storage={json.dumps(arguments.out)}"])


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
