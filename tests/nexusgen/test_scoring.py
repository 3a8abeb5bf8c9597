from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from nexusgen import shapes
from nexusgen.scoring import STRICT_OVERLAP, read_scene, score_answer, score_edit, score_explicit, score_prompt
from nexusgen.shapes import Scene, Thing, draw


@pytest.mark.parametrize(("noise", "size"), [(0, 64), (12, 64), (0, 96), (12, 96), (0, 192), (12, 192)])
def test_random_scenes_are_read_right(noise, size):
    rng = np.random.default_rng(5)
    for _ in range(200):
        scene = shapes._random_scene(rng)
        image = draw(scene, size) + rng.normal(0, noise, (size, size, 3))
        assert read_scene(image.clip(0, 255).astype(np.uint8)).scene(STRICT_OVERLAP) == scene


def test_the_truth_scores_one_everywhere():
    assert all(score_prompt(p, draw(p.scene), STRICT_OVERLAP) for p in shapes.evaluation_prompts())
    assert all(score_explicit(scene, draw(scene)).strict for _, _, scene in shapes.explicit_prompts(60))
    assert all(score_edit(edit, draw(edit.target)).strict for edit in shapes.evaluation_edits(60))


def prompts_of(category):
    return [p for p in shapes.evaluation_prompts() if p.category == category]


def change(scene, **values):
    first, *rest = scene.things
    return Scene((replace(first, **values), *rest), scene.background)


@pytest.mark.parametrize("category", shapes.CATEGORIES)
def test_damage_fails_in_every_category(category):
    for prompt in prompts_of(category)[:8]:
        scene = prompt.scene
        shape = next(s for s in shapes.SHAPES if s not in {t.shape for t in scene.things})
        free = next(c for c in range(9) if c not in {t.cell for t in scene.things})
        extra = Scene((*scene.things, Thing(free, shape, "red")), scene.background)
        blurred = ndimage.gaussian_filter(draw(scene).astype(float), (9, 9, 0)).astype(np.uint8)
        grey = np.full((96, 96, 3), 128, dtype=np.uint8)
        missing = Scene(scene.things[1:], scene.background)
        for damaged in (draw(change(scene, shape=shape)), draw(extra), draw(missing), blurred, grey):
            assert not score_prompt(prompt, damaged)


def test_each_category_looks_at_its_own():
    def fails(category, changed):
        return not any(score_prompt(p, draw(changed(p.scene))) for p in prompts_of(category))

    def recolour(scene):
        return change(scene, colour=next(c for c in shapes.COLOURS if c not in {t.colour for t in scene.things}))

    def swap(scene):
        first, second = scene.things
        return Scene((replace(first, cell=second.cell), replace(second, cell=first.cell)), scene.background)

    def repaint(scene):
        return Scene(scene.things, next(b for b in shapes.BACKGROUNDS if b != scene.background))

    assert fails("colours", recolour)
    assert fails("attributes", recolour)
    assert not fails("two", recolour)
    assert fails("position", swap)
    assert not fails("two", swap)
    assert fails("single", repaint)
    assert not fails("counting", repaint)


@pytest.mark.parametrize("name", ["black", "grey", "brown"])
def test_a_shape_in_no_colour_of_the_palette_is_no_shape(name, monkeypatch):
    scene = Scene((Thing(4, "triangle", "green"),))
    rgb = shapes.BACKGROUNDS[name][1]
    monkeypatch.setattr(shapes, "COLOURS", {"green": ("", rgb)})
    image = draw(scene)
    monkeypatch.undo()
    assert read_scene(image).scene() is None
    assert not score_explicit(scene, image).colour_and_cell


def test_explicit_scores_notice_every_detail():
    scene = Scene((Thing(0, "ring", "red", "small"), Thing(8, "square", "blue")), "grey")
    assert score_explicit(scene, draw(scene)).strict
    bigger = score_explicit(scene, draw(change(scene, size="large")))
    assert not bigger.strict
    assert bigger.colour_and_cell
    moved = score_explicit(scene, draw(change(scene, cell=4)))
    assert not moved.strict
    assert not moved.colour_and_cell


def test_an_edit_is_done_and_leaves_the_rest_alone():
    for edit in shapes.evaluation_edits(40):
        assert not score_edit(edit, draw(edit.source)).done
        other = "black" if edit.target.background != "black" else "white"
        if edit.kind != "background":
            spoiled = score_edit(edit, draw(Scene(edit.target.things, other)))
            assert spoiled.done
            assert not spoiled.unchanged


def test_answers_are_compared_without_their_trimmings():
    assert score_answer("red", " Red. ")
    assert score_answer("左上", "左上。")
    assert not score_answer("red", "dark red")
