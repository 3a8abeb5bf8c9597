"""`nexusgen export MODEL --out DIR`: a model folder written back in the released layout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.command import Outcome, add_json_argument, main_of, report_progress

NAME = "export"
HELP = "Write a model folder in the layout of the released checkpoint, tensors byte for byte."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL --out DIR [--json]."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the files, empty or absent")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Export every part that the released layout has a place for."""
    from nexusgen.model.released import export_model

    files = export_model(arguments.model, arguments.out, report_progress)
    return Outcome(f"{arguments.out}: {', '.join(files)}", {"out": str(arguments.out), "files": files})


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
