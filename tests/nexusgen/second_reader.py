"""A second reader of the demo world, to hold the scorer against: it shares no code with `nexusgen.scoring` or `shapes`.

It knows the world from its own words alone: palette, outlines and grammar are written down here anew. It looks at each
cell by itself (the scorer looks for connected regions), gives each pixel one of the known colours, and compares the
hard outline with templates drawn by Pillow, by Jaccard distance. It judges a picture by the *text* of a prompt, an
instruction or a question, which it parses itself, in English and Chinese; it never sees the scene behind the text.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial.distance import cdist

INKS = {
    "red": (215, 35, 35),
    "green": (35, 150, 60),
    "blue": (40, 75, 215),
    "yellow": (240, 215, 40),
    "purple": (135, 50, 175),
    "orange": (245, 130, 25),
    "cyan": (45, 200, 215),
    "pink": (250, 135, 190),
}
PAPERS = {"white": (245, 245, 245), "black": (15, 15, 15), "grey": (125, 125, 125), "brown": (95, 60, 35)}
OUTLINES = ("circle", "square", "triangle", "diamond", "cross", "ring")
RADII = {"small": 0.29, "large": 0.46}  # of a cell's side
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")

CHINESE = {
    "红色": "red",
    "绿色": "green",
    "蓝色": "blue",
    "黄色": "yellow",
    "紫色": "purple",
    "橙色": "orange",
    "青色": "cyan",
    "粉色": "pink",
    "白色": "white",
    "黑色": "black",
    "灰色": "grey",
    "棕色": "brown",
    "圆形": "circle",
    "方块": "square",
    "三角": "triangle",
    "菱形": "diamond",
    "十字": "cross",
    "圆环": "ring",
    "大": "large",
    "小": "small",
}
CHINESE_PLACES = ("左上", "上方", "右上", "左边", "中间", "右边", "左下", "下方", "右下")
ENGLISH_NUMBERS, CHINESE_NUMBERS = ("zero", "one", "two", "three", "four"), "零一两三四"

SPECK, FLECKED = 0.003, 0.01  # of the picture: a stray spot in an empty cell, and all stray pixels together
LOOSE, STRICT = 0.60, 0.78  # Jaccard likeness of hard outlines; hard ones are a little less alike than soft ones


@dataclass(frozen=True)
class Seen:
    """What is in one cell. `likeness` is that to the best template; 0 for what has no ink of the world."""

    place: int
    shape: str
    colour: str
    size: str
    likeness: float = 1.0


@dataclass(frozen=True)
class Look:
    """A picture as seen. `paper` is empty if it is in no colour of the world; `is_flecked`: stray pixels all over."""

    paper: str
    things: tuple[Seen, ...]
    is_flecked: bool


@dataclass(frozen=True)
class Wish:
    """A thing as a text asks for it; None where the text leaves it open."""

    shape: str
    colour: str | None = None
    size: str | None = None
    place: int | None = None

    def is_met(self, seen: Seen) -> bool:
        """Whether this thing will do."""
        asked = ((self.shape, seen.shape), (self.colour, seen.colour), (self.size, seen.size), (self.place, seen.place))
        return all(wanted in (None, found) for wanted, found in asked)


# --- looking ----------------------------------------------------------------------------------------------------------


def look(picture: np.ndarray) -> Look:
    """See a picture of three times three cells."""
    side = len(picture) // 3
    inks = {**INKS, **PAPERS}
    rim = np.concatenate([picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3), picture[2:-2, :2].reshape(-1, 3)])
    ground = np.median(rim, axis=0)
    distances = {name: math.dist(ground, rgb) for name, rgb in PAPERS.items()}
    paper = min(distances, key=distances.__getitem__)
    # Nearer to some ink than to the paper: by thirds, so that a soft edge counts from its middle on.
    flat = picture.reshape(-1, 3).astype(float)
    nearest = np.array(list(inks))[cdist(flat, np.array(list(inks.values()), dtype=float)).argmin(axis=1)]
    nearest = nearest.reshape(picture.shape[:2])
    from_ground = np.sqrt(((picture - ground) ** 2).sum(axis=2))
    things, stray = [], 0
    for place in range(9):
        row, column = divmod(place, 3)
        window = (slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side))
        drawn = from_ground[window] > 30  # faint marks, too
        counts = Counter(nearest[window][drawn & (nearest[window] != paper)].tolist())
        counts = Counter({name: number for name, number in counts.items() if name in INKS})
        lumps, number = ndimage.label(drawn)
        largest = max((int((lumps == lump).sum()) for lump in range(1, number + 1)), default=0)
        if largest < SPECK * picture.shape[0] * picture.shape[1]:
            stray += int(drawn.sum())
            continue
        if not counts:
            things.append(Seen(place, "", "", "", 0.0))
            continue
        colour = counts.most_common(1)[0][0]
        to_ink = np.sqrt(((picture[window] - np.array(INKS[colour], dtype=float)) ** 2).sum(axis=2))
        outline = to_ink < from_ground[window]
        # Whatever else is drawn in the cell belongs to the outline, too, if it is as strong as an ink.
        outline |= from_ground[window] > 0.6 * math.dist(ground, INKS[colour])
        solid = ndimage.binary_erosion(outline)
        core = picture[window][solid] if solid.any() else picture[window][outline]
        if not len(core) or math.dist(np.median(core, axis=0), INKS[colour]) > 80:
            things.append(Seen(place, "", "", "", 0.0))
            continue
        names, templates = _templates(side)
        likeness = 1 - cdist(outline.reshape(1, -1), templates, metric="jaccard")[0]
        shape, size = names[int(likeness.argmax())]
        things.append(Seen(place, shape, colour, size, float(likeness.max())))
    is_known = distances[paper] < 50
    return Look(paper if is_known else "", tuple(things), stray > FLECKED * picture.shape[0] * picture.shape[1])


@functools.cache
def _templates(side: int) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Each outline at each size, as Pillow draws it 16 times as large, shrunk and cut at half coverage."""
    fine = 16 * side
    middle = fine / 2
    names, templates = [], []
    for shape, (size, share) in itertools.product(OUTLINES, RADII.items()):
        radius = share * fine
        canvas = Image.new("L", (fine, fine))
        pen = ImageDraw.Draw(canvas)

        def box(half: float, middle: float = middle) -> tuple[float, float, float, float]:
            return (middle - half, middle - half, middle + half, middle + half)

        if shape in ("circle", "ring"):
            pen.ellipse(box(radius), fill=255)
            if shape == "ring":
                pen.ellipse(box(0.55 * radius), fill=0)
        elif shape == "square":
            pen.rectangle(box(0.88 * radius), fill=255)
        elif shape == "triangle":
            corners = [(0, -1), (1, 0.85), (-1, 0.85)]
            pen.polygon([(middle + x * radius, middle + y * radius) for x, y in corners], fill=255)
        elif shape == "diamond":
            corners = [(0, -1.08), (0.8, 0), (0, 1.08), (-0.8, 0)]
            pen.polygon([(middle + x * radius, middle + y * radius) for x, y in corners], fill=255)
        else:
            long, short = radius, 0.3 * radius
            pen.rectangle((middle - long, middle - short, middle + long, middle + short), fill=255)
            pen.rectangle((middle - short, middle - long, middle + short, middle + long), fill=255)
        names.append((shape, size))
        templates.append(np.asarray(canvas.resize((side, side), Image.Resampling.BOX)) > 127)
    return names, np.array(templates).reshape(len(templates), -1)


