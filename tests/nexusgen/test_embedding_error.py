from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from nexusgen.embedding_error import position_errors
from nexusgen.errors import ShapeError
from nexusgen.losses import autoregressive_losses


def test_errors_are_those_of_each_position() -> None:
    targets = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 1.0]]])
    predictions = targets.clone()
    predictions[0, 1] = torch.tensor([0.0, 1.0])  # at a right angle
    predictions[1, 0] *= -1
    errors = position_errors(predictions, targets)
    assert errors.mse.tolist() == [[0, 1], [8, 0]]
    assert errors.cosine.tolist() == [[1, 0], [-1, pytest.approx(1)]]


def test_their_means_are_the_losses_of_training() -> None:
    generator = torch.Generator().manual_seed(0)
    predictions, targets = (torch.randn(5, 9, 16, generator=generator) for _ in range(2))
    losses = autoregressive_losses(
        torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), predictions.flatten(0, 1), targets.flatten(0, 1)
    )
    errors = position_errors(predictions, targets)
    assert errors.mse.mean().item() == pytest.approx(losses["mse"].mean.item(), rel=1e-6)
    assert 1 - errors.cosine.mean().item() == pytest.approx(losses["cosine"].mean.item(), rel=1e-6)


def test_other_shapes_are_refused() -> None:
    with pytest.raises((ShapeError, TypeCheckError)):  # annotations are checked in tests alone
        position_errors(torch.zeros(2, 3, 4), torch.zeros(2, 4, 4))
