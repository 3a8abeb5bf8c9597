"""A random tiny model folder and embedded data for it: what tests of training stand on, made in a second."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from nexusgen import shapes
from nexusgen.base_training import (
    GEOMETRY,
    HIDDEN_SIZE,
    IMAGE_SIZE,
    LATENT_CHANNELS,
    TRANSFORMER_SIZES,
    tiny_autoregressive_config,
    tiny_decoder_config,
    train_tokenizer,
)
from nexusgen.flow_matching import make_scheduler
from nexusgen.messages import task_of
from nexusgen.model.autoencoder import fit_patch_autoencoder
from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.model.decoder import VisionDecoder, initialise_for_training, save_decoder
from nexusgen.model.manifest import read_manifest
from nexusgen.model.weights import load_tokenizer, save_autoregressive, save_tensors, write_manifest
from nexusgen.prompts import encode_conversation
from nexusgen.schema import EmbedMode, Message, embedded_schema
from pipelines import embedded, storage
from pipelines.arrays import encode_array
from pipelines.embedded import EmbeddedManifest, SliceInfo

NUM_TARGET_TOKENS = GEOMETRY.num_target_tokens
NUM_REFERENCE_TOKENS = math.prod(GEOMETRY.reference_grid)
LATENT_SIZE = (IMAGE_SIZE[0] // 8, IMAGE_SIZE[1] // 8)
ROLES: Mapping[EmbedMode, tuple[str, ...]] = {
    "vision": ("input", "target", "crop"),
    "latents": ("latents",),
    "predicted": ("reference", "predicted"),
}
WORDS = ("red", "green", "blue", "circle", "square", "star", "large", "small", "left", "right")


def make_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A model folder with random weights, of the demo's sizes."""
    torch.manual_seed(seed)
    train_tokenizer(folder / "autoregressive", [" ".join(WORDS), "You are a helpful assistant. user assistant system"])
    tokenizer = load_tokenizer(folder / "autoregressive")
    model = AutoregressiveModel(tiny_autoregressive_config(tokenizer), GEOMETRY)
    save_autoregressive(model, folder / "autoregressive", tokenizer, torch.float32)
    decoder = VisionDecoder.from_config(tiny_decoder_config(), TRANSFORMER_SIZES)
    initialise_for_training(decoder, seed)
    save_decoder(decoder, folder / "decoders" / "generation", torch.float32)
    noise = np.random.default_rng(seed).integers(0, 256, (64, *IMAGE_SIZE, 3), dtype=np.uint8)
    fit_patch_autoencoder(noise, 4 * LATENT_CHANNELS).save_pretrained(folder / "vae")
    make_scheduler().save_pretrained(folder / "scheduler")
    constants = {
        "pooled_prompt": torch.zeros(1, TRANSFORMER_SIZES["pooled_projection_dim"]),
        "negative_context": torch.zeros(1, 1, HIDDEN_SIZE),
    }
    save_tensors(constants, folder / "prompt_constants.safetensors", torch.float32)
    write_manifest(folder, geometry=GEOMETRY, image_size=IMAGE_SIZE, num_inference_steps=2, true_cfg_scale=1.0)
    return folder


def make_embedded(
    storage_uri: str,
    name: str,
    model: Path,
    num_samples: int = 60,
    rows_per_slice: int = 16,
    task_by_task: bool = False,
    shard: str = "shard.tar",
) -> None:
    """Embedded data of all modes: three tasks, in turn or one after another; texts of unequal length, learnable
    targets. `shard` is where its pictures are said to be, see `write_shard`."""
    tokenizer = load_tokenizer(model / "autoregressive")
    order = sorted(range(num_samples), key=lambda number: number % 3) if task_by_task else range(num_samples)
    rows = [{**_row(number, tokenizer), "shard": shard} for number in order]
    fingerprints = read_manifest(model).fingerprints
    write_mode(storage_uri, name, "vision", fingerprints["vision"], rows, rows_per_slice)
    write_mode(storage_uri, name, "latents", fingerprints["vae"], rows, rows_per_slice)
    write_mode(storage_uri, name, "predicted", fingerprints["autoregressive"], rows, rows_per_slice)


