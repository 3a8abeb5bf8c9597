"""How far predicted image embeddings are from the true ones, by their position in the image.

Autoregression predicts an image token by token, in raster order; where an error feeds the next prediction, the error
grows with the position, and where it doesn't, it stays flat (arXiv 2504.21356, section 3.2). So errors are kept apart
by position: what `evaluate` shows of a model, and what the two ways of predicting are compared by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from jaxtyping import Float
from torch import Tensor

from nexusgen.errors import ShapeError


@dataclass(frozen=True)
class PositionErrors:
    """Of each image and each of its positions, in raster order: the mean squared error over the embedding's numbers,
    and the cosine between embeddings (1: same direction)."""

    mse: Float[Tensor, "images tokens"]
    cosine: Float[Tensor, "images tokens"]


def position_errors(
    predictions: Float[Tensor, "images tokens hidden"], targets: Float[Tensor, "images tokens hidden"]
) -> PositionErrors:
    """Errors of whole images, in fp32. Their means over everything are stage ar's losses `mse` and 1 - `cosine`.

    Raises: ShapeError if the shapes differ.
    """
    if predictions.shape != targets.shape or predictions.ndim != 3:
        raise ShapeError(
            f"predictions {tuple(predictions.shape)} and targets {tuple(targets.shape)} can't be compared: both must "
            "be (images, tokens, hidden)"
        )
    predictions, targets = predictions.float(), targets.float()
    return PositionErrors(
        mse=(predictions - targets).square().mean(dim=-1),
        cosine=F.cosine_similarity(predictions, targets, dim=-1),
    )
