"""`nexusgen generate PROMPT -o OUT.png`: one picture, without Ray."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from jobs.command import FORMATS, Outcome, add_model_arguments, check_output_file, find_model, main_of, write_picture

NAME = "generate"
HELP = "Draw a picture of a text."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PROMPT -o OUT.png and the options of models."""
    parser.add_argument("prompt", metavar="PROMPT", help="what to draw, in English or Chinese")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT.png", help="where the picture goes")
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Draw and write the picture. The same seed gives the same picture, here and over HTTP."""
    check_output_file(arguments.out, tuple(FORMATS))
    folder = find_model(arguments)
    import torch

    from nexusgen.model.weights import DRAWING_PARTS, load_model
    from nexusgen.sampling import generate_images

    torch.set_num_threads(1)  # as in a replica of `serve`; sums in another order would change last bits
    print(f"generate: model {folder}", file=sys.stderr, flush=True)
    model = load_model(folder, DRAWING_PARTS)
    started = time.monotonic()
    picture = generate_images(model, [arguments.prompt], [arguments.seed], arguments.steps, arguments.size)[0]
    seconds = time.monotonic() - started
    steps = arguments.steps or model.manifest.num_inference_steps
    made = {"fingerprint": model.manifest.fingerprint, "seed": arguments.seed, "steps": steps}
    write_picture(picture, arguments.out, made)
    data = {
        "out": str(arguments.out),
        **made,
        "size": [picture.height, picture.width],
        "model": str(folder),
        "seconds": seconds,
    }
    return Outcome(f"{arguments.out}: {picture.height}x{picture.width} pixels in {seconds:.1f} s", data)


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
