"""Plots as inline SVG: scores with their intervals, curves with bands, histograms. Text alone, no drawing library.

They take their colours from the page's style (`html_page.py`), so they are readable in light and dark; every mark has a
title that tells its numbers. A plot is as wide as its place; its text is sized for a phone's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nexusgen.statistics import Interval
from pipelines.html_page import Html, escape

_WIDTH = 380  # of a plot's own coordinates: about the pixels that a phone has for it
_HEIGHT = 192
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 38
_CHARACTER = 6.0  # mean width
_COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)")
_MAX_LABEL = 24
_NUM_BINS = 20


@dataclass(frozen=True)
class Curve:
    """Values at 0, 1, 2, ..., and the bounds of each."""

    name: str
    points: Sequence[Interval]


def draw_scores(title: str, scores: Mapping[str, Interval]) -> Html:
    """Bars from 0 to 1, each with its interval and its number."""
    names = [_short(name, _MAX_LABEL) for name in scores]
    left = 12 + _CHARACTER * max(map(len, names), default=0)
    right, row = 44, 22
    height = _TOP + row * len(scores) + 22
    to_x = _scale((0, 1), (left, _WIDTH - right))
    parts = [_line(to_x(at), _TOP, to_x(at), height - 20, "grid") for at in (0, 0.25, 0.5, 0.75, 1)]
    parts += [_text(to_x(at), height - 6, f"{at:g}", "middle", "pale") for at in (0, 0.5, 1)]
    for number, (name, full, score) in enumerate(zip(names, scores, scores.values(), strict=True)):
        top, middle = _TOP + row * number + 4, _TOP + row * number + row / 2
        parts += [
            f"<g><title>{escape(f'{full}: {score}')}</title>",
            f'<rect x="{left:.1f}" y="{top}" width="{max(0.0, to_x(score.value) - left):.1f}" height="{row - 8}" '
            f'fill="{_COLOURS[0]}" fill-opacity=".55"/>',
            _line(to_x(score.low), middle, to_x(score.high), middle, "ink"),
            _line(to_x(score.low), middle - 4, to_x(score.low), middle + 4, "ink"),
            _line(to_x(score.high), middle - 4, to_x(score.high), middle + 4, "ink"),
            "</g>",
            _text(left - 6, middle + 4, name, "end"),
            _text(_WIDTH - right + 6, middle + 4, f"{score.value:.3f}", "start"),
        ]
    return _figure(title, height, parts)


def draw_curves(title: str, x_label: str, curves: Sequence[Curve]) -> Html:
    """Lines through the points, with a band between their bounds; the vertical axis begins at 0 or below."""
    drawn = [curve for curve in curves if curve.points]
    low = min([0.0, *(point.low for curve in drawn for point in curve.points)])
    high = max([point.high for curve in drawn for point in curve.points], default=1.0)
    count = max((len(curve.points) for curve in drawn), default=1)
    legend = 16 * -(-len(drawn) // 2)
    height = _HEIGHT + legend
    axes = _Axes((0, max(1, count - 1)), _nice(low, high), height - legend)
    parts = axes.draw(x_label)
    for number, curve in enumerate(drawn):
        colour = _COLOURS[number % len(_COLOURS)]
        upper = [f"{axes.x(i):.1f},{axes.y(point.high):.1f}" for i, point in enumerate(curve.points)]
        lower = [f"{axes.x(i):.1f},{axes.y(point.low):.1f}" for i, point in enumerate(curve.points)]
        middle = [f"{axes.x(i):.1f},{axes.y(point.value):.1f}" for i, point in enumerate(curve.points)]
        parts += [
            f'<polygon points="{" ".join(upper + lower[::-1])}" fill="{colour}" fill-opacity=".2"/>',
            f'<polyline points="{" ".join(middle)}" fill="none" stroke="{colour}" stroke-width="2"/>',
        ]
        parts += [
            f'<circle cx="{axes.x(i):.1f}" cy="{axes.y(point.value):.1f}" r="{2.5 if count <= 32 else 1.2}" '
            f'fill="{colour}"><title>{escape(f"{curve.name}, {i}: {point}")}</title></circle>'
            for i, point in enumerate(curve.points)
        ]
        x, y = _LEFT + (_WIDTH - _LEFT) / 2 * (number % 2), height - legend + 12 + 16 * (number // 2)
        parts += [_line(x, y - 4, x + 16, y - 4, colour), _text(x + 21, y, _short(curve.name, _MAX_LABEL), "start")]
    return _figure(title, height, parts)


def draw_histogram(title: str, x_label: str, groups: Mapping[str, Sequence[float]]) -> Html:
    """How often values occur, as an outline for each group; all in the same bins."""
    drawn = {name: np.asarray(values, dtype=np.float64) for name, values in groups.items() if len(values)}
    everything = np.concatenate(list(drawn.values())) if drawn else np.zeros(1)
    low, high = float(everything.min()), float(everything.max())
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _NUM_BINS + 1)
    counts = {name: np.histogram(values, edges)[0] for name, values in drawn.items()}
    legend = 16 * -(-len(drawn) // 2)
    height = _HEIGHT + legend
    top = max((int(found.max()) for found in counts.values()), default=1)
    axes = _Axes((low, high), (0, top), height - legend)
    parts = axes.draw(x_label)
    for number, (name, found) in enumerate(counts.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        corners = [f"{axes.x(low):.1f},{axes.y(0):.1f}"]
        for place, count in enumerate(found.tolist()):
            corners += [f"{axes.x(float(edge)):.1f},{axes.y(count):.1f}" for edge in edges[place : place + 2]]
        corners.append(f"{axes.x(high):.1f},{axes.y(0):.1f}")
        parts.append(
            f'<polygon points="{" ".join(corners)}" fill="{colour}" fill-opacity=".25" stroke="{colour}">'
            f"<title>{escape(f'{name}: {int(found.sum())} values')}</title></polygon>"
        )
        x, y = _LEFT + (_WIDTH - _LEFT) / 2 * (number % 2), height - legend + 12 + 16 * (number // 2)
        mean = f": mean {drawn[name].mean():.3g}"
        label = _short(name, _MAX_LABEL - len(mean)) + mean
        parts += [_line(x, y - 4, x + 16, y - 4, colour), _text(x + 21, y, label, "start")]
    return _figure(title, height, parts)


class _Axes:
    """Both axes of a plot: `x` and `y` give places of values."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float], height: float) -> None:
        self._ranges, self._bottom = (x_range, y_range), height - _BOTTOM
        self.x = _scale(x_range, (_LEFT, _WIDTH - _RIGHT))
        self.y = _scale(y_range, (self._bottom, _TOP))

    def draw(self, x_label: str) -> list[str]:
        """Lines, numbers and the label below."""
        parts: list[str] = []
        for at in _ticks(*self._ranges[1]):
            parts += [
                _line(_LEFT, self.y(at), _WIDTH - _RIGHT, self.y(at), "grid"),
                _text(_LEFT - 5, self.y(at) + 4, f"{at:g}", "end", "pale"),
            ]
        parts += [_text(self.x(at), self._bottom + 15, f"{at:g}", "middle", "pale") for at in _ticks(*self._ranges[0])]
        return [*parts, _text((_LEFT + _WIDTH - _RIGHT) / 2, self._bottom + 30, _short(x_label, 56), "middle", "pale")]


def _scale(values: tuple[float, float], places: tuple[float, float]) -> Callable[[float], float]:
    (low, high), (start, end) = values, places
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers within a range, four to nine of them."""
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if raw <= unit * factor * 1.0001)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _nice(low: float, high: float) -> tuple[float, float]:
    """A range with a little room above."""
    return low, high + 0.06 * (high - low) if high > low else low + 1.0


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    colour, width = {"grid": ("var(--line)", 1.0), "ink": ("var(--ink)", 1.5)}.get(kind, (kind, 2.0))
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width:g}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    of_kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{of_kind}>{escape(text)}</text>'


def _figure(title: str, height: float, parts: Sequence[str]) -> Html:
    """A drawing below its title."""
    return Html(
        f'<figure><figcaption class="plot">{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )
