"""Two models on the same items of a suite: paired differences of all scores, and their pictures side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from nexusgen.statistics import Interval, paired_difference_of_groups
from pipelines.sheets import Cell, draw_sheet, is_drawable
from pipelines.suites import EvaluationSuite, Row

_SHOWN_BESIDE = ("source_png", "target_png")  # the same for both models
_PICTURES_PER_ROW = 10


def differences(suite: EvaluationSuite, ours: Sequence[Row], theirs: Sequence[Row]) -> dict[str, Interval]:
    """Ours - theirs of each score that is a mean over items, with its interval.

    The rows are of the same suite under the same settings, in order. Raises: ShapeError if the items aren't the same.
    """
    one, other = suite.measures(ours), suite.measures(theirs)
    return {name: paired_difference_of_groups(one[name], other[name]) for name in one if name in other}


def draw_pairs(
    ours: Sequence[Row], theirs: Sequence[Row], limit: int, names: tuple[str, str]
) -> dict[str, Image.Image]:
    """A sheet for each kind of items with pictures that differ: what was given, our picture, theirs; by kind.

    At most `limit` items are shown, first those with other scores. The frame is green where ours scores more, red where
    theirs does. `names` are of the two models.
    """
    sheets = {}
    for kind in dict.fromkeys(row["kind"] for row in ours):
        of_kind = [pair for pair in zip(ours, theirs, strict=True) if pair[0]["kind"] == kind]
        drawn = [(a, b) for a, b in of_kind if a.get("png") and b.get("png") and a["png"] != b["png"]]
        apart = [(a, b) for a, b in drawn if a.get("score") != b.get("score")]
        alike = [(a, b) for a, b in drawn if a.get("score") == b.get("score")]
        cells = [_cell(a, b) for a, b in (apart + alike)[:limit]]
        if not cells:
            continue
        title = f"{kind}: {names[0]} | {names[1]}; "
        if len(cells[0].pictures) > 2:
            title = f"{kind}: given | {names[0]} | {names[1]}; "
        title += f"{len(drawn)} of {len(of_kind)} pictures differ, {len(apart)} in their score: these come first"
        sheets[kind] = draw_sheet(cells, max(1, _PICTURES_PER_ROW // len(cells[0].pictures)), title)
    return sheets


def _cell(ours: Row, theirs: Row) -> Cell:
    pngs = [ours[name] for name in _SHOWN_BESIDE if ours.get(name)] + [ours["png"], theirs["png"]]
    scores: list[Any] = [ours.get("score"), theirs.get("score")]
    text = ours["prompt"]
    if not is_drawable(text):
        text = f"({ours.get('lang', 'text')}) {ours.get('expected') or ours['index']}"
    if None in scores:
        passed = None
    else:
        text = f"{scores[0]:.3g} | {scores[1]:.3g}: {text}"
        passed = None if scores[0] == scores[1] else scores[0] > scores[1]
    return Cell(tuple(Image.open(io.BytesIO(png)) for png in pngs), text, passed)
