from __future__ import annotations

import io
import json
import random
import struct
import tracemalloc
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, features
from safetensors.numpy import load_file

from nexusgen import images as images_module
from nexusgen.errors import SampleError, ShapeError
from nexusgen.geometry import Geometry
from nexusgen.images import (
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
from nexusgen.schema import REASON_CODES

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


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(height: int, width: int, data: bytes, *, depth: int = 8, colour_type: int = 2, more: bytes = b"") -> bytes:
    """A PNG of raw rows, each with its filter byte, whatever its header says."""
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + more + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def icon_of(picture: bytes) -> bytes:
    """An icon that says it is 16x16 around whatever picture."""
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(picture), 22) + picture


def decode_or_code(data: bytes) -> Image.Image | str:
    """The picture, or the code of why it isn't used; whatever else is raised fails the test."""
    try:
        return decode_image(data)
    except SampleError as error:
        return error.reason_code


def values_of(image: Image.Image) -> list[int]:
    return np.asarray(image)[0, :, 0].tolist()


def test_deep_greys_are_scaled_and_never_clipped() -> None:
    ramp = np.array([[0, 4095, 32768, 65535]], dtype=np.uint16)
    for format in ("PNG", "TIFF", "JPEG2000"):
        assert values_of(decode_image(encode(Image.fromarray(ramp), format))) == [0, 16, 128, 255]
    assert values_of(decode_image(b"P5 2 1 4095\n" + struct.pack(">HH", 0, 4095))) == [0, 255]
    assert values_of(decode_image(b"P5 2 1 65535\n" + struct.pack(">HH", 0, 200))) == [0, 1]
    for dtype, white in ((np.int32, 255), (np.int32, 65535), (np.int32, 2**31 - 1), (np.float32, 1), (np.float32, 3e9)):
        values = np.array([[0, white / 3, white]], dtype=dtype)
        assert values_of(decode_image(encode(Image.fromarray(values), "TIFF"))) == [0, 85, 255]
    odd = np.array([[-1, np.nan, np.inf, 1]], dtype=np.float32)
    assert values_of(decode_image(encode(Image.fromarray(odd), "TIFF"))) == [0, 0, 0, 255]
    assert values_of(decode_image(encode(Image.fromarray(np.full((1, 2), np.nan, np.float32)), "TIFF"))) == [0, 0]


def test_twelve_bits_are_twelve_bits() -> None:
    entries = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 3)]
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    data = b"II*\0" + struct.pack("<I", 12) + b"\xff\xf8\x00\0" + struct.pack("<H", len(entries)) + tags + bytes(4)
    assert values_of(decode_image(data)) == [255, 128]


def test_deep_colours_and_their_transparency() -> None:
    rows = b"\0" + struct.pack(">6H", 65535, 0, 0x8000, 65535, 65535, 0x1234)
    assert np.asarray(decode_image(png_of(1, 2, rows, depth=16))).tolist() == [[[255, 0, 128], [255, 255, 18]]]
    clear = chunk(b"tRNS", struct.pack(">3H", 65535, 0, 0x8000))
    assert decode_image(png_of(1, 2, rows, depth=16, more=clear)).getpixel((0, 0)) == (255, 255, 255)
    grey, clear = b"\0" + struct.pack(">2H", 100, 65000), chunk(b"tRNS", struct.pack(">H", 100))
    assert values_of(decode_image(png_of(1, 2, grey, depth=16, colour_type=0, more=clear))) == [255, 253]
    with_alpha = b"\0" + struct.pack(">4H", 0, 0, 0, 65535)
    assert values_of(decode_image(png_of(1, 2, with_alpha, depth=16, colour_type=4))) == [255, 0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "LAB", "RGBa", "La", "I;16", "F"])
