"""`nexusgen verify GOLDEN_DIR [--json]`: numbers against those recorded from the reference implementation."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.command import EXIT_DONE, EXIT_FAILED, Outcome, add_json_argument, main_of

if TYPE_CHECKING:
    from nexusgen.comparison import Case

NAME = "verify"
HELP = "Compare the model's mathematics with numbers recorded from the reference implementation."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """GOLDEN_DIR [--json]."""
    parser.add_argument("folder", type=Path, metavar="GOLDEN_DIR", help="such as tests/golden")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Run every case; the lines appear on standard error as they come with --json, else on standard output.

    Cases that `expected.json` names and the set doesn't hold are named as skipped; they fail nothing.
    """
    from nexusgen.verify import verify

    cases: list[Case] = []
    skipped: list[str] = []
    for case in verify(arguments.folder, skipped.append):
        cases.append(case)
        relative = "NaN" if math.isnan(case.max_rel) else f"{case.max_rel:.2e}"
        line = f"{'ok  ' if case.passed else 'FAIL'} {relative:>9}  <= {case.tolerance:.0e}  {case.name}"
        print(line, flush=True)
    for case_name in skipped:
        print(f"skip  {case_name}", flush=True)
    failed = [case.name for case in cases if not case.passed]
    worst = max((c.max_rel / c.tolerance for c in cases if c.passed and c.tolerance), default=0.0)
    text = (
        f"{len(cases) - len(failed)} of {len(cases)} tensors agree; the closest call used {worst:.0%} of its tolerance"
    )
    if skipped:
        text += f"; {len(skipped)} named cases aren't in the set"
    if failed:
        text += f"; FAILED: {', '.join(failed[:10])}" + (" ..." if len(failed) > 10 else "")
    data = {"passed": not failed, "cases": [asdict(case) for case in cases], "skipped": skipped}
    return Outcome(text, data, EXIT_FAILED if failed else EXIT_DONE)


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
