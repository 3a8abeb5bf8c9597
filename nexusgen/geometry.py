"""The sizes of a model's images: what is squashed, cropped and counted in tokens. Numbers alone, no torch."""

from __future__ import annotations

from pydantic import model_validator

from nexusgen import defaults
from nexusgen.config import Config


class Geometry(Config):
    """The sizes of a model's images, in pixels; part of its manifest. The defaults are the released model's."""

    patch_size: int = defaults.PATCH_SIZE
    merge_size: int = defaults.MERGE_SIZE
    target_size: int = defaults.TARGET_SIZE
    reference_size: int = defaults.REFERENCE_SIZE
    min_input_pixels: int = defaults.MIN_INPUT_PIXELS
    max_input_pixels: int = defaults.MAX_INPUT_PIXELS

    @model_validator(mode="after")
    def _check(self) -> Geometry:
        for name in ("target_size", "reference_size"):
            size = getattr(self, name)
            if size <= 0 or size % self.factor:
                raise ValueError(f"{name} is {size}; it must be a positive multiple of {self.factor}")
        if self.min_input_pixels > self.max_input_pixels or self.max_input_pixels < self.factor**2:
            raise ValueError(
                f"input images of {self.min_input_pixels} to {self.max_input_pixels} pixels: "
                f"expected a range that holds a token's {self.factor}x{self.factor}"
            )
        return self

    @property
    def factor(self) -> int:
        """Pixels on a side of one token."""
        return self.patch_size * self.merge_size

    @property
    def target_grid(self) -> tuple[int, int]:
        """Token grid of a target image."""
        side = self.target_size // self.factor
        return side, side

    @property
    def reference_grid(self) -> tuple[int, int]:
        """Token grid of a reference image."""
        side = self.reference_size // self.factor
        return side, side

    @property
    def num_target_tokens(self) -> int:
        """Tokens of a target image, which are also the query embeddings of a predicted one."""
        return self.target_grid[0] * self.target_grid[1]