# --- judging by a text ------------------------------------------------------------------------------------------------


def judge(text: str, picture: np.ndarray, likeness: float = LOOSE) -> bool:
    """Whether a picture shows what a prompt, short or explicit, says, and nothing else."""
    seen = look(picture)
    paper, wishes, relation = understand(text)
    if seen.is_flecked or not seen.paper or any(thing.likeness < likeness for thing in seen.things):
        return False
    if paper not in (None, seen.paper) or len(wishes) != len(seen.things):
        return False
    for order in itertools.permutations(seen.things):
        if all(wish.is_met(thing) for wish, thing in zip(wishes, order, strict=True)) and _stand(order, relation):
            return True
    return False


def _stand(things: tuple[Seen, ...], relation: str | None) -> bool:
    if relation is None:
        return True
    (row, column), (other_row, other_column) = (divmod(thing.place, 3) for thing in things)
    return {
        "left": column < other_column,
        "right": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }[relation]


def understand(text: str) -> tuple[str | None, list[Wish], str | None]:
    """A prompt's background, things and relation of the first thing to the second."""
    if re.search("[一-鿿]", text):
        return _understand_chinese(text)
    text = re.sub(r"^(please )?draw ", "", text, flags=re.IGNORECASE).rstrip(".")
    if found := re.fullmatch(r"(\w+) background: (.*)", text):
        return found[1], [_english_wish(part) for part in found[2].split(", ")], None
    if found := re.fullmatch(r"(.*) on an? (\w+) background", text):
        return found[2], [_english_wish(found[1])], None
    if found := re.fullmatch(r"(two|three|four) (\w+?)(?:es|s)", text):
        shape = next(name for name in OUTLINES if found[2] in (name, name[:-1]))
        return None, [Wish(shape)] * ENGLISH_NUMBERS.index(found[1]), None
    if found := re.fullmatch(r"(.*) (left of|right of|above|below) (.*)", text):
        return None, [_english_wish(found[1]), _english_wish(found[3])], found[2].split()[0]
    return None, [_english_wish(part) for part in text.split(" and ")], None


