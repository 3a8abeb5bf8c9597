"""Our patch autoencoder and FLUX's AutoencoderKL behind one interface."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from nexusgen.errors import ModelError, ShapeError
from nexusgen.model.autoencoder import (
    PatchAutoencoder,
    decode_latents,
    encode_latents,
    fit_patch_autoencoder,
    latent_shape,
    load_autoencoder,
)
from nexusgen.model.decoder import pack_latents


def pictures(count: int = 40, size: tuple[int, int] = (16, 24)) -> np.ndarray:
    """Smooth random pictures, so that a few components say most."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[: size[0], : size[1]] / max(size)
    waves = rng.uniform(1, 4, (count, 1, 1, 3)) * (rows[None, ..., None] + columns[None, ..., None])
    return ((np.sin(waves + rng.uniform(0, 6, (count, 1, 1, 3))) + 1) * 127.5).astype(np.uint8)


def to_float(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)


@pytest.fixture(scope="module")
def fitted() -> PatchAutoencoder:
    return fit_patch_autoencoder(pictures(), num_components=32, patch_size=8)


def test_components_are_orthonormal_and_sorted(fitted: PatchAutoencoder) -> None:
    flat = fitted.components.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(32), atol=1e-5, rtol=0)
    latents = encode_latents(fitted, to_float(pictures()))
    variances = pack_latents(latents).flatten(0, 1).var(dim=0)
    assert (variances.diff() <= 1e-4).all()
    assert variances.mean() == pytest.approx(1.0, rel=1e-2)


def test_one_packed_token_holds_one_patch(fitted: PatchAutoencoder) -> None:
    image = to_float(pictures(1))
    tokens = pack_latents(encode_latents(fitted, image))
    assert tokens.shape == (1, 6, 32)
    patch = image[0, :, 8:16, 16:24] - fitted.mean
    expected = fitted.components.flatten(1) @ patch.flatten() * fitted.config.scaling_factor
    torch.testing.assert_close(tokens[0, 5], expected, atol=1e-4, rtol=1e-4)


def test_decoding_restores_what_the_components_span(fitted: PatchAutoencoder) -> None:
    images = to_float(pictures())
    restored = decode_latents(fitted, encode_latents(fitted, images))
    assert (restored - images).square().mean() < 1e-3
    full = fit_patch_autoencoder(pictures(100), num_components=192, patch_size=8)
    torch.testing.assert_close(decode_latents(full, encode_latents(full, images)), images, atol=1e-4, rtol=0)


def test_pixels_are_cut_off_at_the_ends_of_their_range(fitted: PatchAutoencoder) -> None:
    pixels = decode_latents(fitted, torch.full((1, 8, 4, 4), 50.0))
    assert pixels.min() >= -1
    assert pixels.max() <= 1


def test_folder_round_trip(fitted: PatchAutoencoder, tmp_path: Path) -> None:
    fitted.save_pretrained(tmp_path)
    again = load_autoencoder(tmp_path)
    assert isinstance(again, PatchAutoencoder)
    assert again.config.scaling_factor == fitted.config.scaling_factor
    images = to_float(pictures(2))
    assert torch.equal(encode_latents(again, images), encode_latents(fitted, images))


def test_a_small_autoencoder_kl_is_used_the_same_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    block = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 16,
    }
    AutoencoderKL(**block, **kinds, scaling_factor=0.3611, shift_factor=0.1159).save_pretrained(tmp_path)
    autoencoder = load_autoencoder(tmp_path)
    assert isinstance(autoencoder, AutoencoderKL)
    assert latent_shape(autoencoder, (32, 48)) == (16, 4, 6)
    pixels = torch.rand(1, 3, 32, 48) * 2 - 1
    latents = encode_latents(autoencoder, pixels)
    assert latents.shape == (1, 16, 4, 6)
    with torch.no_grad():
        mean = autoencoder.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(latents, (mean - 0.1159) * 0.3611)
    assert decode_latents(autoencoder, latents).shape == pixels.shape


def test_sizes(fitted: PatchAutoencoder) -> None:
    assert latent_shape(fitted, (16, 24)) == (8, 4, 6)
    with pytest.raises(ShapeError, match="multiples of 8"):
        latent_shape(fitted, (12, 24))
    with pytest.raises(ShapeError, match="multiples of 8"):
        encode_latents(fitted, torch.zeros(1, 3, 12, 16))
    with pytest.raises(ShapeError, match="multiple of 4"):
        fit_patch_autoencoder(pictures(), num_components=30, patch_size=8)
    with pytest.raises(ShapeError, match="multiples of 16"):
        fit_patch_autoencoder(pictures(), num_components=32)


def test_folders_that_are_not_autoencoders_are_refused(fitted: PatchAutoencoder, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not an autoencoder's folder"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Nothing"}))
    with pytest.raises(ModelError, match="PatchAutoencoder"):
        load_autoencoder(tmp_path)
    fitted.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="can't be loaded"):
        load_autoencoder(tmp_path)
