"""Pictures: decoded from untrusted bytes, resized for each role, cut into the vision tower's patches.

Sizes are (height, width) everywhere; PIL's (width, height) is met only here. Resizing follows the released code
(github.com/modelscope/Nexus-Gen, July 2025: `train/`, `modeling/`); the patches are those of transformers'
`Qwen2VLImageProcessorPil`, equal to the released processor bit for bit.
"""

from __future__ import annotations

import functools
import io
import json
import struct
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from nexusgen.errors import SampleError, ShapeError
from nexusgen.geometry import Geometry

MAX_IMAGE_PIXELS = 64_000_000  # 8,000 x 8,000; above every camera in the data, 200 MB once decoded
MAX_ASPECT_RATIO = 200.0  # the limit of Qwen2.5-VL's smart resize
MAX_SLOW_PIXELS = 2_000_000  # where Pillow decodes in Python (QOI, plain and 16-bit PPM, RLE): microseconds per pixel
MAX_COVERING_PIXELS = 16_000_000  # of a picture scaled to be cropped: 1024x1024 at an aspect ratio of 15
MAX_SCANNED_PIXELS = 20 * MAX_IMAGE_PIXELS  # pixels x scans of a JPEG: a scan costs the time of the whole picture

# Formats opened: raster formats that decode in-process. Others (EPS runs Ghostscript, PDF, FITS...) are refused.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "QOI", "DIB")

_ROWS_AT_ONCE = 256  # of a deep picture, while it is scaled
_EXIF_ORIENTATION = 0x0112
_MADE_BY = "made by an AI model (trainedAlgorithmicMedia)"  # IPTC's term for it
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes) -> Image.Image:
    """Any picture's bytes as an upright RGB image: first frame, alpha on white, format known by content.

    The pixel count and the aspect ratio are checked in the header, before anything is decoded. Deep greys are scaled to
    8 bits, CMYK is converted without its colour profile, colour profiles are ignored.
    Raises: SampleError `image_undecodable`, `image_truncated`, `image_too_large` or `image_shape`.
    """
    with _opened(data) as image:
        image.load()
        orientation = _orientation(image)
        upright = _to_rgb(image)
    return upright.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else upright


def check_image(data: bytes) -> None:
    """Raise what `decode_image` would raise at the picture's header; nothing is decoded."""
    with _opened(data):
        pass


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """A picture whose header has been judged; whatever is raised while it is worked on becomes a SampleError."""
    if not data:
        raise SampleError("image_undecodable", "the image has no bytes")
    with _PILLOW_IS_QUIET:
        try:
            for size in _sizes_in_icon(data):
                _check_size(size, MAX_IMAGE_PIXELS)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_header(image, data)
                yield image
        except SampleError:
            raise
        except Image.DecompressionBombError as error:
            raise SampleError("image_too_large", str(error)) from None
        except UnidentifiedImageError:
            raise SampleError("image_undecodable", f"not a picture of a known format ({data[:8]!r}...)") from None
        except Exception as error:  # decoders fed with damaged bytes raise almost anything, MemoryError included
            text = f"{type(error).__name__}: {error}"
            code = "image_truncated" if _speaks_of_truncation(text) else "image_undecodable"
            raise SampleError(code, text[:300]) from None


