"""`nexusgen edit IMAGE INSTRUCTION -o OUT.png`: a picture changed as a text says, without Ray."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.command import (
    FORMATS,
    Outcome,
    add_drawing_arguments,
    add_model_arguments,
    check_output_file,
    draw_picture,
    find_model,
    main_of,
    read_picture,
)

NAME = "edit"
HELP = "Change a picture as a text says."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IMAGE INSTRUCTION -o OUT.png [--decoder editing|generation] and the options of models."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a picture's file")
    parser.add_argument("instruction", metavar="INSTRUCTION", help="what to change, in English or Chinese")
    parser.add_argument(
        "--decoder",
        choices=("editing", "generation"),
        default="editing",
        help="which decoder draws: editing sees the original, generation the prediction alone (default: %(default)s)",
    )
    add_model_arguments(parser)
    add_drawing_arguments(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Edit and write the picture. The same seed gives the same picture."""
    check_output_file(arguments.out, tuple(FORMATS))
    image = read_picture(arguments.image)
    folder = find_model(arguments)
    from nexusgen.errors import ModelError
    from nexusgen.model.manifest import read_manifest
    from nexusgen.sampling import check_instruction, edit_images

    check_instruction(arguments.instruction)
    part = f"{arguments.decoder}_decoder"
    manifest = read_manifest(folder)
    if part not in manifest.parts:
        other = "generation" if arguments.decoder == "editing" else "editing"
        way = f", or --decoder {other}" if f"{other}_decoder" in manifest.parts else ""
        raise ModelError(
            f"{folder} has no {part}; it holds {', '.join(manifest.parts) or 'nothing'}: use a model that has one{way}"
        )
    return draw_picture(
        arguments,
        folder,
        ["autoregressive", part, "vae"],
        lambda model: edit_images(
            model,
            [image],
            [arguments.instruction],
            [arguments.seed],
            arguments.steps,
            arguments.size,
            arguments.decoder,
        )[0],
        {"decoder": arguments.decoder},
    )


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
