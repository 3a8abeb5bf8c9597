"""Kinds of deliberate damage to a rendering of the demo world, each a function of scene, thing and generator.

What can be said as another scene is drawn as one; the rest is done to pixels. A damage that a scene doesn't allow (a
swap of a thing that is alone) gives None. Damages are of a strength that anybody sees, not of the scorer's limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
from PIL import Image
from scipy import ndimage

from nexusgen.shapes import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, draw

Picture = np.ndarray
Damage = Callable[[Scene, Thing, np.random.Generator], Picture | None]
CELL = 32  # pixels on a side


def wrong_colour(scene: Scene, thing: Thing, rng: np.random.Generator) -> Picture:
    """The thing in a colour that nothing in the scene has."""
    return draw(_with(scene, thing, replace(thing, colour=_other(rng, COLOURS, {t.colour for t in scene.things}))))


def moved(scene: Scene, thing: Thing, rng: np.random.Generator) -> Picture:
    """The thing in a cell that breaks its relation to the others: on their other side, or on their very line."""
    return draw(_with(scene, thing, replace(thing, cell=_free_cell(scene, thing, rng))))


def missing(scene: Scene, thing: Thing, rng: np.random.Generator) -> Picture:
    """The thing is left out."""
    return draw(_with(scene, thing))


def extra(scene: Scene, thing: Thing, rng: np.random.Generator) -> Picture:
    """Another thing in a free cell."""
    cell = _free_cell(scene, thing, rng)
    shape, colour = _other(rng, SHAPES, {thing.shape}), _other(rng, COLOURS, set())
    return draw(Scene((*scene.things, Thing(cell, shape, colour, "small")), scene.background))


def merged(scene: Scene, thing: Thing, rng: np.random.Generator) -> Picture:
    """The thing has grown together with its like, a third of a cell nearer to the picture's middle (or off it)."""
    picture, ground = draw(scene), np.array(BACKGROUNDS[scene.background][1])
    alone = draw(Scene((thing,), scene.background))
    row, column = divmod(thing.cell, 3)
    shift = [CELL // 3 * (1 if place == 0 else -1) for place in (row, column)]
    second = np.roll(alone, shift, axis=(0, 1))
    is_second = np.abs(second.astype(int) - ground).max(axis=-1) > 0
    picture[is_second] = second[is_second]
    return picture


def blurred(scene: Scene, thing: Thing, rng: np.random.Generator) -> Picture:
    """The whole picture out of focus."""
    return ndimage.gaussian_filter(draw(scene).astype(np.float32), (9, 9, 0)).astype(np.uint8)


def noisy(scene: Scene, thing: Thing, rng: np.random.Generator) -> Picture:
    """Strong noise over the whole picture."""
    picture = draw(scene) + rng.normal(0, 70, (96, 96, 3))
    return picture.clip(0, 255).astype(np.uint8)


def wrong_shape(scene: Scene, thing: Thing, rng: np.random.Generator) -> Picture:
    """The thing in a shape that nothing in the scene has."""
    return draw(_with(scene, thing, replace(thing, shape=_other(rng, SHAPES, {t.shape for t in scene.things}))))


def swapped(scene: Scene, thing: Thing, rng: np.random.Generator) -> Picture | None:
    """The thing and another one have changed places."""
    others = [t for t in scene.things if t.cell != thing.cell and (t.shape, t.colour) != (thing.shape, thing.colour)]
    if not others:
        return None
    other = others[int(rng.integers(len(others)))]
    rest = tuple(t for t in scene.things if t not in (thing, other))
    exchanged = (replace(thing, cell=other.cell), replace(other, cell=thing.cell))
    return draw(Scene((*rest, *exchanged), scene.background))


def shrunk(scene: Scene, thing: Thing, rng: np.random.Generator) -> Picture:
    """The thing at half the radius of the world's small ones."""
    picture = draw(_with(scene, thing))
    alone = draw(Scene((replace(thing, size="large"),), scene.background), 96)
    top, left = _corner(thing)
    side = 10  # of 32: a large thing of radius 14.7 pixels becomes one of 4.6
    small = Image.fromarray(alone[top : top + CELL, left : left + CELL]).resize((side, side), Image.Resampling.BOX)
    start = (CELL - side) // 2
    picture[top + start : top + start + side, left + start : left + start + side] = np.asarray(small)
    return picture


def recoloured_background(scene: Scene, thing: Thing, rng: np.random.Generator) -> Picture:
    """Another background."""
    return draw(replace(scene, background=_other(rng, BACKGROUNDS, {scene.background})))


def cut_off(scene: Scene, thing: Thing, rng: np.random.Generator) -> Picture:
    """The lower half of the thing, and a little more, is gone."""
    picture = draw(scene)
    top, left = _corner(thing)
    picture[top + CELL // 2 - 2 : top + CELL, left : left + CELL] = BACKGROUNDS[scene.background][1]
    return picture


def ghost(scene: Scene, thing: Thing, rng: np.random.Generator) -> Picture:
    """Another thing in a free cell, half as strong as it should be, like one that wasn't wholly removed."""
    cell, colour = _free_cell(scene, thing, rng), _other(rng, COLOURS, set())
    other = draw(Scene((*scene.things, Thing(cell, "square", colour)), scene.background)).astype(float)
    return (0.5 * draw(scene) + 0.5 * other).astype(np.uint8)


def unknown_background(scene: Scene, thing: Thing, rng: np.random.Generator) -> Picture:
    """A background that the world doesn't know: lilac."""
    picture = draw(scene).astype(np.float32)
    is_ground = np.abs(picture - BACKGROUNDS[scene.background][1]).max(axis=-1) < 1
    picture[is_ground] = (190, 175, 235)
    return picture.astype(np.uint8)


DAMAGES: dict[str, Damage] = {
    damage.__name__: damage
    for damage in (
        wrong_colour,
        moved,
        missing,
        extra,
        merged,
        blurred,
        noisy,
        wrong_shape,
        swapped,
        shrunk,
        recoloured_background,
        cut_off,
        ghost,
        unknown_background,
    )
}


def _with(scene: Scene, thing: Thing, *instead: Thing) -> Scene:
    return Scene((*(t for t in scene.things if t != thing), *instead), scene.background)


def _other(rng: np.random.Generator, names: Iterable[str], taken: set[str]) -> str:
    options = [name for name in names if name not in taken]
    return str(options[int(rng.integers(len(options)))])


def _free_cell(scene: Scene, thing: Thing, rng: np.random.Generator) -> int:
    """A free cell in the row and the column of another thing's, or any where the thing is alone."""
    taken = {t.cell for t in scene.things}
    free = [cell for cell in range(9) if cell not in taken]
    if others := [t.cell for t in scene.things if t != thing]:
        # On neither side of the other thing: in its column if they stood side by side, else in its row.
        row, column = divmod(others[0], 3)
        is_beside = thing.cell % 3 != column
        same = [c for c in free if (c % 3 == column if is_beside else c // 3 == row)]
        free = same or free
    return int(free[int(rng.integers(len(free)))])


def _corner(thing: Thing) -> tuple[int, int]:
    row, column = divmod(thing.cell, 3)
    return row * CELL, column * CELL