class _Quiet:
    """Hides Pillow's warnings of odd metadata and large images, which are judged here, while any thread decodes.

    `warnings.catch_warnings` alone would let a thread that leaves early bring them back for the others.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._saved = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_inside:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside:
                self._saved.__exit__(None, None, None)


_PILLOW_IS_QUIET = _Quiet()


def _check_header(image: Image.Image, data: bytes) -> None:
    is_slow = any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ()))  # the registry of those in Python
    _check_size(image.size, MAX_SLOW_PIXELS if is_slow else MAX_IMAGE_PIXELS)
    if image.format in ("JPEG", "MPO"):
        num_scans = data.count(b"\xff\xda")  # coded data holds no such bytes
        if num_scans * image.width * image.height > MAX_SCANNED_PIXELS:
            raise SampleError(
                "image_too_large", f"a JPEG of {image.height}x{image.width} (h x w) in {num_scans:,} scans"
            )


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise SampleError("image_shape", f"{height}x{width} (h x w) pixels")
    if width * height > max_pixels:
        raise SampleError("image_too_large", f"{height}x{width} (h x w) pixels; at most {max_pixels:,} are decoded")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise SampleError("image_shape", f"{height}x{width} (h x w); aspect ratios up to {MAX_ASPECT_RATIO:g} are used")


def _sizes_in_icon(data: bytes) -> list[tuple[int, int]]:
    """(width, height) of the pictures in an icon, which Pillow decodes as it opens it; of other pictures nothing."""
    if not data.startswith(b"\0\0\1\0"):
        return []
    sizes = []
    for entry in range(struct.unpack_from("<H", data, 4)[0]):
        (offset,) = struct.unpack_from("<I", data, 6 + 16 * entry + 12)
        if data[offset : offset + 4] == b"\x89PNG":
            sizes.append(struct.unpack_from(">II", data, offset + 16))
        else:
            width, height = struct.unpack_from("<ii", data, offset + 4)
            sizes.append((abs(width), abs(height) // 2))  # the picture and its mask, one above the other
    return sizes


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF raises many things, and a picture without EXIF is upright
        return 1


def _speaks_of_truncation(text: str) -> bool:
    return any(word in text.lower() for word in ("truncated", "not enough", "ended prematurely"))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_to_rgb(image)
    clear = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in clear)  # of 16-bit colours, which are 8-bit by now
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or clear is not None:
        # Premultiplied modes reach RGBA by their own conversion; everything else has a direct one.
        source = image.convert("LA") if image.mode == "La" else image
        layer = source.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        white.alpha_composite(layer)
        return white.convert("RGB")
    return image.convert("RGB")


def _deep_to_rgb(image: Image.Image) -> Image.Image:
    """Greys of 12, 16 or 32 bits or floats as 8 bits; the colour that is declared transparent becomes white.

    Values are brought to 0..255 from the range of the file's bits (of float 0..1), or, where they exceed it, from the
    smallest of 0..255, 0..65535 and 0..maximum that holds them. Nothing is clipped but negative values; NaN and
    infinities are black.
    """
    values = np.asarray(image)
    is_finite = np.isfinite(values) if image.mode == "F" else True
    top = float(np.max(values, where=is_finite, initial=0))
    white = next((limit for limit in _white_levels(image) if top <= limit), top)
    clear = image.info.get("transparency")
    grey = np.empty(values.shape, dtype=np.uint8)
    for first in range(0, len(values), _ROWS_AT_ONCE):
        band = values[first : first + _ROWS_AT_ONCE].astype(np.float64)
        scaled = np.nan_to_num(band, nan=0.0, posinf=0.0, neginf=0.0) * (255 / white)
        grey[first : first + _ROWS_AT_ONCE] = np.clip(np.round(scaled), 0, 255)
        if isinstance(clear, int):
            grey[first : first + _ROWS_AT_ONCE][band == clear] = 255
    return Image.fromarray(grey).convert("RGB")


def _white_levels(image: Image.Image) -> tuple[int, ...]:
    """What may be white in a deep picture, in rising order."""
    if image.mode == "F":
        return 1, 255, 65535
    if image.mode == "I" and image.format == "TIFF":
        return 255, 65535  # 32 bits, which nobody fills
    num_bits = image.tag_v2.get(258, 16) if isinstance(image, TiffImagePlugin.TiffImageFile) else 16
    num_bits = num_bits[0] if isinstance(num_bits, tuple) else num_bits
    return (4095, 65535) if num_bits == 12 else (65535,)


def input_size(size: tuple[int, int], geometry: Geometry) -> tuple[int, int]:
    """(height, width) at which a user's image of `size` is seen: whole tokens, within the model's range of pixels.

    Source: Qwen2.5-VL's smart resize. Raises: SampleError `image_shape` for an aspect ratio above 200.
    """
    try:
        resized: tuple[int, int] = smart_resize(
            *size, geometry.factor, geometry.min_input_pixels, geometry.max_input_pixels
        )
    except ValueError as error:
        raise SampleError("image_shape", str(error)) from None
    return resized


def input_image(image: Image.Image, geometry: Geometry) -> Image.Image:
    """A user's image in its own aspect at `input_size`, bicubic. Raises: SampleError as `input_size`."""
    return _squash(image, input_size((image.height, image.width), geometry), Image.Resampling.BICUBIC)


def target_image(image: Image.Image, geometry: Geometry) -> Image.Image:
    """The image that the autoregressive model learns to predict: squashed to a square, bicubic."""
    return _squash(image, (geometry.target_size, geometry.target_size), Image.Resampling.BICUBIC)


