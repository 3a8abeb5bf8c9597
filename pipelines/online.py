"""Embeddings made while a training runs: pictures of embedded data's mode `images`, through the frozen vision tower.

For data whose embeddings are too many to be stored: at the released sizes 0.6 MB a target and up to 2.3 MB a picture
that is shown, against some 100 KB of the pictures themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from nexusgen.errors import InputError
from nexusgen.model.weights import VISION_TOWER, load_hollow
from nexusgen.schema import Message, Sample
from pipelines.encoders import VisionEncoder, encode_slice
from pipelines.parallel import fill_module

COLUMNS = ("key", "shard", "row", "task", "lang", "messages", "images")  # of mode images, that are read
BATCH_PATCHES = {"cpu": 2048, "cuda": 16384}  # of one forward of the tower; as `embed` is configured


class OnlineEncoder:
    """Makes rows of mode images into what rows of mode vision hold of them, by the tower of the model at a folder.

    Frozen, and outside what is trained: each rank has a tower of its own, in bf16 on a GPU and fp32 on a CPU, as
    `embed` computes. What shares a forward depends on the rows alone, so that a training repeats itself bit for bit.
    """

    def __init__(self, folder: Path, roles: Sequence[str], device: torch.device, num_threads: int = 1) -> None:
        """`roles` of mode vision are made; so many threads decode pictures. Raises: ModelError as `load_hollow`."""
        model, state = load_hollow(folder, "autoregressive")
        assert model.autoregressive is not None
        assert model.tokenizer is not None
        tower = model.autoregressive.qwen.model.visual
        of_tower = {name.removeprefix(VISION_TOWER): t for name, t in state.items() if name.startswith(VISION_TOWER)}
        fill_module(tower, of_tower, device)
        if device.type == "cpu":
            # torch's choice among fused kernels is one for the whole process, and the training thread changes it.
            tower.set_attn_implementation("eager")
        else:
            for parameter in tower.parameters():  # not the buffers: frequencies stay exact
                parameter.data = parameter.data.to(torch.bfloat16)
        tower.requires_grad_(False).eval()
        self._encoder = VisionEncoder(model.autoregressive, BATCH_PATCHES[device.type], tuple(roles))
        self._tokenizer, self._geometry = model.tokenizer, model.manifest.geometry
        self._num_threads = num_threads

    def encode(self, rows: pa.Table) -> pa.Table:
        """Rows of mode vision for rows of mode images (`COLUMNS`), in their order.

        Raises: InputError if a picture can't be read any more.
        """
        samples = [_sample(row) for row in rows.to_pylist()]
        made = encode_slice(samples, self._encoder, self._tokenizer, self._geometry, num_threads=self._num_threads)
        if made.rejected:
            first = made.rejected[0]
            raise InputError(
                f"sample {first.key} of {first.shard} could be read when it was embedded, but can't now: "
                f"{first.reason}; embed it again with mode=images by this version"
            )
        return made.table


def _sample(row: dict[str, Any]) -> Sample:
    return Sample(
        key=row["key"],
        shard=row["shard"],
        row=row["row"],
        task=row["task"],
        lang=row["lang"],
        messages=tuple(Message(message["role"], message["content"]) for message in row["messages"]),
        images=tuple(row["images"]),
    )
