"""Contact sheets: pictures in rows, each with its text below and a frame that says whether it passed."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

GREEN, RED, GREY = (46, 160, 67), (207, 34, 46), (208, 215, 222)
PICTURE_PX = 128  # shorter sides are enlarged to this, pixels kept square
_FRAME_PX = 4
_SEAM_PX = 2  # of the frame's colour, between pictures of one sample: two of one background would look like one
_GAP_PX = 10
_LINE_PX = 13
_NUM_LINES = 3
_CHARACTER_PX = 6.2  # mean width of PIL's own font at the size used


@dataclass(frozen=True)
class Cell:
    """Pictures of one sample, side by side, with the text below; `passed` None gives a grey frame."""

    pictures: tuple[Image.Image, ...]
    text: str
    passed: bool | None = None


def draw_sheet(cells: Sequence[Cell], num_columns: int, title: str = "") -> Image.Image:
    """All cells in rows of `num_columns`, as one picture."""
    pictures_per_cell = max((len(cell.pictures) for cell in cells), default=1)
    width = pictures_per_cell * (PICTURE_PX + _SEAM_PX) - _SEAM_PX + 2 * _FRAME_PX
    height = PICTURE_PX + 2 * _FRAME_PX + _NUM_LINES * _LINE_PX
    num_columns = max(1, min(num_columns, len(cells)))
    num_rows = -(-len(cells) // num_columns)
    top = _GAP_PX + (2 * _LINE_PX if title else 0)
    size = (_GAP_PX + num_columns * (width + _GAP_PX), top + num_rows * (height + _GAP_PX))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((_GAP_PX, _GAP_PX), title, "black", ImageFont.load_default(12))
    font = ImageFont.load_default(11)
    for index, cell in enumerate(cells):
        x = _GAP_PX + index % num_columns * (width + _GAP_PX)
        y = top + index // num_columns * (height + _GAP_PX)
        colour = GREY if cell.passed is None else GREEN if cell.passed else RED
        pen.rectangle((x, y, x + width - 1, y + PICTURE_PX + 2 * _FRAME_PX - 1), colour)
        for column, picture in enumerate(cell.pictures):
            sheet.paste(_fit(picture), (x + _FRAME_PX + column * (PICTURE_PX + _SEAM_PX), y + _FRAME_PX))
        for line, text in enumerate(_wrap(cell.text, int(width / _CHARACTER_PX))):
            pen.text((x, y + PICTURE_PX + 2 * _FRAME_PX + line * _LINE_PX), text, "black", font)
    return sheet


def is_drawable(text: str) -> bool:
    """Whether PIL's own font has the text's characters; it has no Chinese."""
    return all(ord(character) < 0x250 for character in text)


def sample_cell(row: Mapping[str, Any], columns: Sequence[str], passed: bool | None, before: str = "") -> Cell:
    """The cell of a sample's row: its pictures (PNG; grey where there is none), and its prompt or key."""
    shown = [row[name] for name in columns]
    pictures = tuple(Image.open(io.BytesIO(png)) if png else Image.new("RGB", (8, 8), "lightgrey") for png in shown)
    text = row["prompt"] if is_drawable(row["prompt"]) else f"({row['lang']}) {row['key']}"
    return Cell(pictures, before + text, passed)


def _fit(picture: Image.Image) -> Image.Image:
    """The picture on a square of PICTURE_PX, aspect kept."""
    scale = PICTURE_PX / max(picture.size)
    resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    width, height = (max(1, round(side * scale)) for side in picture.size)
    square = Image.new("RGB", (PICTURE_PX, PICTURE_PX), "white")
    square.paste(
        picture.convert("RGB").resize((width, height), resampling),
        ((PICTURE_PX - width) // 2, (PICTURE_PX - height) // 2),
    )
    return square


def _wrap(text: str, num_characters: int) -> list[str]:
    return textwrap.wrap(text, max(8, num_characters), max_lines=_NUM_LINES, placeholder="...")
