"""Numeric proof of equality with the reference: runs every case recorded in a golden folder and compares.

A golden folder holds any of `ar/`, `gen_decoder/`, `edit_decoder/` (each with weights in the released layout, inputs
and recorded outputs); the folder may also be one of them itself. Tolerances are fixed in `comparison.py`, not in data.

Files may be absent, and tensors of a decoder's `io.safetensors`: the cases that they would give are skipped, and said
to be. What is there is compared; whatever is there and can't be, a tensor of an unknown name say, is a case that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from nexusgen.comparison import Case, not_compared, say_nothing
from nexusgen.errors import InputError
from nexusgen.verify_autoregressive import verify_autoregressive
from nexusgen.verify_decoder import DECODER_FILES, verify_decoder


def verify(folder: Path, skipped: Callable[[str], None] = say_nothing) -> Iterator[Case]:
    """Run every case found in a golden folder, on one thread in fp32. `skipped` is told which named cases lack files.

    Raises: InputError if there is no set, or one without a case, or its `expected.json` can't be used; ModelError for
    weights that can't be loaded or a file of tensors that is damaged.
    """
    torch.set_num_threads(1)
    found = False
    for candidate in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())) if folder.is_dir() else ():
        missing = _missing(candidate)
        if missing is None:
            continue
        found = True
        if missing:
            yield not_compared(candidate.name, f"the set lacks {missing}")
            continue
        is_decoder = any((candidate / name).is_file() for name in DECODER_FILES)
        cases = verify_decoder(candidate, skipped) if is_decoder else verify_autoregressive(candidate, skipped)
        case = None
        for case in cases:
            yield case
        if case is None:
            raise InputError(f"{candidate} is a golden set without a recorded case: nothing was compared")
    if not found:
        raise InputError(
            f"{folder}: no golden set found; expected a folder with config.json and expected.json (autoregressive) or "
            "generation_decoder.bin or edit_decoder.bin with io.safetensors (decoder), or a folder of such folders"
        )


def _missing(folder: Path) -> str | None:
    """What a golden set lacks to be run, "" if nothing; None for a folder that is no golden set."""
    has_weights = any((folder / name).is_file() for name in DECODER_FILES)
    has_inputs = (folder / "io.safetensors").is_file()
    has_expected = (folder / "expected.json").is_file()
    if has_weights or has_inputs:
        wanted = {" or ".join(DECODER_FILES): has_weights, "io.safetensors": has_inputs, "expected.json": has_expected}
    elif has_expected or any(folder.glob("train_*.safetensors")) or any(folder.glob("gen_*.safetensors")):
        wanted = {"config.json": (folder / "config.json").is_file(), "expected.json": has_expected}
    else:
        return None
    return " and ".join(name for name, is_there in wanted.items() if not is_there)