def write_shard(path: Path, storage_uri: str, name: str) -> None:
    """A tar with the samples of embedded data: its own texts, and scenes of the demo world, larger than the model's."""
    rng = np.random.default_rng(0)
    slices = embedded.list_slices(storage_uri, name, "vision")
    with tarfile.open(path, "w") as tar:
        for row in (row for info in slices for row in embedded.read_slice(info, ["key", "messages"]).to_pylist()):
            count = sum(message["content"].count("<image>") for message in row["messages"])
            names = [f"{number}.png" for number in range(count)]
            members = {"json": json.dumps({"id": row["key"], "images": names, "messages": row["messages"]}).encode()}
            for picture in names:
                buffer = io.BytesIO()
                Image.fromarray(shapes.draw(shapes.sample_scene(rng), 120)).save(buffer, "PNG")
                members[picture] = buffer.getvalue()
            for member, data in members.items():
                entry = tarfile.TarInfo(f"{row['key']}.{member}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def write_mode(
    storage_uri: str,
    name: str,
    mode: EmbedMode,
    fingerprint: str,
    rows: Sequence[dict[str, Any]],
    rows_per_slice: int = 16,
    without: Sequence[str] = (),
) -> None:
    """One mode of embedded data, as `embed` leaves it; `without` names columns to leave out."""
    folder = embedded.folder_of(storage_uri, name, mode)
    schema = embedded_schema(ROLES[mode])
    slices = []
    for number, start in enumerate(range(0, len(rows), rows_per_slice)):
        part = [{column: row.get(column) for column in schema.names} for row in rows[start : start + rows_per_slice]]
        data = embedded.to_parquet(pa.Table.from_pylist(part, schema=schema).drop_columns(list(without)))
        uri = storage.join(folder, f"shard-00000000-{number:05d}.parquet")
        storage.write_bytes_atomic(uri, data)
        digest = hashlib.sha256(data).hexdigest()
        slices.append(SliceInfo(uri, "shard.tar", number, len(part), data.size, digest))
    digest = embedded.digest_of(slices)
    manifest = EmbeddedManifest(mode, fingerprint, "config", f"embed-{mode}", digest, tuple(slices), (), {})
    embedded.write_manifest(folder, manifest)


def _row(number: int, tokenizer: Any) -> dict[str, Any]:
    """Sample `number`: its targets are one of five patterns, named in its text."""
    rng = np.random.default_rng(number)
    pattern = number % 5
    text = " ".join([WORDS[pattern], *rng.choice(WORDS, size=1 + number % 9)])
    grid = GEOMETRY.target_grid
    messages = {
        0: [Message("user", text), Message("assistant", "<image>")],
        1: [Message("user", f"<image>{text}"), Message("assistant", "done <image>")],
        2: [Message("user", f"<image>{text}"), Message("assistant", text)],
    }[number % 3]
    roles = [m.role for m in messages for _ in range(m.content.count("<image>"))]
    conversation = encode_conversation(tokenizer, messages, [grid] * len(roles))
    row: dict[str, Any] = {
        "key": f"sample-{number:04d}",
        "row": number,
        "task": task_of(messages),
        "lang": "en",
        "messages": [{"role": m.role, "content": m.content} for m in messages],
        "meta": "{}",
        "num_tokens": len(conversation.input_ids),
    }
    target = torch.randn(NUM_TARGET_TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(pattern))
    latents = torch.randn(LATENT_CHANNELS, *LATENT_SIZE, generator=torch.Generator().manual_seed(100 + pattern))
    shown = [i for i, role in enumerate(roles) if role == "user"]
    drawn = [i for i, role in enumerate(roles) if role == "assistant"]
    row |= _entries("input", shown, grid, target.flip(0))
    row |= _entries("target", drawn, grid, target)
    row |= _entries("crop", drawn, grid, target)
    row |= _entries("latents", drawn, LATENT_SIZE, latents)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(200 + number))
    row |= _entries("predicted", drawn, grid, target + 0.1 * noise)
    large = torch.randn(NUM_REFERENCE_TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(300 + pattern))
    row |= _entries("reference", shown if drawn else [], GEOMETRY.reference_grid, large)
    return row


def _entries(role: str, indices: list[int], grid: tuple[int, int], values: torch.Tensor) -> dict[str, Any]:
    return {
        f"{role}_index": indices,
        f"{role}_grid": [side for _ in indices for side in grid],
        f"{role}_dtype": "bfloat16" if indices else "",
        f"{role}_data": [encode_array(values) for _ in indices],
        f"{role}_scale": [],
    }