def _english_wish(words: str) -> Wish:
    words = re.sub(r"^an? ", "", words)
    shape = next(word for word in words.split() if word in OUTLINES)
    before, _, after = words.partition(shape)
    colour = next((word for word in before.split() if word in INKS), None)
    size = next((word for word in before.split() if word in RADII), None)
    return Wish(shape, colour, size, PLACES.index(after.strip()) if after.strip() else None)


def _understand_chinese(text: str) -> tuple[str | None, list[Wish], str | None]:
    text = re.sub("^请?画", "", text).rstrip("。")
    if found := re.fullmatch("(.*)背景：(.*)", text):
        return CHINESE[found[1]], [_chinese_wish(part) for part in found[2].split("，")], None
    if found := re.fullmatch("(.*)背景上的(.*)", text):
        return CHINESE[found[1]], [_chinese_wish(found[2])], None
    if found := re.fullmatch("(两|三|四)个(.*)", text):
        return None, [Wish(CHINESE[found[2]])] * CHINESE_NUMBERS.index(found[1]), None
    if found := re.fullmatch("(.*)在(.*)的(左边|右边|上方|下方)", text):
        relation = {"左边": "left", "右边": "right", "上方": "above", "下方": "below"}[found[3]]
        return None, [_chinese_wish(found[1]), _chinese_wish(found[2])], relation
    return None, [_chinese_wish(part) for part in text.split("和")], None


def _chinese_wish(words: str) -> Wish:
    place = next((number for number, name in enumerate(CHINESE_PLACES) if words.startswith(name)), None)
    rest = words if place is None else words[2:]
    size = CHINESE[rest[0]] if rest[0] in "大小" else None
    rest = rest if size is None else rest[1:]
    colour, shape = (CHINESE[rest[:-2]], CHINESE[rest[-2:]]) if len(rest) > 2 else (None, CHINESE[rest])
    return Wish(shape, colour, size, place)


# --- judging edits and answers ----------------------------------------------------------------------------------------


def judge_edit(instruction: str, before: np.ndarray, after: np.ndarray) -> bool:
    """Whether the picture `after` is `before` with the instruction carried out, and nothing else changed."""
    source, result = look(before), look(after)
    assert source.paper, "the source is no scene"
    wished = [Wish(t.shape, t.colour, t.size, t.place) for t in source.things]
    paper, wishes = _carry_out(instruction, source.paper, wished)
    if result.is_flecked or result.paper != paper or len(result.things) != len(wishes):
        return False
    if any(thing.likeness < LOOSE for thing in result.things):
        return False
    by_place = {thing.place: thing for thing in result.things}
    return all(wish.place in by_place and wish.is_met(by_place[wish.place]) for wish in wishes)


