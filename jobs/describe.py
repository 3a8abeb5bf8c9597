"""`nexusgen describe IMAGE [-q TEXT]`: an answer about a picture, without Ray."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from jobs.command import Outcome, add_model_arguments, find_model, main_of, open_model, read_picture

NAME = "describe"
HELP = "Describe a picture, or answer a question about it."
DEFAULT_QUESTION = "Describe the picture."
MAX_NEW_TOKENS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IMAGE [-q TEXT] and the options of models; answers are greedy, so that seed, steps and size change nothing."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a picture's file")
    parser.add_argument("-q", "--question", default=DEFAULT_QUESTION, metavar="TEXT", help="(default: %(default)s)")
    add_model_arguments(parser, draws=False)


def run(arguments: argparse.Namespace) -> Outcome:
    """Ask the model; without --json its answer is printed as it comes."""
    image = read_picture(arguments.image)
    folder = find_model(arguments)
    from nexusgen.replies import Reply, SamplingParams
    from nexusgen.sampling import question_messages, respond

    model = open_model(arguments, folder, ["autoregressive"])
    started = time.monotonic()
    params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS)
    pieces = respond(model, question_messages(arguments.question), [image], params)
    answer, reply = "", Reply()

    def texts() -> Iterator[str]:
        nonlocal reply
        for piece in pieces:
            reply = piece.reply or reply
            yield piece.text

    for text in _stripped(texts()):
        answer += text
        if not arguments.json:
            print(text, end="", flush=True)
    result = {
        "answer": answer,
        "finish_reason": reply.finish_reason,  # "stop", or "length" if the answer was cut off
        "question": arguments.question,
        "model": str(folder),
        "fingerprint": model.manifest.fingerprint,
        "seconds": time.monotonic() - started,
    }
    if not arguments.json:
        print()
    return Outcome("", result)


def _stripped(texts: Iterator[str]) -> Iterator[str]:
    """The texts joined, without space at both ends, as soon as that is certain."""
    held, has_begun = "", False
    for text in texts:
        held += text
        certain = held.rstrip()
        if certain:
            yield certain if has_begun else certain.lstrip()
            has_begun = True
            held = held[len(certain) :]


if __name__ == "__main__":
    sys.exit(main_of(sys.modules[__name__]))
