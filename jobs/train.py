"""`nexusgen train CONFIG [key=value ...]`."""

from __future__ import annotations

import argparse
import sys

from jobs.command import (
    Outcome,
    add_config_arguments,
    add_json_argument,
    format_table,
    main_of,
    read_config,
    report_outcome,
)

NAME = "train"
HELP = "Train one stage on Ray Train workers."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] [--json]."""
    add_config_arguments(parser)
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Read the configuration and run the job, or tell what it would take (dry_run=true)."""
    from pipelines.train import TrainConfig, train
    from pipelines.train_plan import plan_training

    config = read_config(TrainConfig, arguments)
    if config.dry_run:
        plan = plan_training(config)
        return Outcome(format_table([f"train {config.stage}", ""], plan.rows()), plan.to_json())
    return report_outcome(train(config))


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
