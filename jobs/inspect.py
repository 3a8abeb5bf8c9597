"""`nexusgen inspect INPUT... [--json] [--report DIR]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.command import Outcome, add_json_argument, check_folder, main_of

NAME = "inspect"
HELP = "Read tar shards and say what is in them: tasks, languages, bad samples, size once embedded."
MAX_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """INPUT... [--json] [--report DIR]."""
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="tar, glob, range {000..099}, folder, s3:// URI, or list"
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="also write inspect.json and inspect.txt there")
    parser.add_argument(
        "--pairs-as",
        choices=("generation", "understanding"),
        default="generation",
        help="the task of images that come with a text only (default: %(default)s)",
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Count, and write the report if one is asked for."""
    from pipelines.inspect import inspect

    if arguments.report is not None:
        check_folder(arguments.report)
    found = inspect(arguments.inputs, arguments.pairs_as)
    text = _describe(found)
    if arguments.report is not None:
        (arguments.report / "inspect.json").write_text(json.dumps(found, indent=2, ensure_ascii=False), "utf-8")
        (arguments.report / "inspect.txt").write_text(text + "\n", "utf-8")
    return Outcome(text, found)


def _describe(found: Mapping[str, Any]) -> str:
    lines = [
        f"{found['shards']} shards, {found['bytes'] / 1e6:.1f} MB, {found['samples']} samples, "
        f"{found['images']} images ({found['duplicate_images']} of them duplicates)",
        "tasks: " + ", ".join(f"{task} {count}" for task, count in found["by_task"].items()),
        f"  editing with several references: {found['editing_multi_reference']}",
        "languages: " + ", ".join(f"{lang} {count}" for lang, count in found["by_language"].items()),
        f"embedded (mode vision, released sizes): about {found['embedded_bytes_estimate'] / 1e9:.2f} GB",
        f"quarantined: {len(found['quarantined'])}",
        *(f"  {code}: {count}" for code, count in found["quarantined_by_code"].items()),
    ]
    for row in found["quarantined"][:MAX_SHOWN]:
        lines.append(f"  {row['shard']} {row['key']}: {row['reason_code']}: {row['reason']}")
    if len(found["quarantined"]) > MAX_SHOWN:
        lines.append(f"  ... {len(found['quarantined']) - MAX_SHOWN} more; --json or --report give all")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
