"""`nexusgen.json`, which says what a model folder holds. Read without torch, so that a driver starts quickly."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from nexusgen import __version__
from nexusgen.config import Config
from nexusgen.errors import ModelError
from nexusgen.geometry import Geometry
from nexusgen.schema import MANIFEST_NAME

# How a decoder in bf16 treats numbers that aren't weights. `reference`: guidance, rope ids of the context and the
# frequencies of the merger are rounded to bf16, and so are the latents between the steps of sampling, as when the
# released weights were trained and run. `exact`: all of them in fp32.
Numerics = Literal["reference", "exact"]


class Manifest(Config):
    """`nexusgen.json`: what a model folder holds and where it came from."""

    version: str = __version__
    parts: tuple[str, ...]
    fingerprints: dict[str, str]  # sha256 by part, over names, shapes and bytes of its tensors; `vision` is the tower's
    # Of the whole folder, 16 digits: sha256 over all that changes an answer: the parts' fingerprints, the small files
    # beside the weights (configurations, tokenizer, constants), the sizes and defaults below; not the lineage.
    fingerprint: str
    geometry: Geometry
    token_counts: dict[str, int] = Field(default_factory=dict)  # of an image in the roles `target` and `reference`
    image_size: tuple[int, int]  # (height, width) in pixels that the decoder makes by default
    num_inference_steps: int
    true_cfg_scale: float
    numerics: Numerics = "reference"
    lineage: dict[str, Any] = Field(default_factory=dict)


def demo_base() -> Path:
    """The tiny base model that ships with the project; made by `nexusgen make-base`."""
    return Path(__file__).parent.parent / "demo_base"


def read_manifest(folder: Path) -> Manifest:
    """Raises: ModelError if the folder has no readable `nexusgen.json`."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ModelError(f"{folder} is not a model folder: it holds no {MANIFEST_NAME}")
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, ValueError) as error:
        raise ModelError(f"{path} can't be read as a model manifest: {error}") from None
