"""Position ids: Qwen2.5-VL's three-axis positions of a conversation, and FLUX's of latent and context tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nexusgen.errors import ShapeError

TokenPositions = Literal["zeros", "grid"]

_MERGER_SPAN = 36.0  # positions on a side of an image in the editing conditioner


def conversation_positions(
    input_ids: Int[np.ndarray, " length"], grids: Sequence[tuple[int, int]], image_token_id: int
) -> tuple[Int[np.ndarray, "3 length"], int]:
    """Positions (time, row, column) of every token of one conversation, and the position of the token after it.

    Text at p has (p, p, p). An image starting at p has (p, p + row, p + column) on its token grid; the text after it
    goes on at p + max(height, width). Source: M-RoPE of Qwen2-VL (arXiv 2409.12191, section 2.1), without video.

    Raises: ShapeError if the runs of image tokens don't fit `grids` (h, w in tokens, one per image, in order).
    """
    length = len(input_ids)
    positions = np.empty((3, length), dtype=np.int64)
    places = np.flatnonzero(input_ids == image_token_id).tolist()  # of image tokens
    index, position, num_placed = 0, 0, 0
    for height, width in grids:
        start = places[num_placed] if num_placed < len(places) else length
        end = start + height * width
        num_placed += height * width
        if num_placed > len(places) or (end > start and places[num_placed - 1] != end - 1):
            raise ShapeError(f"an image of {height}x{width} tokens doesn't fit the image tokens at index {start}")
        positions[:, index:start] = np.arange(position, position + start - index)
        position += start - index
        np.add(_image_offsets(height, width), position, out=positions[:, start:end])
        position += max(height, width)
        index = end
    if num_placed < len(places):
        raise ShapeError(f"image tokens at index {places[num_placed]} have no grid")
    positions[:, index:] = np.arange(position, position + length - index)
    return positions, position + length - index


def image_offsets(height: int, width: int) -> Int[np.ndarray, "3 tokens"]:
    """Positions of an image's tokens relative to its first: (0, row, column) in raster order."""
    return _image_offsets(height, width).copy()


@functools.lru_cache(maxsize=256)  # data has few grids, and the largest takes 8 KB
def _image_offsets(height: int, width: int) -> Int[np.ndarray, "3 tokens"]:
    rows, columns = np.divmod(np.arange(height * width), width)
    return np.stack([np.zeros_like(rows), rows, columns])


# --- FLUX ------------------------------------------------------------------------------------------------------------


def flux_image_ids(latent_hw: tuple[int, int]) -> Float[Tensor, "tokens 3"]:
    """Rope ids (0, row, column) of the latent's 2x2 patches in raster order; `latent_hw` in latent pixels.

    Source: FLUX.1 [dev], `prepare_image_ids` of DiffSynth-Studio's FluxDiT. Raises: ShapeError if a side is odd.
    """
    height, width = latent_hw
    if height % 2 or width % 2:
        raise ShapeError(f"latent of {height}x{width}: FLUX cuts it into 2x2 patches, so both sides must be even")
    return _grid_ids((height // 2, width // 2), (1.0, 1.0))


def flux_token_ids(
    token_grid: tuple[int, int], latent_hw: tuple[int, int], mode: TokenPositions, image_index: int = 0
) -> Float[Tensor, "tokens 3"]:
    """Rope ids of the image embeddings that condition the transformer.

    `zeros`: all (0, 0, 0), as the released generation decoder. `grid`: the tokens are laid over the image,
    (image_index, row * latent_height / (2 grid_height), column * latent_width / (2 grid_width)), fractions kept: the
    released editing decoder's rule (its 18 is the grid in patches, twice the grid in tokens), in which the target has
    index 0 and the reference 1.
    """
    rows, columns = token_grid
    if mode == "zeros":
        return torch.zeros(rows * columns, 3)
    ids = _grid_ids(token_grid, (latent_hw[0] / (2 * rows), latent_hw[1] / (2 * columns)))
    ids[:, 0] = image_index
    return ids


def merger_positions(grids: Sequence[tuple[int, int]]) -> Float[Tensor, "3 tokens"]:
    """Positions (0, row, column) of images' tokens in the editing conditioner, one image after another.

    Every image spans the same 36 positions on each side, so that tokens of the same place overlap; fractions are kept.
    Source: Nexus-Gen, `modeling/decoder` (`embedding_merger`): 72 over the grid in patches, two patches a token.
    """
    ids = [_grid_ids(grid, (_MERGER_SPAN / grid[0], _MERGER_SPAN / grid[1])) for grid in grids]
    return torch.cat(ids).T


def _grid_ids(grid: tuple[int, int], step: tuple[float, float]) -> Float[Tensor, "tokens 3"]:
    ids = torch.zeros(*grid, 3)
    ids[..., 1] = torch.arange(grid[0])[:, None] * step[0]
    ids[..., 2] = torch.arange(grid[1])[None, :] * step[1]
    return ids.flatten(0, 1)
