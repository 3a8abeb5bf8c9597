"""The demo world: small scenes of coloured shapes, said in English and Chinese, asked about and edited.

A scene is up to four things in a 3 x 3 grid of cells on a plain background. Short prompts leave things open; what they
leave open has one default (the *canonical* layout), because the model regresses embeddings and would blur what it can't
know. Some combinations are held out: no training scene shows them and no training text names them (`held_out`), and
every evaluation prompt contains at least one. All functions are pure: randomness is a generator or (seed, index).
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, UInt8

from nexusgen.schema import IMAGE_MARK, Message, Task

Lang = Literal["en", "zh"]
Category = Literal["single", "two", "counting", "colours", "position", "attributes"]
CATEGORIES: tuple[Category, ...] = ("single", "two", "counting", "colours", "position", "attributes")
NUM_CELLS = 3  # on a side

# name -> (English, plural, Chinese)
SHAPES: Mapping[str, tuple[str, str, str]] = {
    "circle": ("circle", "circles", "圆形"),
    "square": ("square", "squares", "方块"),
    "triangle": ("triangle", "triangles", "三角"),
    "diamond": ("diamond", "diamonds", "菱形"),
    "cross": ("cross", "crosses", "十字"),
    "ring": ("ring", "rings", "圆环"),
}
# name -> (Chinese, RGB)
COLOURS: Mapping[str, tuple[str, tuple[int, int, int]]] = {
    "red": ("红色", (215, 35, 35)),
    "green": ("绿色", (35, 150, 60)),
    "blue": ("蓝色", (40, 75, 215)),
    "yellow": ("黄色", (240, 215, 40)),
    "purple": ("紫色", (135, 50, 175)),
    "orange": ("橙色", (245, 130, 25)),
    "cyan": ("青色", (45, 200, 215)),
    "pink": ("粉色", (250, 135, 190)),
}
BACKGROUNDS: Mapping[str, tuple[str, tuple[int, int, int]]] = {
    "white": ("白色", (245, 245, 245)),
    "black": ("黑色", (15, 15, 15)),
    "grey": ("灰色", (125, 125, 125)),
    "brown": ("棕色", (95, 60, 35)),
}
# name -> (Chinese, radius as a share of a cell's side)
SIZES: Mapping[str, tuple[str, float]] = {"small": ("小", 0.29), "large": ("大", 0.46)}
CELLS: tuple[tuple[str, str], ...] = (
    ("top left", "左上"),
    ("top", "上方"),
    ("top right", "右上"),
    ("left", "左边"),
    ("centre", "中间"),
    ("right", "右边"),
    ("bottom left", "左下"),
    ("bottom", "下方"),
    ("bottom right", "右下"),
)
DEFAULT_COLOUR: Mapping[str, str] = {
    "circle": "red",
    "square": "blue",
    "triangle": "green",
    "diamond": "yellow",
    "cross": "purple",
    "ring": "orange",
}
DEFAULT_SIZE, DEFAULT_BACKGROUND = "large", "white"

# Held out, about one combination in eight. Colour-shape pairs are never a default.
HELD_OUT_COLOURS = frozenset(
    {
        ("circle", "green"),
        ("square", "pink"),
        ("triangle", "blue"),
        ("diamond", "red"),
        ("cross", "cyan"),
        ("ring", "yellow"),
    }
)
HELD_OUT_PAIRS = frozenset({frozenset(p) for p in (("circle", "cross"), ("square", "ring"))})
HELD_OUT_COUNTS = frozenset({("circle", 3), ("diamond", 2), ("cross", 4)})
HELD_OUT_BACKGROUNDS = frozenset({("triangle", "black"), ("square", "brown"), ("diamond", "grey")})

_COUNT_CELLS: Mapping[int, tuple[int, ...]] = {2: (3, 5), 3: (1, 6, 8), 4: (0, 2, 6, 8)}
_NUMBERS: tuple[tuple[str, str], ...] = (("zero", "零"), ("one", "一"), ("two", "两"), ("three", "三"), ("four", "四"))
_RELATIONS: Mapping[str, tuple[str, str, int, int]] = {  # name -> (English, Chinese, first's cell, second's cell)
    "left": ("left of", "左边", 3, 5),
    "right": ("right of", "右边", 5, 3),
    "above": ("above", "上方", 1, 7),
    "below": ("below", "下方", 7, 1),
}


@dataclass(frozen=True, order=True)
class Thing:
    """One shape in one cell (0..8 in raster order)."""

    cell: int
    shape: str
    colour: str
    size: str = DEFAULT_SIZE


@dataclass(frozen=True)
class Scene:
    """Things in distinct cells, sorted by cell, on a background."""

    things: tuple[Thing, ...]
    background: str = DEFAULT_BACKGROUND

    def __post_init__(self) -> None:
        object.__setattr__(self, "things", tuple(sorted(self.things)))


@dataclass(frozen=True)
class Prompt:
    """A short prompt in one of GenEval's categories and the scene that it denotes, open details at their defaults."""

    text: str
    lang: Lang
    category: Category
    scene: Scene


