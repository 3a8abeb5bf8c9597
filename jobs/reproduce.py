"""`nexusgen reproduce NAME [--out DIR] [--seeds N] [key=value ...]`: the paper's claims, tried on the demo's model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.command import DEMO_CONFIGS, Outcome, add_json_argument, main_of, report_progress

if TYPE_CHECKING:
    from pipelines.reproduce import ReproduceConfig

NAME = "reproduce"
HELP = "Try a claim of the paper on the demo's model: arms, seeds, tables and figures."
EXPERIMENTS = ("prefill-ablation", "loss-weights", "decoder-inputs")
DEFAULT_OUT = "runs/reproduce"

# Sections of the configuration: the road's own.
_SECTIONS = ("pack", "embed_vision", "embed_latents", "train_ar", "train_generation_decoder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME [--out DIR] [--seeds N] [key=value ...] [--json]."""
    parser.add_argument("experiment", choices=EXPERIMENTS, metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replaces a key of jobs/configs/demo/reproduce.yaml"
    )
    parser.add_argument(
        "--out",
        default=DEFAULT_OUT,
        metavar="DIR",
        help="folder for data, trials and reports; experiments share it (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="trials of each arm (default: 3)")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Run the experiment, and write its report."""
    from pipelines.reproduce import reproduce
    from pipelines.trial_report import write_report

    overrides = [*arguments.overrides, f"storage={json.dumps(arguments.out)}"]
    if arguments.seeds is not None:
        overrides.append(f"num_seeds={arguments.seeds}")
    config = load_reproduction(DEMO_CONFIGS / "reproduce.yaml", overrides)
    result = reproduce(config, arguments.experiment)
    folder = Path(config.storage) / arguments.experiment
    report = write_report(config, result, folder)
    report_progress(f"{NAME}: {folder / 'report.md'}")
    return Outcome(report.text, report.to_json())


def load_reproduction(path: Path, overrides: list[str]) -> ReproduceConfig:
    """Read a configuration, whose sections are those of the demo's road. Raises: ConfigError as `read_sections`."""
    from jobs.chain import SECTIONS, read_sections
    from nexusgen.config import parse_config
    from pipelines.reproduce import ReproduceConfig

    values = read_sections(path, overrides, {name: SECTIONS[name] for name in _SECTIONS})
    return parse_config(ReproduceConfig, values, str(path))


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
