"""Losses as sums and counts, so that a step over any number of ranks can be normalised by its global counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from jaxtyping import Float, Int
from torch import Tensor

from nexusgen import defaults

AUTOREGRESSIVE_WEIGHTS: Mapping[str, float] = {
    "ce": defaults.TOKEN_LOSS_WEIGHT,
    "mse": 0.5 * defaults.IMAGE_LOSS_WEIGHT,
    "cosine": 0.5 * defaults.IMAGE_LOSS_WEIGHT,
}


@dataclass(frozen=True)
class LossPart:
    """One named part of a loss: its sum over `count` terms. The mean is `sum / count`, or 0 without terms."""

    sum: Float[Tensor, ""]
    count: int

    @property
    def mean(self) -> Float[Tensor, ""]:
        return self.sum / max(self.count, 1)


def autoregressive_losses(
    logits: Float[Tensor, "texts vocabulary"],
    labels: Int[Tensor, " texts"],
    predictions: Float[Tensor, "tokens hidden"],
    targets: Float[Tensor, "tokens hidden"],
) -> dict[str, LossPart]:
    """The three parts of the paper's phase-1 loss, in fp32.

    ce: cross entropy over supervised text tokens. mse: over all numbers of the predicted embeddings. cosine: 1 - cos
    over embeddings. Targets must be detached. Source: Nexus-Gen, section 3.2, and its released `modeling_qwen2_5_vl`.
    """
    predictions, targets = predictions.float(), targets.float()
    return {
        "ce": LossPart(F.cross_entropy(logits.float(), labels, reduction="sum"), labels.numel()),
        "mse": LossPart((predictions - targets).square().sum(), targets.numel()),
        "cosine": LossPart((1 - F.cosine_similarity(predictions, targets, dim=-1)).sum(), targets.shape[0]),
    }


def total_loss(
    parts: Mapping[str, LossPart], weights: Mapping[str, float], counts: Mapping[str, int] | None = None
) -> Float[Tensor, ""]:
    """Weighted sum of the parts' means; `counts` gives global counts where a step spans ranks or accumulation."""
    counts = counts if counts is not None else {name: part.count for name, part in parts.items()}
    terms = [weights[name] * part.sum / max(counts[name], 1) for name, part in parts.items()]
    return torch.stack(terms).sum()
