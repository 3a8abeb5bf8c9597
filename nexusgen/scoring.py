"""Reads a demo-world picture back exactly and scores it, in GenEval's six categories and for edits.

Reading: the border's median is the background; connected regions that differ from it are things; a thing's colour is
its median's nearest in the palette, its cell that of its centroid, its shape and size the template of that cell with
the best soft overlap (intersection over union of coverage). Two thresholds on that overlap: 0.65 passes a slightly
blurred shape, 0.80 (`STRICT_OVERLAP`) doesn't. A region in no colour of the palette (black on white, say) is no shape.
Not seen at all: regions of under 0.4 % of the picture, and ghosts less than half as strong as a colour.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Num, UInt8
from scipy import ndimage

from nexusgen.shapes import (
    BACKGROUNDS,
    COLOURS,
    NUM_CELLS,
    SHAPES,
    SIZES,
    Edit,
    Prompt,
    Scene,
    Thing,
    thing_mask,
)

OVERLAP = 0.65
STRICT_OVERLAP = 0.80
_MIN_AREA = 0.004  # of the picture: smaller regions are noise, half of the smallest thing is larger
_MAX_COLOUR_DISTANCE = 85.0  # in RGB; the palette's closest two are 86 apart, grey is 91 from its nearest


@dataclass(frozen=True)
class ReadThing:
    """One region as read: what it is most like, and how much (overlap in [0, 1])."""

    thing: Thing
    overlap: float


@dataclass(frozen=True)
class Reading:
    """A picture as read. Regions that cover no known shape well keep their low overlap, off-palette ones have 0."""

    background: str
    things: tuple[ReadThing, ...]

    def scene(self, min_overlap: float = OVERLAP) -> Scene | None:
        """The scene shown, or None if a region isn't a shape or two share a cell."""
        cells = [read.thing.cell for read in self.things]
        if any(read.overlap < min_overlap for read in self.things) or len(set(cells)) < len(cells):
            return None
        return Scene(tuple(read.thing for read in self.things), self.background)


@dataclass(frozen=True)
class ExplicitScore:
    """strict: the very scene, at the strict overlap. colour_and_cell: right colours in the right cells, any shape."""

    strict: bool
    colour_and_cell: bool


@dataclass(frozen=True)
class EditScore:
    """done: the instruction was carried out. unchanged: the rest is as before. strict: both."""

    done: bool
    unchanged: bool

    @property
    def strict(self) -> bool:
        return self.done and self.unchanged


def read_scene(image: UInt8[np.ndarray, "height width 3"]) -> Reading:
    """Read a square picture of the demo world, whatever its size."""
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = _nearest(np.median(border, axis=0), {n: rgb for n, (_, rgb) in BACKGROUNDS.items()})
    coverage = _coverage(pixels, np.median(border, axis=0))
    labels, count = ndimage.label(coverage > 0.5)
    things = []
    for index in range(1, count + 1):
        region = labels == index
        if region.mean() >= _MIN_AREA:
            things += [_read_region(pixels, coverage, part) for part in _split_by_cell(region)]
    return Reading(background, tuple(sorted(things, key=lambda read: read.thing)))


def _coverage(
    pixels: Float[np.ndarray, "height width 3"], background: Num[np.ndarray, "3"]
) -> Float[np.ndarray, "height width"]:
    """How much of each pixel isn't background, in [0, 1], measured along the way to its nearest palette colour."""
    offsets = np.array([rgb for _, rgb in COLOURS.values()], dtype=np.float32) - background
    difference = pixels - background
    # Projection on each colour's direction; the colour with the smallest residue says how far along the pixel is.
    along = difference @ offsets.T / (offsets**2).sum(axis=1)
    along = along.clip(0, 1)
    residue = ((difference[:, :, None, :] - along[..., None] * offsets) ** 2).sum(axis=-1)
    best = residue.argmin(axis=-1)
    coverage: np.ndarray = np.take_along_axis(along, best[..., None], axis=-1)[..., 0]
    return coverage


def _split_by_cell(region: Bool[np.ndarray, "height width"]) -> list[Bool[np.ndarray, "height width"]]:
    """A region that spans several cells is cut at the cells' borders: things may touch, but never leave their cell."""
    size = len(region)
    parts = []
    edges = np.linspace(0, size, NUM_CELLS + 1).round().astype(int)
    for row in range(NUM_CELLS):
        for column in range(NUM_CELLS):
            box = np.zeros_like(region)
            box[edges[row] : edges[row + 1], edges[column] : edges[column + 1]] = True
            part = region & box
            if part.mean() >= _MIN_AREA:
                parts.append(part)
    return parts if len(parts) > 1 else [region]


