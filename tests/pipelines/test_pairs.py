"""Two models on the same items: what differs, and what a person sees of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from nexusgen import shapes
from nexusgen.errors import ShapeError
from pipelines.pairs import differences, draw_pairs
from pipelines.sheets import GREEN, GREY, PICTURE_PX, RED
from pipelines.suite_demo_world import DemoWorldSuite
from pipelines.suites import to_png

SUITE = DemoWorldSuite(
    seed=0, steps=2, per_category=8, num_explicit=0, num_questions=0, num_edits=0, num_pictures=4, batch_size=8
)


def rows_of(right: Any, kind: str = "generation") -> list[dict[str, Any]]:
    """Rows of the suite's prompts; picture and score tell whether an item is `right`."""
    rows = []
    for index, prompt in enumerate(shapes.evaluation_prompts(SUITE.per_category, SUITE.seed)):
        colour = "green" if right(index) else "red"
        rows.append(
            {
                "kind": kind,
                "index": index,
                "prompt": prompt.text,
                "lang": prompt.lang,
                "category": prompt.category,
                "expected": "a thing",
                "score": float(right(index)),
                "strict": float(right(index)),
                "colour_and_cell": None,
                "done": None,
                "unchanged": None,
                "png": to_png(Image.new("RGB", (8, 8), colour)),
                "source_png": None,
            }
        )
    return rows


def test_differences_are_of_pairs_of_items() -> None:
    found = differences(SUITE, rows_of(lambda index: index % 2 == 0), rows_of(lambda index: index % 4 == 0))
    overall = found["generation/overall"]
    assert overall.value == pytest.approx(0.25)
    assert overall.n == 48
    assert 0 < overall.low < 0.25 < overall.high < 0.5
    assert found["generation/overall_en"].value + found["generation/overall_zh"].value == pytest.approx(0.5)
    back = differences(SUITE, rows_of(lambda index: index % 4 == 0), rows_of(lambda index: index % 2 == 0))
    assert back["generation/overall"].high == pytest.approx(-overall.low)


def test_other_items_are_refused() -> None:
    rows = rows_of(lambda index: True)
    with pytest.raises(ShapeError, match="the same items"):
        differences(SUITE, rows, rows[1:])


def test_items_with_other_scores_come_first_in_the_colour_of_the_better() -> None:
    ours, theirs = rows_of(lambda index: index != 7), rows_of(lambda index: index != 9)
    for row in ours[10:]:
        row["png"] = to_png(Image.new("RGB", (8, 8), "blue"))  # other pictures, equal scores
    (kind, sheet), *others = draw_pairs(ours, theirs, 4, ("ours", "theirs")).items()
    assert (kind, others) == ("generation", [])
    pixels = np.asarray(sheet)
    top = int(np.flatnonzero((pixels != 255).any(axis=(1, 2)))[20])  # below the title
    frames = [tuple(colour) for colour in pixels[top:, 12].reshape(-1, 3)]
    assert RED in frames
    row = pixels[sheet.height - PICTURE_PX]
    colours = {tuple(int(value) for value in pixel) for pixel in row}
    assert {RED, GREEN, GREY} <= colours  # 7: theirs alone is right; 9: ours alone; then such as both have right


def test_equal_pictures_are_not_shown() -> None:
    rows = rows_of(lambda index: True)
    assert draw_pairs(rows, rows, 4, ("ours", "theirs")) == {}


def test_a_given_picture_stands_before_both() -> None:
    ours, theirs = rows_of(lambda index: True, "editing"), rows_of(lambda index: False, "editing")
    narrow = draw_pairs(ours, theirs, 1, ("ours", "theirs"))["editing"]
    for row in ours:
        row["source_png"] = to_png(Image.new("RGB", (8, 8), "black"))
    wide = draw_pairs(ours, theirs, 1, ("ours", "theirs"))["editing"]
    assert wide.width - narrow.width in range(PICTURE_PX, PICTURE_PX + 4)  # and a seam