def test_every_mode_of_tiff_becomes_rgb(mode: str) -> None:
    stored = Image.new(mode, (5, 3)) if mode != "PA" else Image.new("P", (5, 3)).convert("PA")
    try:
        data = encode(stored, "TIFF")
    except OSError:
        data = encode(stored.convert("LA" if mode in ("PA", "La") else "RGBA"), "PNG")
    shown = decode_image(data)
    assert (shown.mode, shown.size) == ("RGB", (5, 3))


def test_cmyk_of_adobe_is_inverted_once() -> None:
    for colour, expected in (((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0)):
        data = encode(Image.new("CMYK", (8, 8), colour), "JPEG", quality=95)
        assert b"Adobe" in data
        assert values_of(decode_image(data))[0] == expected


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"])
def test_the_first_of_several_frames(format: str) -> None:
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("red", "blue", "lime")]
    shown = decode_image(encode(frames[0], format, save_all=True, append_images=frames[1:]))
    assert shown.size == (16, 8)
    assert np.abs(np.asarray(shown).astype(int) - (255, 0, 0)).max() <= 8


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_broken_metadata_leaves_the_picture(format: str) -> None:
    stored = noise(16, 24)
    wanted = np.asarray(decode_image(encode(stored, format)))
    broken = (b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    exif = Image.Exif()
    exif[0x0112] = 77
    for options in ({"exif": exif}, {"icc_profile": b"no profile"}, *({"exif": data} for data in broken)):
        if format in ("TIFF", "AVIF") and isinstance(options.get("exif"), bytes):
            continue  # Pillow itself refuses to write it
        assert np.array_equal(np.asarray(decode_image(encode(stored, format, **options))), wanted), options


CUT_SHORT = [
    encode(noise(48, 40), format, **options)
    for format, options in (
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("BMP", {}),
        ("PPM", {}),
        *([("AVIF", {})] if features.check("avif") else []),
        ("JPEG2000", {}),
    )
]


@pytest.mark.parametrize("data", CUT_SHORT, ids=range(len(CUT_SHORT)))
def test_a_picture_cut_short_is_refused_or_whole(data: bytes) -> None:
    whole = np.asarray(decode_image(data))
    refused = 0
    for cut in range(1, len(data), max(1, len(data) // 37)):
        found = decode_or_code(data[:cut])
        assert found in ("image_truncated", "image_undecodable") or np.array_equal(np.asarray(found), whole), cut
        refused += isinstance(found, str)
    assert refused > 20


def patched(data: bytes, offset: int, format: str, *values: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(format, changed, offset, *values)
    return bytes(changed)


SMALL = Image.new("RGB", (16, 16), "red")
JPEG = encode(SMALL, "JPEG")
BOMBS = {
    "gif": patched(encode(SMALL, "GIF"), 6, "<HH", 65535, 65535),
    "bmp": patched(encode(SMALL, "BMP"), 18, "<ii", 9000, 9000),
    "jpeg": patched(JPEG, JPEG.index(b"\xff\xc0") + 5, ">HH", 9000, 9000),
    "png": png_of(9000, 9000, b""),
    "png-2e31": png_of(2**31 - 1, 2**31 - 1, b""),
    "webp": encode(Image.new("L", (9000, 9000)).convert("RGB"), "WEBP", lossless=True, quality=0, method=0),
    "icon": icon_of(encode(Image.new("1", (9000, 9000)))),
    "icon-bitmap": icon_of(struct.pack("<IiiHHIIiiII", 40, 9000, 18000, 1, 32, 0, 0, 0, 0, 0, 0)),
    "qoi": b"qoif" + struct.pack(">II", 2000, 2000) + b"\3\0" + b"\xfd" * 70_000,
    "plain-ppm": b"P3 2000 2000 255\n" + b"1 " * 100_000,
    "jpeg-scans": patched(
        JPEG[:-2] + JPEG[JPEG.index(b"\xff\xda") : -2] * 30 + JPEG[-2:],
        JPEG.index(b"\xff\xc0") + 5,
        ">HH",
        7900,
        7900,
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_by_their_header(name: str) -> None:
    tracemalloc.start()
    with pytest.raises(SampleError) as caught:
        decode_image(BOMBS[name])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.reason_code == "image_too_large"
    assert peak < 4 << 20


def test_compressed_metadata_is_bounded() -> None:
    packed = zlib.compress(bytes(100 << 20))
    for kind in (b"zTXt", b"iCCP"):
        with pytest.raises(SampleError, match="too large"):
            decode_image(png_of(1, 1, bytes(4), more=chunk(kind, b"a\0\0" + packed)))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_no_pixels_are_refused(size: tuple[int, int]) -> None:
    for data in (png_of(*size, b""), patched(encode(SMALL, "BMP"), 18, "<ii", *size)):
        with pytest.raises(SampleError):
            decode_image(data)


def test_threads_hide_warnings_together() -> None:
    odd = encode(Image.new("P", (64, 64)), "PNG", transparency=b"\0\1")
    large = encode(Image.new("1", (9500, 9500)))  # Pillow warns from 89 million pixels on
    exif = encode(SMALL, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")

    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(decode_or_code, [odd, large, exif] * 20))
    assert Counter(one if isinstance(one, str) else one.mode for one in found) == {"RGB": 40, "image_too_large": 20}
    assert warnings.filters == before


def test_no_damage_makes_decoding_raise_anything_else() -> None:
    rng = random.Random(3)
    frames = [noise(16, 16, seed) for seed in range(3)]
    wholes = [
        *CUT_SHORT,
        encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        encode(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        encode(frames[0], "MPO", save_all=True, append_images=frames[1:]),
        encode(frames[0], "ICO", sizes=[(16, 16)]),
        encode(frames[0].convert("CMYK"), "JPEG"),
        encode(frames[0].convert("P"), "PNG", transparency=0),
    ]
    for _ in range(200):
        changed = bytearray(rng.choice(wholes))
        for _ in range(rng.randint(1, 4)):
            at, run = rng.randrange(len(changed) or 1), rng.choice((1, 2, 8, 100))
            match rng.randrange(4):
                case 0:
                    changed[at : at + run] = rng.randbytes(run)
                case 1:
                    del changed[at : at + run]
                case 2:
                    changed[at:at] = rng.choice(wholes)[at : at + run]
                case _:
                    del changed[at:]
        found = decode_or_code(bytes(changed))
        assert found in REASON_CODES if isinstance(found, str) else found.mode == "RGB"


def test_every_odd_picture_behaves_as_expected(test_data: Path) -> None:
    folder = test_data / "data" / "broken"
    expected = json.loads((folder / "expected.json").read_text("utf-8"))
    pictures = {name: wanted["pil"] for name, wanted in expected.items() if name.startswith("images/")}
    assert len(pictures) == 127
    for name, pillow in pictures.items():
        found = decode_or_code((folder / name).read_bytes())
        if name == "images/own-10000x1.png":
            assert found == "image_shape"
        elif pillow.startswith("decodes"):
            assert not isinstance(found, str), (name, found)
            assert found.mode == "RGB"
        else:
            allowed = ("image_too_large",) if "Bomb" in pillow else ("image_undecodable", "image_truncated")
            assert found in allowed, (name, found)


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


@pytest.mark.parametrize("shape", [(1, 200), (200, 1), (3, 420)])
def test_a_thin_picture_is_cropped_without_scaling_all_of_it(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = noise(*shape)
    thin = crop_image(picture, (512, 512))
    made: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def noted(image: Image.Image, size: tuple[int, int], *rest: object) -> Image.Image:
        made.append(size)
        return resize(image, size, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", noted)
    assert crop_image(picture, (512, 512)) == thin
    assert made == [(512, 512)], "0.8 GB for a picture of 1x200 that covers 1024x1024"
    monkeypatch.setattr(images_module, "MAX_COVERING_PIXELS", 512 * 512 * 200)
    whole = crop_image(picture, (512, 512))
    assert made[1] != (512, 512)
    assert np.abs(np.asarray(thin).astype(int) - np.asarray(whole)).max() <= 1


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
