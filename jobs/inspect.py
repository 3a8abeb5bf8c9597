"""`nexusgen inspect INPUT... [--json] [--report DIR]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.command import Outcome, add_json_argument, check_folder, main_of

NAME = "inspect"
HELP = "Read tar shards and say what is in them: tasks, languages, bad samples, size once embedded."
MAX_SHOWN = 20
MAX_NAMES_SHOWN = 8
MAX_GROUPS_SHOWN = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """INPUT... [--json] [--report DIR]."""
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="tar, glob, range {000..099}, folder, s3:// URI, or list"
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="also write inspect.json, inspect.txt, contact sheets, histograms and inspect.html there",
    )
    parser.add_argument(
        "--pairs-as",
        choices=("generation", "understanding"),
        default="generation",
        help="the task of images that come with a text only (default: %(default)s)",
    )
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Count, and write the report if one is asked for."""
    from pipelines.inspect import Shown, inspect

    if arguments.report is None:
        found = inspect(arguments.inputs, arguments.pairs_as)
        return Outcome(describe(found), found)
    from pipelines.report import write_report

    check_folder(arguments.report)
    shown: list[Shown] = []
    found = inspect(arguments.inputs, arguments.pairs_as, shown=shown)
    text = describe(found)
    files = write_report(arguments.report, found, text, shown)
    return Outcome(f"{text}\nreport: {', '.join(map(str, files))}", found)


def describe(found: Mapping[str, Any]) -> str:
    """What `inspect` found, for a person."""
    sizes, tokens, conventions = found["image_sizes"], found["text_tokens"], found["conventions"]
    lines = [
        f"{found['shards']} shards, {found['bytes'] / 1e6:.1f} MB, {found['samples']} samples, "
        f"{found['images']} images ({found['duplicate_images']} of them duplicates)",
        f"tasks: {_counts(found['by_task'])}",
        f"  editing with several references: {found['editing_multi_reference']}",
        f"languages: {_counts(found['by_language'])}",
        f"sources: {_counts(found['by_source'])}",
        f"licences: {_counts(found['by_licence'])}",
        f"image heights: {_spread(sizes['height'])} pixels; widths: {_spread(sizes['width'])}",
        f"text: {_spread(tokens)} tokens of {tokens['tokenizer']}'s tokenizer; "
        f"{_spread(found['text_characters'])} characters",
        f"embedded (mode vision, released sizes): about {found['embedded_bytes_estimate'] / 1e9:.2f} GB",
        f"conventions: {_counts(conventions['samples'])} samples; {_counts(conventions['shards'])} shards",
        *(f"  {odd['shard']} is {odd['convention']}" for odd in conventions["odd_shards"][:MAX_SHOWN]),
        f"duplicates: {found['duplicate_images']} images, {found['duplicate_samples']} samples",
    ]
    for kind, groups in found["duplicate_groups"].items():
        for group in groups[:MAX_GROUPS_SHOWN]:
            places = ", ".join(f"{place['shard'].rpartition('/')[2]} {place['key']}" for place in group["first"])
            lines.append(f"  {kind[:-1]} {group['count']} times: {places}")
    total = found["quarantined_total"]
    lines.append(f"quarantined: {total}")
    lines += [f"  {code}: {count}" for code, count in found["quarantined_by_code"].items()]
    for row in found["quarantined"][:MAX_SHOWN]:
        lines.append(f"  {row['shard']} {row['key']}: {row['reason_code']}: {row['reason']}")
    if total > MAX_SHOWN:
        num_listed = len(found["quarantined"])
        listed = "all" if num_listed == total else f"the first {num_listed:,}"
        lines.append(f"  ... {total - MAX_SHOWN} more; --json and the inspect.json of --report list {listed}")
    return "\n".join(lines)


def _counts(counts: Mapping[str, int]) -> str:
    """Names with their counts, the first few."""
    named = [f"{name} {count}" for name, count in list(counts.items())[:MAX_NAMES_SHOWN]]
    if len(counts) > MAX_NAMES_SHOWN:
        named.append(f"{len(counts) - MAX_NAMES_SHOWN} others")
    return ", ".join(named) or "none"


def _spread(spread: Mapping[str, Any]) -> str:
    return f"{spread['min']} to {spread['max']}, median {spread['median']:g}" if "min" in spread else "none"


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
