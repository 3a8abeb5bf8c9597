"""What the suite of the demo world measures, without Ray: perfect and wrong pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from suite_rows import rows_of
from tiny_training import make_tiny_model

from nexusgen import shapes
from nexusgen.base_training import IMAGE_SIZE
from nexusgen.model.weights import Model, load_model
from nexusgen.statistics import mean_of_groups
from pipelines import suite_demo_world
from pipelines.suite_demo_world import DemoWorldSuite
from pipelines.suites import Unit

WORLD = DemoWorldSuite(
    seed=3, steps=2, per_category=2, num_explicit=3, num_questions=2, num_edits=3, num_pictures=4, batch_size=5
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(make_tiny_model(tmp_path_factory.mktemp("model")))


def paint(scene_of: Callable[[str], shapes.Scene]) -> Callable[..., list[Image.Image]]:
    def generate(model: Model, prompts: Sequence[str], seeds: Sequence[int], steps: int | None) -> list[Image.Image]:
        return [Image.fromarray(shapes.draw(scene_of(prompt))) for prompt in prompts]

    return generate


def scenes_by_prompt(suite: DemoWorldSuite) -> dict[str, shapes.Scene]:
    short = {prompt.text: prompt.scene for prompt in shapes.evaluation_prompts(suite.per_category, suite.seed)}
    return short | {text: scene for text, _, scene in shapes.explicit_prompts(suite.num_explicit, suite.seed)}


def test_a_perfect_painter_scores_one_and_a_blank_one_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = scenes_by_prompt(WORLD)
    monkeypatch.setattr(suite_demo_world, "generate_images", paint(lambda prompt: scenes[prompt]))
    perfect = WORLD.model_copy(update={"num_questions": 0, "num_edits": 0})
    scores = perfect.summarise(rows_of(perfect, model)).scores
    assert set(scores["generation"].values()) == {1.0}
    assert set(scores["generation"]) == {
        "overall",
        "strict",
        "single",
        "two",
        "counting",
        "colours",
        "position",
        "attributes",
        "explicit_strict",
        "explicit_colour_and_cell",
        *(f"{name}_{lang}" for name in ("overall", "explicit_strict") for lang in ("en", "zh")),
    }
    monkeypatch.setattr(suite_demo_world, "generate_images", paint(lambda prompt: shapes.Scene(())))
    blank = WORLD.model_copy(update={"num_questions": 0, "num_edits": 0})
    assert set(blank.summarise(rows_of(blank, model)).scores["generation"].values()) == {0.0}


def test_an_edit_counts_if_it_is_done_and_the_rest_unchanged(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = {edit.instruction: edit for edit in shapes.evaluation_edits(14, WORLD.seed)}
    assert len(edits) == 14
    suite = WORLD.model_copy(update={"num_edits": 14, "num_questions": 0})

    def scores_of(paint: Callable[[shapes.Edit], shapes.Scene]) -> Any:
        def edit_images(model: Model, images: Any, instructions: Sequence[str], *others: Any) -> list[Image.Image]:
            return [Image.fromarray(shapes.draw(paint(edits[text]))) for text in instructions]

        monkeypatch.setattr(suite_demo_world, "edit_images", edit_images)
        return suite.summarise(rows_of(suite, model)).scores["editing"]

    perfect = scores_of(lambda edit: edit.target)
    assert set(perfect.values()) == {1}
    assert {"strict", "done", "unchanged", "colour_done", "move_unchanged", "strict_zh"} <= set(perfect)
    assert len(perfect) == 3 + 3 * len(shapes.EDIT_KINDS) + 2
    # The source as it was: nothing is done, and all is unchanged beside that.
    untouched = scores_of(lambda edit: edit.source)
    assert (untouched["strict"], untouched["done"], untouched["unchanged"]) == (0, 0, 1)
    assert (untouched["colour_unchanged"], untouched["add_unchanged"]) == (1, 1)
    wiped = scores_of(lambda edit: shapes.Scene((), edit.source.background))
    assert wiped["strict"] == 0
    assert 0 <= wiped["unchanged"] < 0.5


def test_a_model_without_an_editing_decoder_edits_with_the_other(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    decoders = []
    draw = suite_demo_world.edit_images

    def edit_images(*arguments: Any) -> list[Image.Image]:
        decoders.append(arguments[-1])
        return draw(*arguments)

    monkeypatch.setattr(suite_demo_world, "edit_images", edit_images)
    unit = Unit("editing", 0, 2)
    first = WORLD.worker(model)(unit)
    assert decoders == ["generation" if model.editing_decoder is None else "editing"]
    assert [row["score"] for row in first] == [float(row["done"] and row["unchanged"]) for row in first]


@pytest.fixture(scope="module")
def rows(model: Model) -> list[dict[str, Any]]:
    return rows_of(WORLD, model)


def test_rows_are_in_rounds_of_categories_with_consecutive_seeds(rows: list[dict[str, Any]]) -> None:
    drawn = [row for row in rows if row["kind"] == "generation"]
    assert [row["category"] for row in drawn] == list(shapes.CATEGORIES) * WORLD.per_category
    assert [row["seed"] for row in drawn] == list(range(3, 3 + len(drawn)))
    assert {Image.open(io.BytesIO(row["png"])).size for row in rows} == {IMAGE_SIZE}
    assert len(rows) == 12 + 3 + 3 + 2
    table = pa.Table.from_pylist(rows, schema=WORLD.schema)
    assert table["score"].null_count == 0


def test_a_picture_doesnt_depend_on_its_unit(model: Model, rows: list[dict[str, Any]]) -> None:
    other_cut = WORLD.model_copy(update={"batch_size": 2})
    others = other_cut.worker(model)(other_cut.units()[0])
    for one, other in zip(rows, others, strict=False):
        pixels = [np.asarray(Image.open(io.BytesIO(row["png"])), int) for row in (one, other)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_scores_are_the_means_of_the_measures(rows: list[dict[str, Any]]) -> None:
    scores, measures = WORLD.summarise(rows).scores, WORLD.measures(rows)
    flat = {f"{part}/{name}": value for part, of in scores.items() if part != "n" for name, value in of.items()}
    assert {name: mean_of_groups(groups) for name, groups in measures.items()} == {
        name: value for name, value in flat.items() if name != "understanding/majority"
    }
    assert [len(group) for group in measures["generation/overall"]] == [WORLD.per_category] * 6
    assert sum(len(measures[f"editing/strict_{lang}"][0]) for lang in ("en", "zh")) == WORLD.num_edits


def test_languages_are_scored_apart(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = scenes_by_prompt(WORLD)
    chinese = {prompt for prompt in scenes if not prompt.isascii()}
    knows_english = paint(lambda prompt: shapes.Scene(()) if prompt in chinese else scenes[prompt])
    monkeypatch.setattr(suite_demo_world, "generate_images", knows_english)
    suite = WORLD.model_copy(update={"num_questions": 0, "num_edits": 0})
    scores = suite.summarise(rows_of(suite, model)).scores["generation"]
    assert (scores["overall_en"], scores["overall_zh"], scores["overall"]) == (1, 0, 0.5)
    assert (scores["explicit_strict_en"], scores["explicit_strict_zh"]) == (1, 0)


def test_sheets_show_the_first_pictures(rows: list[dict[str, Any]]) -> None:
    result = WORLD.summarise(rows)
    assert set(result.sheets) == {"samples", "generation", "explicit", "editing"}
    assert result.scores["n"] == 20
    assert 0 <= result.scores["understanding"]["overall"] <= 1
