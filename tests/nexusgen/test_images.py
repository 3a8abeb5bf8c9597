from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms
from safetensors.numpy import load_file

from nexusgen.errors import SampleError, ShapeError
from nexusgen.images import (
    Geometry,
    crop_image,
    decode_image,
    encode_picture,
    from_pixels,
    image_for_role,
    input_image,
    reference_image,
    target_image,
    to_patches,
    to_pixels,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "ar"
TINY = Geometry(patch_size=8, merge_size=2, target_size=64, reference_size=128, max_input_pixels=128 * 128)


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_geometry_computes_token_grids_from_pixels() -> None:
    released = Geometry()
    assert released.factor == 28
    assert (released.target_grid, released.reference_grid) == ((9, 9), (18, 18))
    assert released.num_target_tokens == 81
    assert TINY.num_target_tokens == 16


def test_geometry_refuses_a_target_of_broken_tokens() -> None:
    with pytest.raises(ValueError, match="target_size is 250"):
        Geometry(target_size=250)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_decode_reads_common_formats_by_content(format: str) -> None:
    image = decode_image(encode(Image.new("RGB", (20, 10), (200, 30, 40)), format))
    assert (image.mode, image.size) == ("RGB", (20, 10))
    assert np.abs(np.asarray(image).astype(int) - (200, 30, 40)).max() <= 4


def test_decode_puts_alpha_on_white() -> None:
    for mode, colour in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))):
        assert decode_image(encode(Image.new(mode, (4, 4), colour))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert decode_image(encode(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encode(palette)).getpixel((0, 0)) == (10, 20, 30)


def test_decode_keeps_the_high_byte_of_16_bit_greys() -> None:
    grey = Image.fromarray(np.full((4, 4), 0x8080, dtype=np.uint16))
    assert decode_image(encode(grey)).getpixel((0, 0)) == (128, 128, 128)
    floats = Image.fromarray(np.array([[0.0, 0.5], [1.0, np.nan]], dtype=np.float32))
    assert np.asarray(decode_image(encode(floats, "TIFF")))[:, :, 0].tolist() == [[0, 128], [255, 0]]


def test_decode_converts_cmyk_and_lab() -> None:
    assert decode_image(encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")).getpixel((0, 0)) == (255, 255, 255)
    rgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.new("RGB", (4, 4), (128, 128, 128)), rgb, lab, outputMode="LAB")
    assert image is not None
    assert decode_image(encode(image, "TIFF")).mode == "RGB"


@pytest.mark.parametrize("format", ["JPEG", "TIFF", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_decode_turns_images_upright_once(format: str, orientation: int) -> None:
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:8, :16] = 255
    stored = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "JPEG" else {}
    shown = np.asarray(decode_image(encode(stored, format, exif=exif, **options))).astype(int)
    # Row 0 of the stored picture is shown at the top (1), bottom (3), right (6) or left (8).
    turns = {1: 0, 3: 2, 6: -1, 8: 1}[orientation]
    assert np.abs(shown - np.rot90(pixels, turns).astype(int)).max() <= 60


def test_decode_takes_the_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "image_undecodable"),
        (b"<html>no picture</html>", "image_undecodable"),
        (encode(noise(64, 64))[:4000], "image_truncated"),
        (encode(noise(64, 64), "JPEG")[:1500], "image_truncated"),
        (encode(Image.new("1", (13_000, 13_000))), "image_too_large"),
        (encode(Image.new("RGB", (1, 1000))), "image_shape"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "image_undecodable"),
    ],
    ids=["empty", "html", "half-png", "half-jpeg", "bomb", "thin", "postscript"],
)
def test_decode_refuses_with_a_reason_code(data: bytes, code: str) -> None:
    with pytest.raises(SampleError) as caught:
        decode_image(data)
    assert caught.value.reason_code == code


def test_input_image_keeps_its_aspect_in_whole_tokens() -> None:
    geometry = Geometry()
    large = input_image(noise(900, 1600), geometry)
    assert large.width % 28 == large.height % 28 == 0
    assert large.width * large.height <= geometry.max_input_pixels
    assert abs(large.width / large.height - 1600 / 900) < 0.1
    assert input_image(noise(1, 1), geometry).size == (56, 56)
    assert input_image(noise(112, 84), geometry).size == (84, 112)


