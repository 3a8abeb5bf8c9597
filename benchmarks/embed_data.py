"""What the benchmarks of `embed` run on: a random model whose vision tower is worth waiting for, and tars for it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from transformers import Qwen2_5_VLConfig

from nexusgen.geometry import Geometry
from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.model.manifest import demo_base
from nexusgen.model.weights import load_tokenizer, read_autoregressive_config, save_autoregressive, write_manifest

QUESTION, ANSWER = "<image> What is it?", "A pattern."
SIDE = 252  # pixels of an image: 324 patches at the released sizes


def make_model(folder: Path, width: int, depth: int) -> Path:
    """A model folder with random weights and the released image sizes; its language model is the demo's."""
    tokenizer = load_tokenizer(demo_base() / "autoregressive")
    sizes = read_autoregressive_config(demo_base() / "autoregressive").to_dict()
    geometry = Geometry()
    sizes["vision_config"] |= {
        "depth": depth,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_heads": width // 64,
        "patch_size": geometry.patch_size,
        "spatial_patch_size": geometry.patch_size,
        "spatial_merge_size": geometry.merge_size,
        "window_size": 112,
        "fullatt_block_indexes": [depth - 1],
    }
    torch.manual_seed(0)
    model = AutoregressiveModel(Qwen2_5_VLConfig(**sizes), geometry)
    save_autoregressive(model, folder / "autoregressive", tokenizer, torch.float32)
    write_manifest(folder, geometry=geometry, image_size=(SIDE, SIDE), num_inference_steps=1, true_cfg_scale=1.0)
    return folder


def write_shard(path: Path, num_samples: int, seed: int, *, side: int = SIDE, noise: bool = False) -> None:
    """A tar of questions about pictures: smooth JPEGs, or PNGs of noise, which nothing compresses."""
    generator = np.random.default_rng(seed)
    with webdataset.TarWriter(str(path), encoder=False, mtime=0.0, user="", group="") as writer:
        for number in range(num_samples):
            key = f"s{seed:04d}-{number:05d}"
            extension = "png" if noise else "jpg"
            pixels = generator.integers(0, 256, (side, side, 3) if noise else (8, 8, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            image.save(buffer, "PNG" if noise else "JPEG", compress_level=0, quality=92)
            messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
            record = {"id": key, "images": [f"0.{extension}"], "messages": messages}
            writer.write({"__key__": key, "json": json.dumps(record).encode(), f"0.{extension}": buffer.getvalue()})
