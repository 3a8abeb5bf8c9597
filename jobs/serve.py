"""`nexusgen serve CONFIG [key=value ...]`: until Ctrl-C."""

from __future__ import annotations

import argparse
import sys

from jobs.command import Outcome, add_config_arguments, main_of, read_config

NAME = "serve"
HELP = "Answer HTTP requests with a model, on Ray Serve, until Ctrl-C."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...], such as model=, host=, port=."""
    add_config_arguments(parser)
    parser.add_argument(
        "--write-serve-config",
        action="store_true",
        help="start nothing; print the application as YAML for `serve deploy` and KubeRay's serveConfigV2",
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Read the configuration and serve."""
    from pipelines.serve import ServeConfig, serve, serve_config

    config = read_config(ServeConfig, arguments)
    if arguments.write_serve_config:
        return Outcome(serve_config(config).rstrip("\n"))
    serve(config)
    return Outcome("")


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
