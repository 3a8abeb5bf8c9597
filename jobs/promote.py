"""`nexusgen promote VERSION [--to ALIAS]`, `nexusgen promote --rollback`."""

from __future__ import annotations

import argparse
import sys

from jobs.command import DEFAULT_STORAGE, Outcome, add_json_argument, main_of, report_outcome

NAME = "promote"
HELP = "Move an alias to a version that passes its gate, or back."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """VERSION [--to ALIAS] [--rollback] [--storage URI] [--json]."""
    parser.add_argument("version", type=int, nargs="?", metavar="VERSION", help="number of a registered version")
    parser.add_argument("--to", choices=("candidate", "champion"), default="champion", help="(default: %(default)s)")
    parser.add_argument("--rollback", action="store_true", help="return to the alias's last target")
    parser.add_argument(
        "--storage", metavar="URI", default=DEFAULT_STORAGE, help="where the model is registered (default: %(default)s)"
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Ask the gate and move the alias."""
    from pipelines.promote import PromoteConfig, promote

    return report_outcome(
        promote(
            PromoteConfig(
                storage=arguments.storage, version=arguments.version, to=arguments.to, rollback=arguments.rollback
            )
        )
    )


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
