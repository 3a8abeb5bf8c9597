"""`nexusgen embed CONFIG [key=value ...]`."""

from __future__ import annotations

import argparse
import sys

from jobs.command import Outcome, add_config_arguments, add_json_argument, main_of, read_config, report_outcome

NAME = "embed"
HELP = "Turn tar shards into embeddings or latents, on Ray Data."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] [--json]."""
    add_config_arguments(parser)
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Read the configuration and run the job."""
    from pipelines.embed import EmbedConfig, embed

    return report_outcome(embed(read_config(EmbedConfig, arguments)))


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
