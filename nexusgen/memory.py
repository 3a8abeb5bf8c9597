"""How much memory a model folder takes on a device, planned from the headers of its files before anything is loaded.

Weights are counted tensor by tensor, at the dtype that they will have. What the computation needs beside them is an
estimate (`working_bytes`); `benchmarks/memory.py` compares the plan with what is measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nexusgen.errors import ModelError, ResourceError
from nexusgen.model.decoder import QUANTISED_DTYPES, TRANSFORMER_STEM, Quantisation, is_quantised
from nexusgen.model.manifest import read_manifest
from nexusgen.model.tensors import weight_files
from nexusgen.model.weights import DECODER_FOLDERS, HALVES, Half, check_parts, read_autoregressive_config

GB = 1e9
_NUM_TEXT_TOKENS = 1024  # that a conversation and its reply are planned with, beside its images
_PROMPT_TOKENS = 512  # of T5, on the negative side of two-pass guidance
_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class HalfPlan:
    """What one half takes, in bytes: the weights of its parts, and the computation beside them."""

    weights: Mapping[str, int]
    working: int

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.working


@dataclass(frozen=True)
class MemoryPlan:
    """What a model will take on a device, and what the device has free, in bytes."""

    device: str
    dtype: torch.dtype
    quantise: Quantisation | None
    is_offloaded: bool
    halves: Mapping[Half, HalfPlan]
    free: int

    @property
    def whole(self) -> int:
        """The peak with all parts in memory; the halves work one after the other."""
        weights = sum(sum(half.weights.values()) for half in self.halves.values())
        return weights + max((half.working for half in self.halves.values()), default=0)

    @property
    def offloaded(self) -> int:
        """The peak with one half in memory at a time."""
        return max((half.total for half in self.halves.values()), default=0)

    @property
    def peak(self) -> int:
        return self.offloaded if self.is_offloaded else self.whole

    @property
    def fits(self) -> bool:
        return self.peak <= self.free

    def rows(self) -> list[tuple[str, str]]:
        """The plan as lines of a table: what, and how many GB."""
        lines = [(part, size) for half in self.halves.values() for part, size in half.weights.items()]
        lines += [(f"computing, {name} (estimate)", half.working) for name, half in self.halves.items()]
        lines += [("peak, whole", self.whole)]
        if len(self.halves) > 1:
            lines += [("peak, --offload", self.offloaded)]
        lines += [(f"free on {self.device}", self.free)]
        return [(name, f"{size / GB:.3f}") for name, size in lines]

    def check(self) -> None:
        """Raises: ResourceError with the numbers and the ways out, if the peak is more than what is free."""
        if self.fits:
            return
        ways = []
        if not self.is_offloaded and self.offloaded < self.whole:
            ways.append(f"--offload ({self.offloaded / GB:.2f} GB)")
        if self.quantise is None and "drawing" in self.halves:
            ways.append("--quantise fp8")
        if self.dtype != torch.bfloat16:
            ways.append("--dtype bf16")
        ways.append("another --device")
        raise ResourceError(
            f"the model needs {self.peak / GB:.2f} GB on {self.device} in {_DTYPE_NAMES.get(self.dtype, self.dtype)}, "
            f"which has {self.free / GB:.2f} GB free; use {', '.join(ways)}, or free some memory"
        )


def plan_memory(
    folder: Path,
    parts: Sequence[str],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    offload: bool = False,
    quantise: Quantisation | None = None,
    size: tuple[int, int] | None = None,
) -> MemoryPlan:
    """Plan some parts of a model folder for a picture of `size` (height, width; without it the manifest's).

    Raises: ModelError if the folder isn't a model, lacks a part, or a file of weights is absent or damaged.
    """
    manifest = read_manifest(folder)
    check_parts(folder, manifest, parts)
    halves: dict[Half, HalfPlan] = {}
    for name, of_half in HALVES.items():
        wanted = [part for part in of_half if part in parts]
        if wanted:
            weights = {part: weight_bytes(folder, part, dtype, quantise) for part in wanted}
            working = working_bytes(folder, wanted, dtype, size if size is not None else manifest.image_size)
            halves[name] = HalfPlan(weights, working)
    return MemoryPlan(device, dtype, quantise, offload, halves, free_bytes(device))


def weight_bytes(folder: Path, part: str, dtype: torch.dtype, quantise: Quantisation | None = None) -> int:
    """Bytes that a part's weights take when they are loaded, from the headers of its files. Raises: ModelError."""
    total = 0
    for name, count in tensor_sizes(folder, part):
        is_small = quantise is not None and part in DECODER_FOLDERS and is_quantised(name)
        total += count * (QUANTISED_DTYPES[quantise] if quantise is not None and is_small else dtype).itemsize
    return total


def tensor_sizes(folder: Path, part: str) -> Iterator[tuple[str, int]]:
    """Names and numbers of numbers of a part's tensors; a decoder's as `VisionDecoder` names them."""
    if part in DECODER_FOLDERS:
        place = folder / DECODER_FOLDERS[part]
        files = [("conditioner.", place / "conditioner.safetensors")]
        files += [("transformer.", path) for path in weight_files(place / "transformer", TRANSFORMER_STEM)]
    else:
        files = [("", path) for path in weight_files(folder / part, TRANSFORMER_STEM if part == "vae" else "model")]
    for prefix, path in files:
        try:
            with safe_open(path, framework="np") as file:  # maps the file, where pt would reserve its size in memory
                for name in file.keys():  # noqa: SIM118 (a handle, not a mapping)
                    yield prefix + name, math.prod(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is not a readable safetensors file: {error}") from None


def working_bytes(folder: Path, parts: Sequence[str], dtype: torch.dtype, size: tuple[int, int]) -> int:
    """An estimate of what one half needs beside its weights, at one picture of `size` (height, width), in bytes.

    With b bytes for each number, it is the largest of these; halves work one after the other, and so do their parts:

    - language model: the KV cache, 2 layers kv_heads head_size tokens b, and in a layer (6 hidden + 3 intermediate)
      tokens b, over 1,024 tokens of text, one image of the largest size that users give, and one that is predicted;
    - vision tower: (8 hidden + 3 intermediate) patches b, over the larger of that image and a reference;
    - transformer: 24 width tokens b in a single block (its input, queries, keys and values, the MLP's four widths
      twice, their joint output, and queries and keys in fp32), over a token for each 16x16 pixels, and the larger of
      the image's tokens and the 512 of the negative side. Attention is computed in pieces: no square of tokens;
    - autoencoder: four maps of twice its first width, at full size. FLUX.1's takes 2.1 GB for 1024x1024 in bf16.

    Libraries and a GPU's own context, a few hundred MB, are in no plan. Raises: ModelError if a config can't be read.
    """
    number = dtype.itemsize
    geometry = read_manifest(folder).geometry
    needs = [0]
    if "autoregressive" in parts:
        config = read_autoregressive_config(folder / "autoregressive")
        text, vision = config.text_config, config.vision_config
        num_patches = geometry.max_input_pixels // geometry.patch_size**2
        rows, columns = geometry.reference_grid
        num_reference_patches = rows * columns * geometry.merge_size**2
        num_tokens = _NUM_TEXT_TOKENS + num_patches // geometry.merge_size**2 + geometry.num_target_tokens
        head_size = text.hidden_size // text.num_attention_heads
        cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size * num_tokens
        layer = (6 * text.hidden_size + 3 * text.intermediate_size) * num_tokens
        tower = (8 * vision.hidden_size + 3 * vision.intermediate_size) * max(num_patches, num_reference_patches)
        needs += [(cache + layer) * number, tower * number]
    height, width = size
    for part in DECODER_FOLDERS:
        if part in parts:
            sizes = _read_json(folder / DECODER_FOLDERS[part] / "transformer" / "config.json")
            inner = sizes["num_attention_heads"] * sizes["attention_head_dim"]
            num_image_tokens = geometry.num_target_tokens
            if part == "editing_decoder":
                num_image_tokens += math.prod(geometry.reference_grid)
            num_tokens = height * width // 16**2 + max(num_image_tokens, _PROMPT_TOKENS)
            needs.append(24 * inner * num_tokens * number)
    if "vae" in parts:
        channels = _read_json(folder / "vae" / "config.json").get("block_out_channels", [3])
        needs.append(4 * 2 * channels[0] * height * width * number)
    return max(needs)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error}") from None
    return content


def unique_bytes(tensors: Iterable[Shaped[Tensor, ...]]) -> int:
    """Bytes of memory behind tensors, what several of them share counted once."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def free_bytes(device: str) -> int:
    """What a device has free: of a GPU its own memory, else the main memory that can be had without swapping.

    Limits that a container sets beneath that aren't seen.
    """
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return int(psutil.virtual_memory().available)
