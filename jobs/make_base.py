"""`nexusgen make-base --out DIR`: train the tiny base that ships with the project anew."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.command import Outcome, add_json_argument, check_folder, main_of
from nexusgen.errors import InputError

NAME = "make-base"
HELP = "Train the tiny base model that ships with the project; about an hour on two cores."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--out DIR [--json]."""
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the new base, empty or absent"
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Train both halves and write the model folder."""
    check_folder(arguments.out)
    if any(arguments.out.iterdir()):
        raise InputError(f"--out {arguments.out} is not empty: choose another folder")
    from nexusgen.base_training import make_base
    from nexusgen.model.manifest import read_manifest

    make_base(arguments.out)
    manifest = read_manifest(arguments.out)
    data = {"model": str(arguments.out), "fingerprint": manifest.fingerprint, "parts": list(manifest.parts)}
    return Outcome(f"{arguments.out}: {', '.join(manifest.parts)}", data)


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
