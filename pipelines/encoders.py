"""From a slice of compressed samples to a table of embedded rows: what an encoder actor computes, without Ray.

An image is decoded once for all roles that need it; equal images of a slice are encoded once. What shares a batch
depends on the slice alone, never on timing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from nexusgen.errors import SampleError
from nexusgen.images import Geometry, crop_image, decode_image, image_for_role, input_size, to_patches, to_pixels
from nexusgen.model.autoencoder import ImageAutoencoder, encode_latents
from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.prompts import encode_conversation, image_roles
from nexusgen.schema import QuarantineRow, Sample, embedded_schema
from pipelines.embedded import encode_array

DTYPE = "bfloat16"
ROLES_OF_SPEAKER = {"user": ("input",), "assistant": ("target", "crop"), "system": ()}
LATENTS_ROLE = "latents"


@dataclass(frozen=True)
class Entry:
    """One encoded image: its grid (h, w), in tokens or latent pixels, and the bytes of its array."""

    grid: tuple[int, int]
    data: bytes


class Encoder(Protocol):
    """Turns pictures of a role's size into entries; `roles_of` says which roles an image has by its speaker."""

    roles: tuple[str, ...]

    def roles_of(self, speaker: str) -> tuple[str, ...]: ...

    def resize(self, image: Image.Image, role: str) -> Image.Image: ...

    def encode(self, images: Sequence[Image.Image]) -> list[Entry]: ...


