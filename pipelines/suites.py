"""What `evaluate` measures: each suite cuts its items into units, turns a unit into rows, and sums rows up as scores.

A suite is its own settings, so that two evaluations are the same exactly if their suites are equal. No Ray here: a
worker is built in an actor, around a model loaded there. Suites stand in modules of their own:

| suite | rows are | scores |
|---|---|---|
| `suite_demo_world.py` | a prompt or edit with its picture, a question with its answer | by category, language, kind |
| `suite_reconstruction.py` | a picture drawn from its own embeddings | PSNR, SSIM, distance in the vision space |
| `suite_embedding_prediction.py` | a sample's errors, teacher-forced and free-running | MSE, cosine by position |
| `suite_held_out.py` | a sample of own tars with its prediction | losses, recall@1 and @5 among N |
| `suite_benchmarks.py` | a prompt, edit or question of a public benchmark | a judge's; exact matches; else none |

Rows of all suites have a column `prompt`, a `score` where an item has one, and pictures as PNG in `png` (made by the
model), `source_png` (edited from) and `target_png` (the wanted one).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import pyarrow as pa
from PIL import Image

from nexusgen.errors import ModelError
from nexusgen.model.manifest import Manifest
from nexusgen.model.weights import Model
from nexusgen.statistics import mean_of_groups
from pipelines.html_page import Html

Row = dict[str, Any]
Measures = dict[str, Sequence[Sequence[float]]]
ITEM_COLUMNS = (("kind", pa.string()), ("index", pa.int32()))  # which item of its suite a row is


@dataclass(frozen=True)
class Unit:
    """One batch of work: items `first` up to (not including) `last` of one kind."""

    kind: str
    first: int
    last: int


@dataclass(frozen=True)
class SuiteResult:
    """Scores (numbers, nested by name), contact sheets by name, and plots for the report (`plots.py`)."""

    scores: dict[str, Any]
    sheets: dict[str, Image.Image]
    plots: tuple[Html, ...] = ()


class EvaluationSuite(Protocol):
    """One kind of evaluation, fully described by its own fields."""

    name: ClassVar[str]
    schema: ClassVar[pa.Schema]  # of the rows; all begin with ITEM_COLUMNS

    @property
    def path(self) -> str:
        """Where its results lie, below those of the model, and what its metrics are called."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """What two evaluations must have in common to give the same scores."""
        ...

    def check(self, manifest: Manifest) -> None:
        """Find what would fail later. Raises: ModelError, InputError or FingerprintError."""
        ...

    def units(self) -> list[Unit]:
        """All the work, in order."""
        ...

    def worker(self, model: Model) -> Callable[[Unit], list[Row]]:
        """A function that turns a unit into one row per item, without ITEM_COLUMNS."""
        ...

    def measures(self, rows: Sequence[Row]) -> Measures:
        """The items' own scores by the name of what they make, like `generation/overall`.

        A score is the mean of its groups' means; most have one group. Items stand in the order of the rows, so that
        those of two models under the same settings are pairs. A score without items is left out.
        """
        ...

    def summarise(self, rows: Sequence[Row]) -> SuiteResult:
        """Scores and contact sheets of all rows, in order of the items."""
        ...


def cut(kind: str, count: int, batch_size: int) -> list[Unit]:
    """Units of at most `batch_size` items."""
    return [Unit(kind, first, min(first + batch_size, count)) for first in range(0, count, batch_size)]


def nested_scores(measures: Measures) -> dict[str, Any]:
    """The scores that the items' own make, nested by name: `generation/overall` is under `generation`."""
    scores: dict[str, Any] = {}
    for name, groups in measures.items():
        *parents, last = name.split("/")
        place = scores
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = mean_of_groups(groups)
    return scores


def to_png(image: Image.Image) -> bytes:
    """A picture as a row holds it."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def require_parts(manifest: Manifest, parts: Sequence[str]) -> None:
    """Raises: ModelError if the model lacks one of the parts."""
    missing = [part for part in parts if part not in manifest.parts]
    if missing:
        raise ModelError(
            f"the model has no part {', '.join(missing)}, which this evaluation needs; "
            f"it holds {', '.join(manifest.parts) or 'nothing'}"
        )