@dataclass(frozen=True)
class Question:
    """A question about a scene and its one right answer; `kind` is what it asks for."""

    scene: Scene
    question: str
    answer: str
    lang: Lang
    kind: str


@dataclass(frozen=True)
class Edit:
    """An instruction that turns `source` into `target`."""

    source: Scene
    instruction: str
    lang: Lang
    kind: str
    target: Scene


@dataclass(frozen=True)
class WorldSample:
    """One training sample, images drawn."""

    key: str
    task: Task
    lang: Lang
    messages: tuple[Message, ...]
    images: tuple[UInt8[np.ndarray, "height width 3"], ...]
    meta: dict[str, Any] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------ drawing


def draw(scene: Scene, size: int = 96) -> UInt8[np.ndarray, "size size 3"]:
    """The scene as an RGB picture of `size` pixels on a side, edges smoothed."""
    canvas = np.empty((size, size, 3), dtype=np.float32)
    canvas[:] = BACKGROUNDS[scene.background][1]
    for thing in scene.things:
        mask, top, left = thing_mask(thing.shape, thing.size, thing.cell, size)
        patch = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
        patch += mask[..., None] * (np.array(COLOURS[thing.colour][1], dtype=np.float32) - patch)
    return (canvas + 0.5).astype(np.uint8)


@functools.cache
def thing_mask(shape: str, size_name: str, cell: int, size: int) -> tuple[Float[np.ndarray, "rows columns"], int, int]:
    """How much of each pixel the shape covers, within its cell's box, and that box's top and left."""
    row, column = divmod(cell, NUM_CELLS)
    edges = np.linspace(0, size, NUM_CELLS + 1).round().astype(int)
    top, bottom, left, right = edges[row], edges[row + 1], edges[column], edges[column + 1]
    factor = 8  # samples per pixel on a side
    pitch = size / NUM_CELLS
    y = (np.arange(factor * (bottom - top)) + 0.5) / factor + top - (row + 0.5) * pitch
    x = (np.arange(factor * (right - left)) + 0.5) / factor + left - (column + 0.5) * pitch
    radius = SIZES[size_name][1] * pitch
    inside = _inside(shape, y[:, None] / radius, x[None, :] / radius)
    mask = inside.reshape(bottom - top, factor, right - left, factor).mean(axis=(1, 3), dtype=np.float32)
    return mask, int(top), int(left)


def _inside(shape: str, y: Float[np.ndarray, "rows 1"], x: Float[np.ndarray, "1 columns"]) -> np.ndarray:
    """Whether points (in units of the radius, y downwards) lie in the shape."""
    distance = np.hypot(y, x)
    inside: Mapping[str, Callable[[], np.ndarray]] = {
        "circle": lambda: distance <= 1,
        "square": lambda: np.maximum(abs(y), abs(x)) <= 0.88,
        "triangle": lambda: (y <= 0.85) & (abs(x) <= (y + 1.0) / 1.85),
        "diamond": lambda: abs(y) + abs(x) * 1.35 <= 1.08,
        "cross": lambda: (np.minimum(abs(y), abs(x)) <= 0.3) & (np.maximum(abs(y), abs(x)) <= 1),
        "ring": lambda: (distance <= 1) & (distance >= 0.55),
    }
    return inside[shape]()