def test_roles_have_their_sizes() -> None:
    image = noise(100, 60)
    for role, size in (("input", (64, 96)), ("target", (64, 64)), ("crop", (64, 64)), ("reference", (128, 128))):
        assert image_for_role(image, role, TINY).size == size
    with pytest.raises(ValueError, match="unknown role"):
        image_for_role(image, "latents", TINY)


def test_roles_use_the_references_filters() -> None:
    image = noise(100, 60)
    assert target_image(image, TINY) == image.resize((64, 64), Image.Resampling.BICUBIC)
    assert reference_image(image, TINY, training=True) == image.resize((128, 128), Image.Resampling.BICUBIC)
    assert reference_image(image, TINY, training=False) == image.resize((128, 128), Image.Resampling.BILINEAR)


@pytest.mark.parametrize("shape", [(64, 64), (100, 60), (61, 333), (7, 9)])
def test_crop_covers_and_centres(shape: tuple[int, int]) -> None:
    crop = crop_image(noise(*shape), (32, 48))
    assert crop.size == (48, 32)
    line = np.zeros((101, 301, 3), dtype=np.uint8)
    line[:, 150] = 255
    bright = np.asarray(crop_image(Image.fromarray(line), (101, 101)))[50, :, 0]
    assert bright.argmax() == 50


def test_patches_come_in_merge_order_with_two_equal_frames() -> None:
    patches, grid = to_patches([noise(32, 48), noise(16, 16, seed=1)], TINY)
    assert grid.tolist() == [[1, 4, 6], [1, 2, 2]]
    assert patches.shape == (24 + 4, 3 * 2 * 8 * 8)
    frames = patches.reshape(-1, 3, 2, 8, 8)
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])
    # Patch 2 is the lower left one of the first 2x2 cell.
    raw = torch.from_numpy(np.array(noise(32, 48)))[8:16, 0:8].permute(2, 0, 1) / 255
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.4814547, 0.4578275, 0.4082107), (0.2686295, 0.2613026, 0.275777))
    )
    torch.testing.assert_close(frames[2, :, 0], (raw - mean) / std, atol=1e-5, rtol=0)


def test_patches_refuse_broken_tokens() -> None:
    with pytest.raises(ShapeError, match="30x48"):
        to_patches([noise(30, 48)], TINY)


def test_patches_are_equal_to_the_reference() -> None:
    for name, images in (("vision", ("edit_source", "odd")), ("vision_targets", ("target0", "target1"))):
        golden = load_file(GOLDEN / f"{name}.safetensors")
        for image in images:
            patches, grid = to_patches([Image.fromarray(golden[f"image_uint8.{image}"])], Geometry())
            frame = golden[f"pixels_frame0.{image}"].reshape(-1, 3, 1, 14, 14)
            assert np.array_equal(patches.numpy().reshape(-1, 3, 2, 14, 14), np.repeat(frame, 2, axis=2))
            assert np.array_equal(grid.numpy(), golden[f"grid_thw.{image}"])


def test_pixels_round_trip() -> None:
    images = [noise(16, 24, seed) for seed in range(3)]
    pixels = to_pixels(images)
    assert pixels.shape == (3, 3, 16, 24)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(images, from_pixels(pixels), strict=True))
    with pytest.raises(ShapeError, match="one size"):
        to_pixels([noise(8, 8), noise(8, 16)])


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_a_generated_picture_says_what_made_it(image_format: str) -> None:
    data = encode_picture(Image.new("RGB", (8, 4), "red"), {"seed": 7, "fingerprint": "f00d"}, image_format)
    with Image.open(io.BytesIO(data)) as picture:
        assert (picture.format, picture.size) == (image_format, (8, 4))
        exif = picture.getexif()
        text = picture.info.get("nexusgen") or exif[ExifTags.Base.ImageDescription]
        assert (picture.info.get("Software") or exif[ExifTags.Base.Software]) == "nexusgen"
    assert json.loads(text[text.index("{") :]) == {"seed": 7, "fingerprint": "f00d", "width": 8, "height": 4}
