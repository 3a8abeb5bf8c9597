"""`nexusgen pack CONFIG [key=value ...]`."""

from __future__ import annotations

import argparse
import sys

from jobs.command import Outcome, add_config_arguments, add_json_argument, main_of, read_config, report_outcome

NAME = "pack"
HELP = "Pack samples into tar shards: of the demo world, or from jsonl, pictures with texts, or Parquet."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] [--json]."""
    add_config_arguments(parser)
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Read the configuration and run the job."""
    from pipelines.pack import PackConfig, pack

    return report_outcome(pack(read_config(PackConfig, arguments)))


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