def cell_labels(scene: Scene) -> tuple[Int[np.ndarray, "9"], Int[np.ndarray, "9"], Int[np.ndarray, "9"]]:
    """Shape, colour and size of each cell, counted from 1; 0 where the cell is empty."""
    labels = np.zeros((3, NUM_CELLS**2), dtype=np.int64)
    for thing in scene.things:
        labels[0, thing.cell] = 1 + list(SHAPES).index(thing.shape)
        labels[1, thing.cell] = 1 + list(COLOURS).index(thing.colour)
        labels[2, thing.cell] = 1 + list(SIZES).index(thing.size)
    return labels[0], labels[1], labels[2]


# ----------------------------------------------------------------------------------------------------------- held out


def held_out(scene: Scene) -> set[str]:
    """The held-out combinations that a scene contains, by name; empty for training scenes."""
    found = set()
    shapes = [thing.shape for thing in scene.things]
    for thing in scene.things:
        if (thing.shape, thing.colour) in HELD_OUT_COLOURS:
            found.add(f"{thing.colour} {thing.shape}")
        if (thing.shape, scene.background) in HELD_OUT_BACKGROUNDS:
            found.add(f"{thing.shape} on {scene.background}")
    for pair in HELD_OUT_PAIRS:
        if pair <= set(shapes):
            found.add(" with ".join(sorted(pair)))
    for shape, count in HELD_OUT_COUNTS:
        if shapes.count(shape) == count:
            found.add(f"{count} {shape}")
    return found


def held_out_edit(edit: Edit) -> set[str]:
    """The held-out combinations in an edit's pictures, or named by turning one shape of a pair into the other."""
    shapes = {thing.shape for thing in edit.source.things + edit.target.things}
    named = {" with ".join(sorted(pair)) for pair in HELD_OUT_PAIRS if pair <= shapes}
    return held_out(edit.source) | held_out(edit.target) | named


def sample_scene(rng: np.random.Generator) -> Scene:
    """A random training scene: one to three things, or (one in six) two to four of one kind."""
    while True:
        scene = _random_scene(rng)
        if not held_out(scene):
            return scene


def _random_scene(rng: np.random.Generator) -> Scene:
    background = _pick(rng, list(BACKGROUNDS))
    if rng.random() < 1 / 6:
        count = int(rng.integers(2, 5))
        shape, colour, size = _pick(rng, list(SHAPES)), _pick(rng, list(COLOURS)), _pick(rng, list(SIZES))
        cells = rng.permutation(NUM_CELLS**2)[:count]
        return Scene(tuple(Thing(int(cell), shape, colour, size) for cell in cells), background)
    cells = rng.permutation(NUM_CELLS**2)[: int(rng.integers(1, 4))]
    things = [
        Thing(int(cell), _pick(rng, list(SHAPES)), _pick(rng, list(COLOURS)), _pick(rng, list(SIZES))) for cell in cells
    ]
    return Scene(tuple(things), background)


def _held_out_scene(rng: np.random.Generator) -> Scene:
    while True:
        scene = _random_scene(rng)
        if held_out(scene):
            return scene


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


# -------------------------------------------------------------------------------------------------------------- words


def explicit_caption(scene: Scene, lang: Lang) -> str:
    """Everything about a scene: background, then each thing's size, colour, shape and place, in reading order."""
    if lang == "zh":
        things = "，".join(f"{CELLS[t.cell][1]}{_name(t, lang)}" for t in scene.things)
        return f"{BACKGROUNDS[scene.background][0]}背景：{things}"
    things = ", ".join(f"{_name(t, lang)} {CELLS[t.cell][0]}" for t in scene.things)
    return f"{scene.background} background: {things}"


def _name(thing: Thing, lang: Lang, has_size: bool = True) -> str:
    if lang == "zh":
        return f"{SIZES[thing.size][0] if has_size else ''}{COLOURS[thing.colour][0]}{SHAPES[thing.shape][2]}"
    return f"{thing.size + ' ' if has_size else ''}{thing.colour} {SHAPES[thing.shape][0]}"


