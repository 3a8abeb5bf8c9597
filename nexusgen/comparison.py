"""Tensors compared with recorded ones, the tolerances of the comparison, and how recorded files are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from jaxtyping import Shaped
from pydantic import BaseModel, ValidationError
from torch import Tensor

from nexusgen.errors import InputError, ShapeError
from nexusgen.model.tensors import iterate_file

ExpectedT = TypeVar("ExpectedT", bound=BaseModel)

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
        return _of_another_shape(name, got, want, tolerance)
    difference = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
    scale = want.double().abs().max().item() if want.numel() else 0.0
    relative = difference / scale if scale else difference
    return Case(name, difference, relative, tolerance, relative <= tolerance)


def _of_another_shape(name: str, got: Shaped[Tensor, ...], want: Shaped[Tensor, ...], tolerance: float) -> Case:
    return Case(f"{name} (shape {tuple(got.shape)}, want {tuple(want.shape)})", _NAN, _NAN, tolerance, False)


def not_compared(name: str, reason: str) -> Case:
    """Something recorded that can't be compared: it fails, so that nothing passes unseen."""
    return Case(f"{name} (not compared: {reason})", _NAN, _NAN, 0.0, False)


def say_nothing(_: str) -> None:
    """Where nobody wants to know what is skipped."""


def computed(name: str, cases: Iterator[Case]) -> Iterator[Case]:
    """The cases; where recorded inputs don't fit together, a failing one in place of torch's complaint about them."""
    try:
        yield from cases
    except (ShapeError, RuntimeError, ValueError, LookupError, TypeError) as error:
        yield not_compared(name, f"its inputs don't fit together: {' '.join(repr(error).split())[:300]}")


def compare_l2(name: str, got: Shaped[Tensor, ...], want: Shaped[Tensor, ...], tolerance: float) -> Case:
    """Compare by |got - want| / |want| in the L2 norm, for bf16 runs. Fails as `compare` does."""
    if got.shape != want.shape:
        return _of_another_shape(name, got, want, tolerance)
    difference = (got.double() - want.double()).abs().max().item()
    relative = ((got.double() - want.double()).norm() / want.double().norm()).item()
    return Case(name, difference, relative, tolerance, relative <= tolerance)


def compare_exact(name: str, got: Shaped[Tensor, ...], want: Shaped[Tensor, ...]) -> Case:
    """Compare integers (token ids, positions): any difference fails."""
    return compare(name, got, want, 0.0)


class Recorded(Mapping[str, Shaped[Tensor, "..."]]):
    """The tensors of a recorded file; remembers which have been asked for, so that none is passed over unseen."""

    def __init__(self, path: Path) -> None:
        """Raises: ModelError if the file is absent or damaged."""
        self.path = path
        self._tensors = dict(iterate_file(path))
        self._used: set[str] = set()

    def __getitem__(self, name: str) -> Shaped[Tensor, "..."]:
        tensor = self._tensors[name]
        self._used.add(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def unused(self) -> list[str]:
        return sorted(self._tensors.keys() - self._used)


def read_expected(folder: Path, cls: type[ExpectedT]) -> ExpectedT:
    """A golden set's `expected.json`. Raises: InputError naming what is wrong in it."""
    path = folder / "expected.json"
    try:
        return cls.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}") from None
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in detail["loc"]) or "the file"
        raise InputError(f"{path}: {place}: {detail['msg']}") from None
