"""`nexusgen edit IMAGE INSTRUCTION -o OUT.png`: a picture changed as a text says, without Ray."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from jobs.command import (
    FORMATS,
    Outcome,
    add_model_arguments,
    check_output_file,
    find_model,
    main_of,
    read_picture,
    write_picture,
)

NAME = "edit"
HELP = "Change a picture as a text says."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IMAGE INSTRUCTION -o OUT.png [--decoder editing|generation] and the options of models."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a picture's file")
    parser.add_argument("instruction", metavar="INSTRUCTION", help="what to change, in English or Chinese")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT.png", help="where the picture goes")
    parser.add_argument(
        "--decoder",
        choices=("editing", "generation"),
        default="editing",
        help="which decoder draws: editing sees the original, generation the prediction alone (default: %(default)s)",
    )
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Edit and write the picture. The same seed gives the same picture."""
    check_output_file(arguments.out, tuple(FORMATS))
    image = read_picture(arguments.image)
    folder = find_model(arguments)
    import torch

    from nexusgen.errors import ModelError
    from nexusgen.model.weights import load_model, read_manifest
    from nexusgen.sampling import edit_images

    part = f"{arguments.decoder}_decoder"
    manifest = read_manifest(folder)
    if part not in manifest.parts:
        raise ModelError(
            f"{folder} has no {part}; it holds {', '.join(manifest.parts)}: use a model that has one, or "
            f"--decoder {'generation' if arguments.decoder == 'editing' else 'editing'}"
        )
    torch.set_num_threads(1)
    print(f"edit: model {folder}", file=sys.stderr, flush=True)
    model = load_model(folder, ["autoregressive", part, "vae"])
    started = time.monotonic()
    picture = edit_images(
        model, [image], [arguments.instruction], [arguments.seed], arguments.steps, arguments.size, arguments.decoder
    )[0]
    seconds = time.monotonic() - started
    steps = arguments.steps or manifest.num_inference_steps
    made = {"fingerprint": manifest.fingerprint, "seed": arguments.seed, "steps": steps}
    write_picture(picture, arguments.out, made)
    data = {
        "out": str(arguments.out),
        **made,
        "decoder": arguments.decoder,
        "size": [picture.height, picture.width],
        "model": str(folder),
        "seconds": seconds,
    }
    return Outcome(f"{arguments.out}: {picture.height}x{picture.width} pixels in {seconds:.1f} s", data)


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
