"""`nexusgen describe IMAGE [-q TEXT]`: an answer about a picture, without Ray."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from jobs.command import Outcome, add_model_arguments, find_model, main_of, read_picture

NAME = "describe"
HELP = "Describe a picture, or answer a question about it."
DEFAULT_QUESTION = "Describe the picture."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IMAGE [-q TEXT] and the options of models; answers are greedy, so that seed, steps and size change nothing."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a picture's file")
    parser.add_argument("-q", "--question", default=DEFAULT_QUESTION, metavar="TEXT", help="(default: %(default)s)")
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> Outcome:
    """Ask the model."""
    image = read_picture(arguments.image)
    folder = find_model(arguments)
    import torch

    from nexusgen.model.weights import load_model
    from nexusgen.sampling import describe

    torch.set_num_threads(1)
    print(f"describe: model {folder}", file=sys.stderr, flush=True)
    model = load_model(folder, ["autoregressive"])
    started = time.monotonic()
    answer = describe(model, [image], [arguments.question])[0]
    result = {
        "answer": answer,
        "question": arguments.question,
        "model": str(folder),
        "fingerprint": model.manifest.fingerprint,
        "seconds": time.monotonic() - started,
    }
    return Outcome(answer, result)


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
