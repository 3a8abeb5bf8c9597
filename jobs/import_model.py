"""`nexusgen import --autoregressive DIR ... --out MODEL`: a model folder from the released checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.command import Outcome, add_json_argument, main_of, report_progress
from nexusgen.errors import UsageError

NAME = "import"
HELP = "Make a model folder from the released checkpoint, or from Qwen2.5-VL and FLUX.1-dev to train from scratch."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[--autoregressive DIR] [--generation-decoder FILE] [--editing-decoder FILE] [--flux DIR] --out MODEL [--json]."""
    parser.add_argument(
        "--autoregressive", type=Path, metavar="DIR", help="Nexus-Gen's or Qwen2.5-VL's config and safetensors"
    )
    parser.add_argument("--generation-decoder", type=Path, metavar="FILE", help="generation_decoder.bin")
    parser.add_argument("--editing-decoder", type=Path, metavar="FILE", help="edit_decoder.bin")
    parser.add_argument("--flux", type=Path, metavar="DIR", help="FLUX.1-dev in its original or diffusers' layout")
    parser.add_argument("--out", type=Path, required=True, metavar="MODEL", help="the model folder, empty or absent")
    add_json_argument(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Import what is given; says what it made up, assumed or didn't find."""
    names = ("autoregressive", "generation_decoder", "editing_decoder", "flux")
    sources = {name: getattr(arguments, name) for name in names}
    if not any(sources.values()):
        raise UsageError("nothing to import: give --autoregressive, --generation-decoder, --editing-decoder or --flux")
    from nexusgen.model.released import import_model

    manifest = import_model(arguments.out, **sources, progress=report_progress)
    lines = [f"{arguments.out}: {', '.join(manifest.parts)}"]
    remarks = {name: manifest.lineage.get(name, []) for name in ("initialised", "assumed", "lacks")}
    lines += [f"  {name}: {text}" for name, texts in remarks.items() for text in texts]
    data = {"model": str(arguments.out), "fingerprint": manifest.fingerprint, "parts": list(manifest.parts), **remarks}
    return Outcome("\n".join(lines), data)


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
