"""`nexusgen plan CONFIG --samples N --gpus NxKIND`: what a road will take, before it is walked."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from jobs.command import Outcome, add_config_arguments, add_json_argument, format_table, main_of, report_progress

if TYPE_CHECKING:
    from pipelines.plan import Plan

NAME = "plan"
HELP = "Tell a road's storage, hours, cost, bottleneck and checkpoint interval, with the formulas."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] --samples N --gpus NxKIND [--price USD] [--calibrate] [--json]."""
    add_config_arguments(parser)
    parser.add_argument("--samples", required=True, metavar="N", help="of the data, all tasks together")
    parser.add_argument("--gpus", required=True, metavar="NxKIND", help="like 8xH100; 1xCPU: this machine's cores")
    parser.add_argument("--price", metavar="USD_PER_GPU_HOUR", help="then costs are told, too")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="walk the road here with at most 10 %% of its samples, steps and items, and take the rates from that",
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Read the road, measure if asked to, and plan."""
    from jobs.chain import load_road
    from jobs.planning import check_devices, read_number, read_price, request_of, walk_small
    from pipelines.plan import make_plan
    from pipelines.plan_rates import parse_devices

    samples, price = read_number(arguments.samples), read_price(arguments.price)
    devices = parse_devices(arguments.gpus)
    check_devices(devices, is_calibrated=arguments.calibrate)
    road = load_road(arguments.config, arguments.overrides)
    request = request_of(road, samples, devices, price)
    calibrations = walk_small(road, samples, report_progress) if arguments.calibrate else None
    if calibrations is not None:
        from dataclasses import replace

        request = replace(request, calibrations=calibrations)
    plan = make_plan(request)
    return Outcome(describe(plan), plan.to_json())


def describe(plan: Plan) -> str:
    """The plan for a person: tables, and the formulas with their values."""
    request = plan.request
    shares = ", ".join(f"{name} {share:.1%}" for name, share in vars(request.shares).items())
    lines = [
        f"{request.samples:,} samples ({shares}; {request.shares_from}) on {request.devices}; "
        f"sizes of {request.sizes_from}",
        "",
        format_table(
            ("storage", "GB", "formula"),
            [(row.kind, f"{row.bytes / 1e9:,.2f}", row.formula) for row in plan.storage],
        ),
        f"all of it: {sum(row.bytes for row in plan.storage) / 1e12:,.3f} TB",
        "",
        format_table(
            ("job", "workers", "hours", "CPU s", "GPU hours", "USD"),
            [
                (
                    row.job,
                    str(row.workers),
                    "" if row.seconds is None else f"{row.seconds / 3600:,.3f}",
                    "" if row.cpu_seconds is None else f"{row.cpu_seconds:,.1f}",
                    "" if row.gpu_hours is None else f"{row.gpu_hours:,.1f}",
                    "" if row.cost_usd is None else f"{row.cost_usd:,.0f}",
                )
                for row in plan.jobs
            ],
        ),
        *(f"  {row.job}: {row.formula}" for row in plan.jobs),
        "",
        f"bottleneck: {plan.bottleneck}",
        *(f"workers of {job}: {told}" for job, told in plan.workers.items()),
        f"stored or online embeddings of stage ar: {plan.online['formula']}",
    ]
    for stage, found in plan.goodput.items():
        lines.append(
            f"checkpoints of {stage}: {found['formula']}; goodput {found['goodput']:.2%} there, "
            f"{found['configured_goodput']:.2%} with checkpoint_every={found['configured_checkpoint_every']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