def _read_region(
    pixels: Float[np.ndarray, "height width 3"],
    coverage: Float[np.ndarray, "height width"],
    region: Bool[np.ndarray, "height width"],
) -> ReadThing:
    size = len(pixels)
    solid = region & (coverage > 0.9)
    colour_pixels = pixels[solid] if solid.any() else pixels[region]
    median = np.median(colour_pixels, axis=0)
    colour = _nearest(median, {n: rgb for n, (_, rgb) in COLOURS.items()})
    centre = ndimage.center_of_mass(region)
    row, column = (min(int(c * NUM_CELLS / size), NUM_CELLS - 1) for c in centre)
    cell = row * NUM_CELLS + column
    # Soft edges lie outside the region: take the coverage around it too.
    seen = np.where(ndimage.binary_dilation(region), coverage, 0.0)
    overlaps = {
        (shape, size_name): float(np.minimum(seen, template).sum() / np.maximum(seen, template).sum())
        for (shape, size_name), template in _templates(cell, size).items()
    }
    shape, size_name = max(overlaps, key=lambda name: overlaps[name])
    is_in_palette = np.linalg.norm(median - COLOURS[colour][1]) <= _MAX_COLOUR_DISTANCE
    return ReadThing(Thing(cell, shape, colour, size_name), overlaps[shape, size_name] if is_in_palette else 0.0)


@functools.cache
def _templates(cell: int, size: int) -> Mapping[tuple[str, str], Float[np.ndarray, "size size"]]:
    templates = {}
    for shape in SHAPES:
        for size_name in SIZES:
            mask, top, left = thing_mask(shape, size_name, cell, size)
            canvas = np.zeros((size, size), dtype=np.float32)
            canvas[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
            templates[shape, size_name] = canvas
    return templates


def _nearest(colour: Num[np.ndarray, "3"], palette: Mapping[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(((colour - np.array(palette[name])) ** 2).sum()))


def score_prompt(prompt: Prompt, image: UInt8[np.ndarray, "height width 3"], min_overlap: float = OVERLAP) -> bool:
    """Whether the picture shows what a short prompt says, by GenEval's rule for its category.

    single: that shape, on that background. two: both shapes and nothing else. counting: just so many of that shape.
    colours: that shape in that colour. position: both shapes, in that relation. attributes: both shapes, each in its
    colour. Nothing may be shown that isn't asked for; what a prompt leaves open (size, place, colour) is free.
    """
    scene = read_scene(image).scene(min_overlap)
    if scene is None:
        return False
    wanted, shown = prompt.scene.things, scene.things
    if sorted(t.shape for t in wanted) != sorted(t.shape for t in shown):
        return False
    if prompt.category == "single":
        return scene.background == prompt.scene.background
    if prompt.category in ("colours", "attributes"):
        return sorted((t.shape, t.colour) for t in wanted) == sorted((t.shape, t.colour) for t in shown)
    if prompt.category == "position":
        places = {t.shape: divmod(t.cell, NUM_CELLS) for t in shown}
        asked = {t.shape: divmod(t.cell, NUM_CELLS) for t in wanted}
        first, second = asked
        return all(
            np.sign(asked[first][axis] - asked[second][axis])
            in (0, np.sign(places[first][axis] - places[second][axis]))
            for axis in (0, 1)
        )
    return True


def score_explicit(scene: Scene, image: UInt8[np.ndarray, "height width 3"]) -> ExplicitScore:
    """Compare a picture with the scene of an explicit caption."""
    reading = read_scene(image)
    coloured = sorted((read.thing.cell, read.thing.colour if read.overlap > 0 else "") for read in reading.things)
    is_placed = coloured == sorted((t.cell, t.colour) for t in scene.things) and reading.background == scene.background
    return ExplicitScore(reading.scene(STRICT_OVERLAP) == scene, is_placed)


def score_edit(edit: Edit, image: UInt8[np.ndarray, "height width 3"]) -> EditScore:
    """Whether an edit was carried out, and whether everything else stayed as it was."""
    reading = read_scene(image)
    shown = {read.thing for read in reading.things if read.overlap >= OVERLAP}
    before, after = set(edit.source.things), set(edit.target.things)
    background_changed = edit.source.background != edit.target.background
    is_done = (after - before) <= shown and not (before - after) & shown
    if background_changed:
        is_done = reading.background == edit.target.background
    is_unchanged = (before & after) <= shown and len(reading.things) == len(after)
    if not background_changed:
        is_unchanged = is_unchanged and reading.background == edit.source.background
    return EditScore(is_done, is_unchanged)


def score_answer(expected: str, answer: str) -> bool:
    """Whether an answer is the expected one, ignoring case, spaces around it and closing punctuation."""
    return _plain(answer) == _plain(expected)


def _plain(text: str) -> str:
    return text.strip().rstrip(".。!！").strip().casefold()
