"""`nexusgen register CONFIG [key=value ...]`."""

from __future__ import annotations

import argparse
import sys

from jobs.command import Outcome, add_config_arguments, add_json_argument, main_of, read_config, report_outcome

NAME = "register"
HELP = "Make a version of the registered model from trained checkpoints."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] [--json]."""
    add_config_arguments(parser)
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Read the configuration and run the job."""
    from pipelines.register import RegisterConfig, register

    return report_outcome(register(read_config(RegisterConfig, arguments)))


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