class VisionEncoder:
    """The vision tower of an autoregressive model: roles `input`, `target` and `crop`; entries [h * w, hidden]."""

    roles: tuple[str, ...] = ("input", "target", "crop")

    def __init__(self, model: AutoregressiveModel, max_patches: int) -> None:
        self.model = model
        self.geometry = model.geometry
        self.max_patches = max_patches

    def roles_of(self, speaker: str) -> tuple[str, ...]:
        return ROLES_OF_SPEAKER[speaker]

    def resize(self, image: Image.Image, role: str) -> Image.Image:
        return image_for_role(image, role, self.geometry)

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> list[Entry]:
        entries: list[Entry] = []
        device = next(self.model.parameters()).device
        patch, merge = self.geometry.patch_size, self.geometry.merge_size
        for batch in _batches(images, [image.width * image.height // patch**2 for image in images], self.max_patches):
            patches, grid_thw = to_patches(batch, self.geometry)
            embeddings = self.model.encode_images(patches.to(device), grid_thw.to(device))
            grids = [(int(h) // merge, int(w) // merge) for _, h, w in grid_thw.tolist()]
            parts = embeddings.split([h * w for h, w in grids])
            entries += [Entry(grid, encode_array(part, DTYPE)) for grid, part in zip(grids, parts, strict=True)]
        return entries


class LatentEncoder:
    """The autoencoder of the decoders: role `latents` of the assistant's images; entries [channels, h, w]."""

    roles: tuple[str, ...] = (LATENTS_ROLE,)

    def __init__(self, autoencoder: ImageAutoencoder, image_size: tuple[int, int], max_pixels: int) -> None:
        self.autoencoder = autoencoder
        self.image_size = image_size
        self.max_pixels = max_pixels

    def roles_of(self, speaker: str) -> tuple[str, ...]:
        return (LATENTS_ROLE,) if speaker == "assistant" else ()

    def resize(self, image: Image.Image, role: str) -> Image.Image:
        return crop_image(image, self.image_size)

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> list[Entry]:
        entries: list[Entry] = []
        for batch in _batches(images, [image.width * image.height for image in images], self.max_pixels):
            latents = encode_latents(self.autoencoder, to_pixels(batch))
            grid = (int(latents.shape[-2]), int(latents.shape[-1]))
            entries += [Entry(grid, encode_array(latent, DTYPE)) for latent in latents]
        return entries


def _batches(images: Sequence[Image.Image], costs: Sequence[int], budget: int) -> Iterator[list[Image.Image]]:
    """Consecutive images whose costs add up to at most `budget`, at least one at a time."""
    batch: list[Image.Image] = []
    spent = 0
    for image, cost in zip(images, costs, strict=True):
        if batch and spent + cost > budget:
            yield batch
            batch, spent = [], 0
        batch.append(image)
        spent += cost
    if batch:
        yield batch


@dataclass
class _Pictures:
    """The images of a slice: each decoded once, resized once for every role that asks, equal ones shared."""

    encoder: Encoder
    resized: list[Image.Image] = field(default_factory=list)
    _place: dict[tuple[bytes, str], int] = field(default_factory=dict)
    _same: dict[tuple[tuple[int, int], bytes], int] = field(default_factory=dict)
    _size: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    _problem: dict[bytes, SampleError] = field(default_factory=dict)

    def add(self, data: bytes, roles: Sequence[str]) -> tuple[tuple[int, int], dict[str, int]]:
        """(height, width) of an image, and where in `resized` it is for each role. Raises: SampleError."""
        name = hashlib.sha256(data).digest()
        if name in self._problem:
            raise self._problem[name]
        missing = [role for role in roles if (name, role) not in self._place]
        if name not in self._size or missing:
            try:
                image = decode_image(data)
            except SampleError as error:
                self._problem[name] = error
                raise
            self._size[name] = (image.height, image.width)
            for role in missing:
                self._place[name, role] = self._keep(self.encoder.resize(image, role))
        return self._size[name], {role: self._place[name, role] for role in roles}

    def _keep(self, image: Image.Image) -> int:
        """The place of a resized image; equal pixels (a square image as target and as crop) have one place."""
        pixels = (image.size, hashlib.sha256(image.tobytes()).digest())
        if pixels not in self._same:
            self._same[pixels] = len(self.resized)
            self.resized.append(image)
        return self._same[pixels]


def encode_slice(
    samples: Sequence[Sample], encoder: Encoder, tokenizer: PreTrainedTokenizerBase, geometry: Geometry
) -> tuple[pa.Table, list[QuarantineRow]]:
    """Embedded rows of the samples whose images can be read, in their order, and quarantine rows of the others.

    Which samples are refused doesn't depend on the encoder: all images are decoded, so the modes' rows agree.
    """
    pictures = _Pictures(encoder)
    rows: list[dict[str, Any]] = []
    places: list[list[tuple[str, int, int]]] = []  # of each row: role, which of its images, where in `pictures`
    rejected = []
    for sample in samples:
        try:
            row, entries = _prepare(sample, pictures, tokenizer, geometry)
        except SampleError as error:
            rejected.append(
                QuarantineRow(sample.shard, sample.key, error.member, error.reason_code, error.reason[:500])
            )
            continue
        rows.append(row)
        places.append(entries)
    encoded = encoder.encode(pictures.resized)
    for row, entries in zip(rows, places, strict=True):
        for role in encoder.roles:
            own = [(index, encoded[place]) for name, index, place in entries if name == role]
            row[f"{role}_index"] = [index for index, _ in own]
            row[f"{role}_grid"] = [side for _, entry in own for side in entry.grid]
            row[f"{role}_dtype"] = DTYPE if own else ""
            row[f"{role}_data"] = [entry.data for _, entry in own]
            row[f"{role}_scale"] = []
    return pa.Table.from_pylist(rows, schema=embedded_schema(encoder.roles)), rejected


def _prepare(
    sample: Sample, pictures: _Pictures, tokenizer: PreTrainedTokenizerBase, geometry: Geometry
) -> tuple[dict[str, Any], list[tuple[str, int, int]]]:
    grids: list[tuple[int, int]] = []
    entries: list[tuple[str, int, int]] = []
    for index, (data, speaker) in enumerate(zip(sample.images, image_roles(sample.messages), strict=True)):
        try:
            size, found = pictures.add(data, pictures.encoder.roles_of(speaker))
            height, width = input_size(size, geometry)
        except SampleError as error:
            raise SampleError(error.reason_code, f"image {index}: {error.reason}", error.member) from None
        is_target = speaker == "assistant"
        grids.append(geometry.target_grid if is_target else (height // geometry.factor, width // geometry.factor))
        entries += [(role, index, place) for role, place in found.items()]
    conversation = encode_conversation(tokenizer, sample.messages, grids)
    row = {
        "key": sample.key,
        "shard": sample.shard,
        "row": sample.row,
        "task": sample.task,
        "lang": sample.lang,
        "messages": [{"role": message.role, "content": message.content} for message in sample.messages],
        "meta": json.dumps(sample.meta, ensure_ascii=False).encode("utf-8", "backslashreplace").decode(),
        "num_tokens": len(conversation.input_ids),
    }
    return row, entries
