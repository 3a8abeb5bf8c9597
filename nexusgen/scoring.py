"""Reads a demo-world picture back exactly and scores it, in GenEval's six categories and for edits.

Reading: the border's median is the background; connected regions of pixels that are nearer to a colour of the palette
are things. A thing's colour is its median's nearest in the palette, its cell that of its centroid, its shape and size
the template of that cell with the best soft overlap (intersection over union of coverage: how far a pixel is from the
background, on the way to the thing's own colour). Two thresholds on that overlap: 0.65 passes a slightly blurred shape,
0.80 (`STRICT_OVERLAP`) doesn't. No shape are: a region in no colour of the palette (black on white, say), and a ghost,
too faint for a thing. No scene at all: a background of another colour, or strewn with specks. Not seen: a few specks of
under 0.4 % of the picture each, and what differs from the background by less than 45 (in RGB).
tests/nexusgen/test_scorer_proof.py holds all this against a second reader.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Num, UInt8
from scipy import ndimage

from nexusgen.shapes import (
    BACKGROUNDS,
    COLOURS,
    DEFAULT_SIZE,
    NUM_CELLS,
    SHAPES,
    SIZES,
    Edit,
    Prompt,
    Scene,
    Thing,
    thing_mask,
)

VERSION = 2  # to be counted up when a picture may get another score than before
OVERLAP = 0.65
STRICT_OVERLAP = 0.80
_MIN_AREA = 0.004  # of the picture: smaller regions are noise, half of the smallest thing is larger
_MAX_SPECKS = 0.004  # of the picture: all that noise together, no more than one region
_MAX_COLOUR_DISTANCE = 85.0  # in RGB; the palette's closest two are 86 apart, grey is 91 from its nearest
_COLOUR_TOLERANCE = 43.0  # half of what the palette's closest two are apart: a shade of the same colour
_MAX_BACKGROUND_DISTANCE = 47.0  # half of what the closest two, black and brown, are apart
_FAINT = 45.0  # in RGB, from the background: what is fainter can't be seen


@dataclass(frozen=True)
class ReadThing:
    """One region as read: what it is most like, and how much (overlap in [0, 1])."""

    thing: Thing
    overlap: float


@dataclass(frozen=True)
class Reading:
    """A picture as read. Regions that cover no known shape well keep their low overlap; off-palette ones and ghosts
    have 0. `background` is empty if it is no background of the world. specks: share of the picture in loose specks.
    """

    background: str
    things: tuple[ReadThing, ...]
    specks: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Whether the background is one of the world's, and free of noise."""
        return bool(self.background) and self.specks <= _MAX_SPECKS

    def scene(self, min_overlap: float = OVERLAP) -> Scene | None:
        """The scene shown, or None if the background isn't clean, a region isn't a shape, or two share a cell."""
        cells = [read.thing.cell for read in self.things]
        is_known = all(read.overlap >= min_overlap for read in self.things) and len(set(cells)) == len(cells)
        return Scene(tuple(read.thing for read in self.things), self.background) if self.is_clean and is_known else None


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
    border = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    palette = np.array([rgb for _, rgb in COLOURS.values()], dtype=np.float32)
    from_background = np.linalg.norm(pixels - border, axis=-1)
    is_thing = np.linalg.norm(pixels[:, :, None] - palette, axis=-1).min(axis=-1) < from_background
    labels, count = ndimage.label(is_thing)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:] / is_thing.size
    things = []
    for index in np.flatnonzero(areas >= _MIN_AREA) + 1:
        things += [_read_region(pixels, border, part) for part in _split_by_cell(labels == index)]
    is_read = np.isin(labels, np.flatnonzero(areas >= _MIN_AREA) + 1)
    things += _ghosts(from_background, is_read)
    background = _nearest(border, {n: rgb for n, (_, rgb) in BACKGROUNDS.items()})
    if np.linalg.norm(border - BACKGROUNDS[background][1]) > _MAX_BACKGROUND_DISTANCE:
        background = ""
    specks = float(areas[areas < _MIN_AREA].sum())
    return Reading(background, tuple(sorted(things, key=lambda read: read.thing)), specks)


