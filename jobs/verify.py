"""`nexusgen verify GOLDEN_DIR [--json]`: numbers against those recorded from the reference implementation."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path

from jobs.command import EXIT_DONE, EXIT_FAILED, Outcome, add_json_argument, main_of

NAME = "verify"
HELP = "Compare the model's mathematics with numbers recorded from the reference implementation."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """GOLDEN_DIR [--json]."""
    parser.add_argument("folder", type=Path, metavar="GOLDEN_DIR", help="such as tests/golden")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Run every case; the lines appear on standard error as they come with --json, else on standard output."""
    from nexusgen.verify import verify

    cases = []
    for case in verify(arguments.folder):
        cases.append(case)
        relative = "NaN" if math.isnan(case.max_rel) else f"{case.max_rel:.2e}"
        line = f"{'ok  ' if case.passed else 'FAIL'} {relative:>9}  <= {case.tolerance:.0e}  {case.name}"
        print(line, flush=True)
    failed = [case.name for case in cases if not case.passed]
    worst = max((c.max_rel / c.tolerance for c in cases if c.passed and c.tolerance), default=0.0)
    text = (
        f"{len(cases) - len(failed)} of {len(cases)} tensors agree; the closest call used {worst:.0%} of its tolerance"
    )
    if failed:
        text += f"; FAILED: {', '.join(failed[:10])}" + (" ..." if len(failed) > 10 else "")
    data = {"passed": not failed, "cases": [asdict(case) for case in cases]}
    return Outcome(text, data, EXIT_FAILED if failed else EXIT_DONE)


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
