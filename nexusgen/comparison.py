"""Tensors compared with recorded ones, and the tolerances of the comparison."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Shaped
from torch import Tensor

FP32_TOLERANCE = 2e-6  # max|a-b| / max|b| per tensor
GRADIENT_TOLERANCE = 5e-6
BF16_TOLERANCE = 2e-2  # relative L2
_NAN = float("nan")
TOKEN_MARGIN = 1e-4  # token ids must be equal where the reference's top-2 margin exceeds this


@dataclass(frozen=True)
class Case:
    """One compared tensor. `max_rel` is max|a-b| / max|b|, or the relative L2 error of a bf16 case; NaN fails."""

    name: str
    max_abs: float
    max_rel: float
    tolerance: float
    passed: bool


def compare(name: str, got: Shaped[Tensor, ...], want: Shaped[Tensor, ...], tolerance: float) -> Case:
    """Compare by max|got - want| / max|want|. A difference in shape, or a NaN on either side, fails."""
    if got.shape != want.shape:
        return Case(f"{name} (shape {tuple(got.shape)}, want {tuple(want.shape)})", _NAN, _NAN, tolerance, False)
    difference = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
    scale = want.double().abs().max().item() if want.numel() else 0.0
    relative = difference / scale if scale else difference
    return Case(name, difference, relative, tolerance, relative <= tolerance)


def not_compared(name: str, reason: str) -> Case:
    """A recorded tensor that can't be compared: it fails, so that nothing passes unseen."""
    return Case(f"{name} (not compared: {reason})", _NAN, _NAN, 0.0, False)


def compare_l2(name: str, got: Shaped[Tensor, ...], want: Shaped[Tensor, ...], tolerance: float) -> Case:
    """Compare by |got - want| / |want| in the L2 norm, for bf16 runs."""
    difference = (got.double() - want.double()).abs().max().item()
    relative = ((got.double() - want.double()).norm() / want.double().norm()).item()
    return Case(name, difference, relative, tolerance, relative <= tolerance)


def compare_exact(name: str, got: Shaped[Tensor, ...], want: Shaped[Tensor, ...]) -> Case:
    """Compare integers (token ids, positions): any difference fails."""
    return compare(name, got, want, 0.0)