def crop_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scaled to cover (height, width), bilinear, and centre-cropped: what the decoders' latents are made of.

    Of a picture so thin that it would be scaled to more than `MAX_COVERING_PIXELS`, the crop alone is computed; its
    values then may differ by one from those of the whole.
    Source: DiffSynth-Studio `crop_and_resize`, with torchvision's rounding of sizes and offsets.
    """
    height, width = size
    scale = max(width / image.width, height / image.height)
    # A covered side may round to one pixel less than it must cover: the crop never leaves the image.
    scaled = (max(height, round(image.height * scale)), max(width, round(image.width * scale)))
    top, left = round((scaled[0] - height) / 2), round((scaled[1] - width) / 2)
    if scaled[0] * scaled[1] > MAX_COVERING_PIXELS:
        down, across = image.height / scaled[0], image.width / scaled[1]  # pixels of the picture for one of the result
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        return image.resize((width, height), Image.Resampling.BILINEAR, box)
    covering = _squash(image, scaled, Image.Resampling.BILINEAR)
    return covering.crop((left, top, left + width, top + height))


def reference_image(image: Image.Image, geometry: Geometry, training: bool) -> Image.Image:
    """The image edited from, as the editing decoder sees it: a square, bicubic in training, bilinear at inference."""
    resampling = Image.Resampling.BICUBIC if training else Image.Resampling.BILINEAR
    return _squash(image, (geometry.reference_size, geometry.reference_size), resampling)


def image_for_role(image: Image.Image, role: str, geometry: Geometry) -> Image.Image:
    """The image as stored embeddings of `role` see it (`schema.VISION_ROLES`; references as in training)."""
    if role == "input":
        return input_image(image, geometry)
    if role == "target":
        return target_image(image, geometry)
    if role == "crop":
        return crop_image(image, (geometry.target_size, geometry.target_size))
    if role == "reference":
        return reference_image(image, geometry, training=True)
    raise ValueError(f"unknown role {role!r}")


def _squash(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    return image.resize((size[1], size[0]), resampling)


def to_patches(
    images: Sequence[Image.Image], geometry: Geometry
) -> tuple[Float[Tensor, "patches channels_frames_pixels"], Int[Tensor, "images 3"]]:
    """RGB images of whole tokens as the vision tower's patches, and each one's patch grid (1, h, w).

    Values are normalised with CLIP's mean and standard deviation; the two frames of a patch are equal.
    Raises: ShapeError if a side isn't a multiple of a token's.
    """
    for image in images:
        if image.width % geometry.factor or image.height % geometry.factor:
            raise ShapeError(
                f"an image of {image.height}x{image.width} (h x w) pixels isn't made of whole tokens of "
                f"{geometry.factor} pixels"
            )
    processor, normalised = _image_processor(geometry.patch_size, geometry.merge_size)
    patches, grids = [], []
    for image in images:
        pixels = np.asarray(image.convert("RGB"))
        values = np.stack([normalised[channel][pixels[:, :, channel]] for channel in range(3)])
        of_image, rows, columns = processor.patchify(
            values, processor.patch_size, processor.merge_size, processor.temporal_patch_size
        )
        patches.append(torch.from_numpy(of_image))
        grids.append((1, rows, columns))
    return torch.cat(patches), torch.tensor(grids)


@functools.cache
def _image_processor(
    patch_size: int, merge_size: int
) -> tuple[Qwen2VLImageProcessorPil, Float[np.ndarray, "channels 256"]]:
    """transformers' processor, and what its rescaling and normalising make of each of a channel's 256 values.

    Looked up, an image takes a third of the time that the processor takes for it, and has the same bits.
    """
    processor = Qwen2VLImageProcessorPil(patch_size=patch_size, merge_size=merge_size, do_resize=False)
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    rescaled = processor.rescale(levels, processor.rescale_factor)
    return processor, processor.normalize(rescaled, processor.image_mean, processor.image_std)[:, 0]


def image_processor(geometry: Geometry) -> Qwen2VLImageProcessorPil:
    """The processor that a model folder stores, so that plain transformers resizes a user's image as we do."""
    return Qwen2VLImageProcessorPil(
        patch_size=geometry.patch_size,
        merge_size=geometry.merge_size,
        min_pixels=geometry.min_input_pixels,
        max_pixels=geometry.max_input_pixels,
    )


def to_pixels(images: Sequence[Image.Image]) -> Float[Tensor, "batch 3 height width"]:
    """RGB images of one size as float32 in [-1, 1], as autoencoders take them. Raises: ShapeError for mixed sizes."""
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ShapeError(f"expected images of one size, found sizes {sorted(sizes)} (w, h)")
    array = np.stack([np.asarray(image.convert("RGB"), dtype=np.uint8) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()


def from_pixels(pixels: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """Images from values in [-1, 1]; values outside are clipped."""
    array = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(row) for row in array.permute(0, 2, 3, 1).cpu().numpy()]


def encode_picture(
    image: Image.Image, made: Mapping[str, str | int | float | None], image_format: str = "PNG", quality: int = 95
) -> bytes:
    """A generated picture as PNG, JPEG or WEBP, which says that a model made it and, as json, from what (`made`).

    PNG holds it in the text chunks Software, Source and nexusgen, the others in EXIF's Software and ImageDescription.
    `quality` is that of JPEG and WEBP, 0 to 100.
    """
    details = json.dumps({**made, "width": image.width, "height": image.height})
    buffer = io.BytesIO()
    if image_format == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for name, text in (("Software", "nexusgen"), ("Source", _MADE_BY), ("nexusgen", details)):
            chunks.add_text(name, text)
        image.save(buffer, "PNG", pnginfo=chunks)
    else:
        exif = Image.Exif()
        exif[ExifTags.Base.Software] = "nexusgen"
        exif[ExifTags.Base.ImageDescription] = f"{_MADE_BY} {details}"
        image.save(buffer, image_format, exif=exif, quality=quality)
    return buffer.getvalue()