def _ghosts(
    from_background: Float[np.ndarray, "height width"], is_read: Bool[np.ndarray, "height width"]
) -> list[ReadThing]:
    """Faint regions apart from all things: shown, but no shape."""
    is_faint = (from_background > _FAINT) & ~ndimage.binary_dilation(is_read, iterations=2)
    labels, count = ndimage.label(ndimage.binary_opening(is_faint))
    ghosts = []
    for index in range(1, count + 1):
        region = labels == index
        if region.mean() >= _MIN_AREA:
            ghosts.append(ReadThing(Thing(_cell_of(region), "circle", next(iter(COLOURS)), "small"), 0.0))
    return ghosts


def _cell_of(region: Bool[np.ndarray, "height width"]) -> int:
    """The cell that holds a region's centroid."""
    row, column = (min(int(c * NUM_CELLS / len(region)), NUM_CELLS - 1) for c in ndimage.center_of_mass(region))
    return row * NUM_CELLS + column


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
    background: Num[np.ndarray, "3"],
    region: Bool[np.ndarray, "height width"],
) -> ReadThing:
    # Without the soft edge; a region of edges alone (a blurred one) is taken as it is.
    solid = ndimage.binary_erosion(region)
    median = np.median(pixels[solid if solid.any() else region], axis=0)
    colour = _nearest(median, {n: rgb for n, (_, rgb) in COLOURS.items()})
    # How far each pixel is from background on the way to the region's own colour, and how near to that colour: within
    # the outline pixels count if they have the colour, outside if they are there at all. Soft edges lie outside the
    # region.
    own = np.array(COLOURS[colour][1], dtype=np.float32)
    way = np.linalg.norm(own - background)
    is_near = ndimage.binary_dilation(region)
    drawn = np.where(is_near, np.linalg.norm(pixels - background, axis=-1) / way, 0.0).clip(0, 1)
    off = np.linalg.norm(pixels - own, axis=-1) - _COLOUR_TOLERANCE
    right = np.where(is_near, 1 - off / way, 0.0).clip(0, 1)
    cell = _cell_of(region)
    overlaps = {
        name: float(np.minimum(right, template).sum() / np.maximum(drawn, template).sum())
        for name, template in _templates(cell, len(pixels)).items()
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
    """Whether an edit was carried out, and whether everything else stayed as it was.

    done is about the cells where source and target differ (or the background), unchanged about all others. The size of
    a thing that is added is free, as no instruction says it.
    """
    reading = read_scene(image)
    before, after = set(edit.source.things), set(edit.target.things)
    touched = {thing.cell for thing in before ^ after}
    is_size_free = edit.kind == "add"

    def of_cells(things: Iterable[Thing], *, in_touched: bool) -> list[Thing]:
        chosen = [thing for thing in things if (thing.cell in touched) is in_touched]
        return sorted(replace(t, size=DEFAULT_SIZE) if is_size_free and in_touched else t for t in chosen)

    def is_shown(wanted: set[Thing], *, in_touched: bool) -> bool:
        shown = [read for read in reading.things if (read.thing.cell in touched) is in_touched]
        is_shape = all(read.overlap >= OVERLAP for read in shown)
        things = of_cells((read.thing for read in shown), in_touched=in_touched)
        return is_shape and things == of_cells(wanted, in_touched=in_touched)

    is_unchanged = is_shown(before, in_touched=False) and reading.is_clean
    if edit.source.background != edit.target.background:
        return EditScore(reading.background == edit.target.background, is_unchanged)
    return EditScore(is_shown(after, in_touched=True), is_unchanged and reading.background == edit.source.background)


def score_answer(expected: str, answer: str) -> bool:
    """Whether an answer is the expected one, ignoring case, spaces around it and closing punctuation."""
    return _plain(answer) == _plain(expected)


def _plain(text: str) -> str:
    return text.strip().rstrip(".。!！").strip().casefold()