def _carry_out(instruction: str, paper: str, wishes: list[Wish]) -> tuple[str, list[Wish]]:
    """The background and the things that should be there afterwards."""
    english = {
        "background": r"Make the background (?P<new>\w+)\.",
        "make": r"Make the (?P<name>\w+ \w+) (?P<new>\w+)\.",
        "turn": r"Turn the (?P<name>\w+ \w+) into an? (?P<new>\w+)\.",
        "move": r"Move the (?P<name>\w+ \w+) to the (?P<place>[\w ]+)\.",
        "remove": r"Remove the (?P<name>\w+ \w+)\.",
        "add": r"Add an? (?P<name>\w+ \w+) at the (?P<place>[\w ]+)\.",
    }
    chinese = {
        "background": "把背景变成(?P<new>..)。",
        "make": "把(?P<name>.{4})变成?(?P<new>.{1,2})。",
        "turn": "把(?P<name>.{4})换成(?P<new>..)。",
        "move": "把(?P<name>.{4})移到(?P<place>..)。",
        "remove": "去掉(?P<name>.{4})。",
        "add": "在(?P<place>..)加上(?P<name>.{4})。",
    }
    is_english = instruction.isascii()
    patterns = english if is_english else chinese
    matches = {verb: re.fullmatch(pattern, instruction) for verb, pattern in patterns.items()}
    verb, found = next((verb, match) for verb, match in matches.items() if match is not None)
    given = found.groupdict()
    new = given.get("new", "") if is_english else CHINESE.get(given.get("new", ""), "")
    place = (PLACES if is_english else CHINESE_PLACES).index(given["place"]) if "place" in given else None
    if verb == "background":
        return new, wishes
    named = _english_wish(given["name"]) if is_english else _chinese_wish(given["name"])
    if verb == "add":
        return paper, [*wishes, replace(named, place=place)]
    (old,) = (wish for wish in wishes if (wish.shape, wish.colour) == (named.shape, named.colour))
    others = [wish for wish in wishes if wish is not old]
    if verb == "remove":
        return paper, others
    if verb == "make":
        changed = replace(old, size=new) if new in RADII else replace(old, colour=new)
    elif verb == "turn":
        changed = replace(old, shape=new)
    else:
        changed = replace(old, place=place)
    return paper, [*others, changed]


def answer(question: str, picture: np.ndarray) -> str:
    """The answer to a question about a picture, in the question's language."""
    seen = look(picture)
    things = sorted(seen.things, key=lambda thing: thing.place)
    is_english = question.isascii()
    spelt = {name: name for name in CHINESE.values()} if is_english else {name: word for word, name in CHINESE.items()}
    places = PLACES if is_english else CHINESE_PLACES
    if question in ("How many things are there?", "有几个图形？"):
        return (ENGLISH_NUMBERS if is_english else CHINESE_NUMBERS)[len(things)]
    if question in ("What colour is the background?", "背景是什么颜色？"):
        return spelt[seen.paper]
    for pattern, value in (
        (r"What shape is at the (.*)\?|(..)是什么形状？", "shape"),
        (r"What colour is the thing at the (.*)\?|(..)是什么颜色？", "colour"),
    ):
        if found := re.fullmatch(pattern, question):
            place = places.index(found[1] or found[2])
            return spelt[next(getattr(thing, value) for thing in things if thing.place == place)]
    if found := re.fullmatch(r"Where is the first (.*)\?|第一个(.*)在哪里？", question):
        wish = _english_wish(found[1]) if is_english else _chinese_wish(found[2])
        return places[next(thing.place for thing in things if wish.is_met(thing))]
    found = re.fullmatch(r"Is there an? (.*)\?|有(.*)吗？", question)
    assert found is not None, question
    wish = _english_wish(found[1]) if is_english else _chinese_wish(found[2])
    is_there = any(wish.is_met(thing) for thing in things)
    return {True: ("yes", "是"), False: ("no", "否")}[is_there][0 if is_english else 1]
