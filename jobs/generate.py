"""`nexusgen generate PROMPT -o OUT.png`: one picture, without Ray."""

from __future__ import annotations

import argparse
import sys

from jobs.command import (
    FORMATS,
    Outcome,
    add_drawing_arguments,
    add_model_arguments,
    check_output_file,
    draw_picture,
    find_model,
    main_of,
)

NAME = "generate"
HELP = "Draw a picture of a text."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PROMPT -o OUT.png and the options of models."""
    parser.add_argument("prompt", metavar="PROMPT", help="what to draw, in English or Chinese")
    add_model_arguments(parser)
    add_drawing_arguments(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Draw and write the picture. The same seed gives the same picture, here and over HTTP."""
    check_output_file(arguments.out, tuple(FORMATS))
    folder = find_model(arguments)
    from nexusgen.model.weights import DRAWING_PARTS
    from nexusgen.sampling import check_prompt, generate_images

    check_prompt(arguments.prompt)
    return draw_picture(
        arguments,
        folder,
        DRAWING_PARTS,
        lambda model: generate_images(model, [arguments.prompt], [arguments.seed], arguments.steps, arguments.size)[0],
    )


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