def chinese_words(text: str) -> list[str]:
    """A Chinese text cut into the world's words, and single characters between them."""
    named = [word[0] for names in (COLOURS, BACKGROUNDS, SIZES) for word in names.values()]
    named += [word[2] for word in SHAPES.values()] + [name for _, name in CELLS] + ["背景"]
    return re.findall("|".join([*sorted(set(named), key=len, reverse=True), "."]), text, re.DOTALL)


def _a(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _default(shape: str, cell: int) -> Thing:
    return Thing(cell, shape, DEFAULT_COLOUR[shape])


def _single(shape: str, background: str, lang: Lang) -> Prompt:
    if lang == "zh":
        text = f"{BACKGROUNDS[background][0]}背景上的{SHAPES[shape][2]}"
    else:
        text = f"{_a(shape)} on a {background} background"
    return Prompt(text, lang, "single", Scene((_default(shape, 4),), background))


def _two(first: str, second: str, lang: Lang) -> Prompt:
    joined = f"{SHAPES[first][2]}和{SHAPES[second][2]}" if lang == "zh" else f"{_a(first)} and {_a(second)}"
    return Prompt(joined, lang, "two", Scene((_default(first, 3), _default(second, 5))))


def _counting(shape: str, count: int, lang: Lang) -> Prompt:
    number = _NUMBERS[count]
    text = f"{number[1]}个{SHAPES[shape][2]}" if lang == "zh" else f"{number[0]} {SHAPES[shape][1]}"
    return Prompt(text, lang, "counting", Scene(tuple(_default(shape, cell) for cell in _COUNT_CELLS[count])))


def _colours(shape: str, colour: str, lang: Lang) -> Prompt:
    thing = Thing(4, shape, colour)
    name = _name(thing, lang, has_size=False)
    return Prompt(name if lang == "zh" else _a(name), lang, "colours", Scene((thing,)))


def _position(first: str, second: str, relation: str, lang: Lang) -> Prompt:
    english, chinese, first_cell, second_cell = _RELATIONS[relation]
    text = f"{_a(first)} {english} {_a(second)}"
    if lang == "zh":
        text = f"{SHAPES[first][2]}在{SHAPES[second][2]}的{chinese}"
    return Prompt(text, lang, "position", Scene((_default(first, first_cell), _default(second, second_cell))))


def _attributes(first: Thing, second: Thing, lang: Lang) -> Prompt:
    names = [_name(thing, lang, has_size=False) for thing in (first, second)]
    text = "和".join(names) if lang == "zh" else " and ".join(_a(name) for name in names)
    return Prompt(text, lang, "attributes", Scene((first, second)))


@functools.cache
def short_prompts(lang: Lang, is_held_out: bool) -> Mapping[Category, tuple[Prompt, ...]]:
    """Every short prompt of a language by category, those with a held-out combination or those without."""
    pairs = list(itertools.permutations(SHAPES, 2))
    coloured = [(a, b) for a in itertools.product(SHAPES, COLOURS) for b in itertools.product(SHAPES, COLOURS)]
    every: Mapping[Category, list[Prompt]] = {
        "single": [_single(shape, background, lang) for shape in SHAPES for background in BACKGROUNDS],
        "two": [_two(a, b, lang) for a, b in pairs],
        "counting": [_counting(shape, count, lang) for shape in SHAPES for count in _COUNT_CELLS],
        "colours": [_colours(shape, colour, lang) for shape in SHAPES for colour in COLOURS],
        "position": [_position(a, b, relation, lang) for a, b in pairs for relation in _RELATIONS],
        "attributes": [
            _attributes(Thing(3, *a), Thing(5, *b), lang) for a, b in coloured if a[0] != b[0] and a[1] != b[1]
        ],
    }
    return {
        category: tuple(prompt for prompt in prompts if bool(held_out(prompt.scene)) is is_held_out)
        for category, prompts in every.items()
    }


def understanding_conversation(
    scene: Scene, lang: Lang, rng: np.random.Generator, num_questions: int = 2
) -> tuple[Message, ...]:
    """A caption (for a third of the pictures) or questions of distinct kinds, with answers, about one picture."""
    if rng.random() < 1 / 3:
        turns = [(_CAPTION_REQUEST[lang], explicit_caption(scene, lang))]
    else:
        turns = [(q.question, q.answer) for q in questions(scene, lang, rng, count=num_questions)]
    messages: list[Message] = []
    for index, (question, answer) in enumerate(turns):
        mark = f"{IMAGE_MARK}\n" if index == 0 else ""
        messages += [Message("user", mark + question), Message("assistant", answer)]
    return tuple(messages)


_CAPTION_REQUEST: Mapping[Lang, str] = {"en": "Describe the picture.", "zh": "描述这张图片。"}
_YES_NO: Mapping[Lang, tuple[str, str]] = {"en": ("yes", "no"), "zh": ("是", "否")}
QUESTION_KINDS = ("count", "background", "shape", "colour", "where", "exists")


def questions(scene: Scene, lang: Lang, rng: np.random.Generator, count: int) -> list[Question]:
    """`count` questions of distinct kinds about a scene."""
    return [ask(scene, QUESTION_KINDS[kind], lang, rng) for kind in rng.permutation(len(QUESTION_KINDS))[:count]]


def ask(scene: Scene, kind: str, lang: Lang, rng: np.random.Generator) -> Question:
    """One question of a kind. `exists` is answered yes and no equally often."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    cell, is_english = CELLS[thing.cell], lang == "en"
    if kind == "count":
        text = "How many things are there?" if is_english else "有几个图形？"
        answer = _NUMBERS[len(scene.things)][0 if is_english else 1]
    elif kind == "background":
        text = "What colour is the background?" if is_english else "背景是什么颜色？"
        answer = scene.background if is_english else BACKGROUNDS[scene.background][0]
    elif kind == "shape":
        text = f"What shape is at the {cell[0]}?" if is_english else f"{cell[1]}是什么形状？"
        answer = SHAPES[thing.shape][0 if is_english else 2]
    elif kind == "colour":
        text = f"What colour is the thing at the {cell[0]}?" if is_english else f"{cell[1]}是什么颜色？"
        answer = thing.colour if is_english else COLOURS[thing.colour][0]
    elif kind == "where":
        alike = [t for t in scene.things if (t.colour, t.shape) == (thing.colour, thing.shape)]
        thing, cell = alike[0], CELLS[alike[0].cell]
        name = _name(thing, lang, has_size=False)
        text = f"Where is the first {name}?" if is_english else f"第一个{name}在哪里？"
        answer = cell[0 if is_english else 1]
    else:
        is_there = rng.random() < 0.5
        asked = thing if is_there else _absent_thing(scene, rng)
        name = _name(asked, lang, has_size=False)
        text = f"Is there {_a(name)}?" if is_english else f"有{name}吗？"
        answer = _YES_NO[lang][0 if is_there else 1]
    return Question(scene, text, answer, lang, kind)


def _absent_thing(scene: Scene, rng: np.random.Generator) -> Thing:
    present = {(t.shape, t.colour) for t in scene.things}
    while True:
        thing = Thing(0, _pick(rng, list(SHAPES)), _pick(rng, list(COLOURS)))
        if (thing.shape, thing.colour) not in present | HELD_OUT_COLOURS:
            return thing


# -------------------------------------------------------------------------------------------------------------- edits

EDIT_KINDS = ("colour", "shape", "size", "move", "remove", "add", "background")


def sample_edit(rng: np.random.Generator, lang: Lang) -> Edit:
    """A random training edit: of any kind, with no held-out combination in its pictures or its instruction."""
    while True:
        source = _random_scene(rng)
        edit = _edit(source, EDIT_KINDS[int(rng.integers(len(EDIT_KINDS)))], lang, rng)
        if edit is not None and not held_out_edit(edit):
            return edit


def _edit(scene: Scene, kind: str, lang: Lang, rng: np.random.Generator) -> Edit | None:
    """An edit of one kind that names its thing unambiguously, or None where the scene doesn't allow it."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    if sum((t.colour, t.shape) == (thing.colour, thing.shape) for t in scene.things) > 1:
        return None
    name, is_english = _name(thing, lang, has_size=False), lang == "en"
    free = [cell for cell in range(NUM_CELLS**2) if cell not in {t.cell for t in scene.things}]
    cell = free[int(rng.integers(len(free)))]
    others = tuple(t for t in scene.things if t != thing)
    changed: tuple[Thing, ...]
    background = scene.background
    if kind == "colour":
        new = _pick(rng, [c for c in COLOURS if c != thing.colour])
        changed = (*others, replace(thing, colour=new))
        text = f"Make the {name} {new}." if is_english else f"把{name}变成{COLOURS[new][0]}。"
    elif kind == "shape":
        new = _pick(rng, [s for s in SHAPES if s != thing.shape])
        changed = (*others, replace(thing, shape=new))
        text = f"Turn the {name} into {_a(new)}." if is_english else f"把{name}换成{SHAPES[new][2]}。"
    elif kind == "size":
        new = "small" if thing.size == "large" else "large"
        changed = (*others, replace(thing, size=new))
        text = f"Make the {name} {new}." if is_english else f"把{name}变{SIZES[new][0]}。"
    elif kind == "move":
        changed = (*others, replace(thing, cell=cell))
        text = f"Move the {name} to the {CELLS[cell][0]}." if is_english else f"把{name}移到{CELLS[cell][1]}。"
    elif kind == "remove":
        if not others:
            return None
        changed = others
        text = f"Remove the {name}." if is_english else f"去掉{name}。"
    elif kind == "add":
        if len(scene.things) > 2:
            return None
        added = Thing(cell, _pick(rng, list(SHAPES)), _pick(rng, list(COLOURS)))
        changed = (*scene.things, added)
        words = _name(added, lang, has_size=False)
        text = f"Add {_a(words)} at the {CELLS[cell][0]}." if is_english else f"在{CELLS[cell][1]}加上{words}。"
    else:
        changed = scene.things
        background = _pick(rng, [b for b in BACKGROUNDS if b != scene.background])
        text = f"Make the background {background}." if is_english else f"把背景变成{BACKGROUNDS[background][0]}。"
    return Edit(scene, text, lang, kind, Scene(changed, background))


# --------------------------------------------------------------------------------------------------- training samples

_REQUESTS: Mapping[Lang, tuple[str, ...]] = {
    "en": ("{}", "Draw {}.", "Please draw {}."),
    "zh": ("{}", "画{}", "请画{}。"),
}
DRAWN: Mapping[Lang, str] = {"en": f"Here is the image: {IMAGE_MARK}", "zh": f"图像如下：{IMAGE_MARK}"}


def training_samples(task: Task, start: int, count: int, seed: int, size: int = 96) -> Iterator[WorldSample]:
    """Training samples number `start` to `start + count` of a task; sample i depends on (seed, task, i) alone.

    Generation: half short prompts (spread evenly over the categories), half explicit captions. Languages alternate.
    """
    for index in range(start, start + count):
        rng = np.random.default_rng([seed, ("understanding", "generation", "editing").index(task), index])
        lang: Lang = "en" if index % 2 == 0 else "zh"
        key = f"{task}-{index:07d}"
        if task == "understanding":
            scene = sample_scene(rng)
            messages = understanding_conversation(scene, lang, rng)
            yield WorldSample(key, task, lang, messages, (draw(scene, size),))
        elif task == "generation":
            text, scene, category = _training_prompt(rng, lang)
            request = _pick(rng, _REQUESTS[lang]).format(text)
            messages = (Message("user", request), Message("assistant", DRAWN[lang]))
            yield WorldSample(key, task, lang, messages, (draw(scene, size),), {"category": category})
        else:
            edit = sample_edit(rng, lang)
            messages = (Message("user", f"{IMAGE_MARK} {edit.instruction}"), Message("assistant", edit_reply(edit)))
            pictures = (draw(edit.source, size), draw(edit.target, size))
            yield WorldSample(key, task, lang, messages, pictures, {"edit_kind": edit.kind})


def edit_reply(edit: Edit) -> str:
    """What the assistant says to an edit: where it sees the thing that is named, if one is, and the image.

    Finding the thing and redrawing the picture are so learned one after the other: text that was said is read again.
    """
    named = set(edit.source.things) - set(edit.target.things)
    return "".join(_FOUND[edit.lang](thing) for thing in named) + DRAWN[edit.lang]


_FOUND: Mapping[Lang, Callable[[Thing], str]] = {
    "en": lambda thing: f"The {_name(thing, 'en', has_size=False)} is at the {CELLS[thing.cell][0]}. ",
    "zh": lambda thing: f"{_name(thing, 'zh', has_size=False)}在{CELLS[thing.cell][1]}。",
}


def _training_prompt(rng: np.random.Generator, lang: Lang) -> tuple[str, Scene, str]:
    if rng.random() < 0.5:
        scene = sample_scene(rng)
        return explicit_caption(scene, lang), scene, "explicit"
    options = short_prompts(lang, is_held_out=False)[CATEGORIES[int(rng.integers(len(CATEGORIES)))]]
    prompt = options[int(rng.integers(len(options)))]
    return prompt.text, prompt.scene, prompt.category


# --------------------------------------------------------------------------------------------------------- evaluation


def evaluation_prompts(per_category: int = 24, seed: int = 0) -> list[Prompt]:
    """Short prompts, each with a held-out combination, half English and half Chinese, in order of category.

    A category with few held-out combinations says each in several ways before it says one again.
    """
    rng = np.random.default_rng([seed, 101])
    chosen = []
    for category in CATEGORIES:
        options = {lang: short_prompts(lang, is_held_out=True)[category] for lang in _REQUESTS}
        orders = {lang: rng.permutation(len(options[lang])) for lang in _REQUESTS}
        for index in range(per_category):
            lang, number = _lang(index), index // 2
            repeat, place = divmod(number, len(options[lang]))
            prompt = options[lang][int(orders[lang][place])]
            request = _REQUESTS[lang][(number + repeat) % len(_REQUESTS[lang])]
            chosen.append(replace(prompt, text=request.format(prompt.text)))
    return chosen


def explicit_prompts(count: int, seed: int = 0) -> list[tuple[str, Lang, Scene]]:
    """Explicit captions of scenes that contain a held-out combination."""
    rng = np.random.default_rng([seed, 102])
    made: list[tuple[str, Lang, Scene]] = []
    for index in range(count):
        scene, lang = _held_out_scene(rng), _lang(index)
        made.append((explicit_caption(scene, lang), lang, scene))
    return made


def evaluation_questions(count: int, seed: int = 0) -> list[Question]:
    """Questions about fresh scenes, every second with a held-out combination; kinds and languages in equal parts."""
    rng = np.random.default_rng([seed, 103])
    asked = []
    for index in range(count):
        scene = _held_out_scene(rng) if index % 2 else sample_scene(rng)
        number = index // 2
        kind = QUESTION_KINDS[number % len(QUESTION_KINDS)]
        asked.append(ask(scene, kind, _lang(number // len(QUESTION_KINDS)), rng))
    return asked


def majority_score(asked: Sequence[Question]) -> float:
    """The score of always giving the most frequent answer of each kind and language."""
    right = 0
    for group in {(q.kind, q.lang) for q in asked}:
        answers = [q.answer for q in asked if (q.kind, q.lang) == group]
        right += max(answers.count(answer) for answer in set(answers))
    return right / max(len(asked), 1)


def evaluation_edits(count: int, seed: int = 0) -> list[Edit]:
    """Edits with a held-out combination (`held_out_edit`), kinds and languages in equal parts."""
    rng = np.random.default_rng([seed, 104])
    return [_held_out_edit_of(EDIT_KINDS[index // 2 % len(EDIT_KINDS)], _lang(index), rng) for index in range(count)]


def _held_out_edit_of(kind: str, lang: Lang, rng: np.random.Generator) -> Edit:
    while True:
        edit = _edit(_random_scene(rng), kind, lang, rng)
        if edit is not None and held_out_edit(edit):
            return edit


def _lang(index: int) -> Lang:
    return "en" if index % 2 == 0 else "zh"
