"""The image autoencoder behind the vision decoder: FLUX's AutoencoderKL, or our own small one, used the same way.

Latents here are always scaled: (posterior mean - shift_factor) * scaling_factor, both from the autoencoder's config.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, ModelMixin
from jaxtyping import Float, UInt8
from torch import Tensor

from nexusgen.errors import ModelError, ShapeError
from nexusgen.model.patch_autoencoder import PatchAutoencoder

ImageAutoencoder: TypeAlias = AutoencoderKL | PatchAutoencoder


def fit_patch_autoencoder(
    images: UInt8[np.ndarray, "images height width 3"], num_components: int, patch_size: int = 16
) -> PatchAutoencoder:
    """Principal components of all aligned patches; latents have unit variance over all channels together.

    One scale for all channels: an error in a latent then weighs as much as the same error in pixels.
    Raises: ShapeError if sides aren't multiples of the patch, or `num_components` isn't a multiple of 4.
    """
    count, height, width, _ = images.shape
    if height % patch_size or width % patch_size:
        raise ShapeError(f"images of {height}x{width} pixels: sides must be multiples of {patch_size}")
    if num_components % 4:
        raise ShapeError(f"{num_components} components: must be a multiple of 4, FLUX packs 2x2 latents into a token")
    grid = images.reshape(count, height // patch_size, patch_size, width // patch_size, patch_size, 3)
    patches = grid.transpose(0, 1, 3, 5, 2, 4).reshape(-1, 3 * patch_size * patch_size)
    data = torch.from_numpy(patches.astype(np.float32) / 127.5 - 1)
    mean = data.mean(dim=0)
    centred = data - mean
    covariance = (centred.T @ centred).double() / len(centred)
    variances, vectors = torch.linalg.eigh(covariance)  # ascending
    kept = vectors[:, -num_components:].flip(1).T
    deviation = float(variances[-num_components:].mean().sqrt())
    autoencoder = PatchAutoencoder(num_components // 4, patch_size, scaling_factor=1 / deviation)
    shape = (3, patch_size, patch_size)
    autoencoder.components.copy_(kept.reshape(-1, *shape))
    autoencoder.mean.copy_(mean.reshape(shape))
    return autoencoder.eval()


def load_autoencoder(
    folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> ImageAutoencoder:
    """Load a diffusers folder by the `_class_name` of its config. Raises: ModelError if it isn't one that we know."""
    path = folder / "config.json"
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} is not an autoencoder's folder: {path.name} can't be read: {error}") from None
    classes: dict[str, type[ModelMixin]] = {cls.__name__: cls for cls in (AutoencoderKL, PatchAutoencoder)}
    if name not in classes:
        raise ModelError(f"{path}: _class_name {name!r}; known autoencoders: {', '.join(classes)}")
    try:
        autoencoder, info = classes[name].from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder}: the autoencoder can't be loaded: {error}") from None
    problems = [f"missing {key}" for key in info["missing_keys"]] + [f"unexpected {k}" for k in info["unexpected_keys"]]
    if problems:
        raise ModelError(f"{folder}: the weights don't fit {name}: {'; '.join(problems[:12])}")
    return cast(ImageAutoencoder, autoencoder.to(device).eval())


def latent_shape(autoencoder: ImageAutoencoder, image_size: tuple[int, int]) -> tuple[int, int, int]:
    """(channels, height, width) of the latents of an image of (height, width) pixels.

    Raises: ShapeError if the sides aren't multiples of what one token of the decoder covers (2x2 latent pixels).
    """
    config = autoencoder.config
    if isinstance(autoencoder, PatchAutoencoder):
        factor = config.patch_size // 2
    else:
        factor = 2 ** (len(config.block_out_channels) - 1)
    height, width = image_size
    if height % (2 * factor) or width % (2 * factor):
        raise ShapeError(f"image of {height}x{width} pixels: sides must be multiples of {2 * factor}")
    return config.latent_channels, height // factor, width // factor


@torch.no_grad()
def encode_latents(
    autoencoder: ImageAutoencoder, pixels: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch channels latent_height latent_width"]:
    """Scaled latents (posterior mean) of pixels in [-1, 1]. Raises: ShapeError as `latent_shape`."""
    latent_shape(autoencoder, (pixels.shape[-2], pixels.shape[-1]))
    mean = autoencoder.encode(pixels.to(autoencoder.device, autoencoder.dtype)).latent_dist.mode()
    latents: Tensor = (mean - (autoencoder.config.shift_factor or 0.0)) * autoencoder.config.scaling_factor
    return latents


@torch.no_grad()
def decode_latents(
    autoencoder: ImageAutoencoder, latents: Float[Tensor, "batch channels latent_height latent_width"]
) -> Float[Tensor, "batch 3 height width"]:
    """Pixels in [-1, 1], cut off there, of scaled latents."""
    config = autoencoder.config
    unscaled = latents.to(autoencoder.device, autoencoder.dtype) / config.scaling_factor + (config.shift_factor or 0.0)
    pixels: Tensor = autoencoder.decode(unscaled).sample
    return pixels.clamp(-1, 1)
