"""Numeric proof of equality with the reference: runs every case recorded in a golden folder and compares.

A golden folder holds any of `ar/`, `gen_decoder/`, `edit_decoder/` (each with weights in the released layout, inputs
and recorded outputs); the folder may also be one of them itself. Tolerances are fixed in `comparison.py`, not in data.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from nexusgen.comparison import Case
from nexusgen.errors import InputError
from nexusgen.verify_autoregressive import verify_autoregressive
from nexusgen.verify_decoder import DECODER_FILES, verify_decoder


def verify(folder: Path) -> Iterator[Case]:
    """Run every case found in a golden folder, on one thread in fp32. Raises: InputError if it holds none."""
    torch.set_num_threads(1)
    found = False
    for candidate in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())) if folder.is_dir() else ():
        if any((candidate / name).is_file() for name in DECODER_FILES) and (candidate / "io.safetensors").is_file():
            cases = verify_decoder(candidate)
        elif (candidate / "config.json").is_file() and (candidate / "expected.json").is_file():
            cases = verify_autoregressive(candidate)
        else:
            continue
        found = True
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
