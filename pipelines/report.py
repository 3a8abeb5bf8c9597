"""The report of `inspect` as files: counts, contact sheets of each task, histograms, and one page that holds all.

Pictures are drawn without a display. The page needs nothing beside it: its pictures are part of it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from nexusgen.schema import IMAGE_MARK, TASKS
from pipelines.html_page import (
    Html,
    card,
    cards,
    escape,
    heading,
    page,
    picture,
    table,
    text_line,
    to_png,
    wide_picture,
)
from pipelines.inspect import Shown
from pipelines.sheets import Cell, draw_sheet, is_drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_COLUMNS = 6
MAX_BARS = 8
MAX_ROWS_SHOWN = 50
_BLUE, _RED = "#3b6ea8", "#cf222e"


def write_report(folder: Path, found: Mapping[str, Any], text: str, shown: Sequence[Shown]) -> list[Path]:
    """Write inspect.json, inspect.txt, samples-TASK.png, histograms.png and inspect.html. Raises: OSError."""
    sheets = {task: draw_samples([sample for sample in shown if sample.task == task], task) for task in TASKS}
    files = {
        "inspect.json": json.dumps(found, indent=2, ensure_ascii=False).encode(),
        "inspect.txt": f"{text}\n".encode(),
        **{f"samples-{task}.png": to_png(sheet) for task, sheet in sheets.items() if sheet is not None},
        "histograms.png": draw_histograms(found),
    }
    files["inspect.html"] = _page(found, text, shown, files["histograms.png"]).encode()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


def draw_samples(shown: Sequence[Shown], task: str) -> Image.Image | None:
    """A contact sheet of samples: each one's pictures, key and text; nothing if there is no picture.

    Samples with more pictures come below those with fewer, in fewer columns.
    """
    sheets = []
    for num_pictures in sorted({len(sample.pictures) for sample in shown} - {0}):
        cells = [Cell(one.pictures, _caption(one)) for one in shown if len(one.pictures) == num_pictures]
        each = "1 picture" if num_pictures == 1 else f"{num_pictures} pictures"
        title = f"{task}: {len(cells)} samples of {each}, drawn by their keys"
        sheets.append(draw_sheet(cells, max(1, NUM_COLUMNS // num_pictures), title))
    if not sheets:
        return None
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def _caption(sample: Shown) -> str:
    """Key and text for a sheet, whose font has no Chinese."""
    spoken = " / ".join(_plain(message.content) for message in sample.messages if message.role != "system")
    key = sample.key if len(sample.key) <= 20 else f"...{sample.key[-17:]}"
    texts = [key if is_drawable(key) else ascii(key), spoken if is_drawable(spoken) else f"({sample.lang} text)"]
    return " ".join(text for text in texts if text)


def _plain(text: str) -> str:
    return " ".join(text.replace(IMAGE_MARK, " ").split())


def draw_histograms(found: Mapping[str, Any]) -> bytes:
    """Bars of the counts by name, histograms of sizes and lengths, as PNG."""
    # Not above: importing it looks for fonts and may write a list of them, and importing a module does nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 3).flatten()
    for place, (title, counts) in zip(
        axes[:6],
        (
            ("tasks", found["by_task"]),
            ("languages", found["by_language"]),
            ("conventions", found["conventions"]["samples"]),
            ("sources", found["by_source"]),
            ("licences", found["by_licence"]),
            ("quarantined", found["quarantined_by_code"]),
        ),
        strict=True,
    ):
        _draw_bars(place, title, counts, _RED if title == "quarantined" else _BLUE)
    histograms = found["histograms"]
    tokenizer = found["text_tokens"]["tokenizer"]
    for place, title, bins in (
        (axes[6], "height of images in pixels", histograms["heights"]),
        (axes[7], "width of images in pixels", histograms["widths"]),
        (axes[8], f"text in tokens ({tokenizer})", histograms["text_tokens"]),
    ):
        _draw_bins(place, title, bins)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_bars(place: Axes, title: str, counts: Mapping[str, int], colour: str) -> None:
    pairs = [(name, count) for name, count in counts.items() if count]
    rest = sum(count for _, count in pairs[MAX_BARS:])
    pairs = pairs[:MAX_BARS] + ([(f"{len(pairs) - MAX_BARS} others", rest)] if rest else [])
    place.set_title(title, fontsize=11)
    if not pairs:
        _say_none(place)
        return
    names = [_label(name) for name, _ in pairs]
    bars = place.barh(range(len(pairs)), [count for _, count in pairs], color=colour, height=0.7)
    place.bar_label(bars, [f"{count:,}" for _, count in pairs], padding=3, fontsize=8)
    place.set_yticks(range(len(pairs)), names, fontsize=8)
    place.set_ylim(max(len(pairs), 4) - 0.5, -0.5)
    place.margins(x=0.18)
    place.xaxis.set_visible(False)
    place.spines[["top", "right", "bottom"]].set_visible(False)


def _label(name: str) -> str:
    """A name that the font can draw and the figure has room for; `$` would begin a formula."""
    drawable = name if is_drawable(name) and name.isprintable() else ascii(name)[1:-1]
    return (drawable if len(drawable) <= 26 else f"{drawable[:23]}...").replace("$", r"\$")


def _draw_bins(place: Axes, title: str, bins: Sequence[Sequence[int]]) -> None:
    place.set_title(title, fontsize=11)
    if not bins:
        _say_none(place)
        return
    first, step = bins[0][0], (bins[1][0] - bins[0][0] if len(bins) > 1 else 1)
    place.bar([low for low, _, _ in bins], [count for _, _, count in bins], width=step, align="edge", color=_BLUE)
    if len(bins) < 6:
        place.set_xlim(first - 5 * step, bins[-1][0] + 6 * step)
    last_width = bins[-1][1] - bins[-1][0] + 1
    if last_width > step:
        place.set_xlabel(f"the last bar goes on to {bins[-1][1]:,}", fontsize=8)
    place.locator_params(axis="x", nbins=6, integer=True)
    place.locator_params(axis="y", nbins=4, integer=True)
    place.tick_params(labelsize=8)
    place.spines[["top", "right"]].set_visible(False)


def _say_none(place: Axes) -> None:
    place.text(0.5, 0.5, "none", ha="center", va="center", color="#656d76", transform=place.transAxes)
    place.set_axis_off()


# ---- the page -------------------------------------------------------------------------------------------------------


def _page(found: Mapping[str, Any], text: str, shown: Sequence[Shown], histograms: bytes) -> str:
    parts = [
        Html(f"<pre>{escape(text)}</pre>"),
        heading("Counts"),
        wide_picture(histograms, "histograms"),
    ]
    for kind, groups in found["duplicate_groups"].items():
        rows = [
            (group["count"], "; ".join(f"{place['shard']} {place['key']}" for place in group["first"]))
            for group in groups
        ]
        parts += _titled(f"Duplicate {kind}", ("times", "where first"), rows)
    odd = [(place["shard"], place["convention"]) for place in found["conventions"]["odd_shards"]]
    majority = found["conventions"]["majority"]
    parts += _titled(f"Shards that aren't {majority}", ("shard", "convention"), odd)
    columns = ("shard", "key", "reason_code", "reason")
    bad = [tuple(row[name] for name in columns) for row in found["quarantined"][:MAX_ROWS_SHOWN]]
    title = f"Quarantined: {found['quarantined_total']:,}"
    more = f", of which the first {len(bad)}; more in inspect.json" if found["quarantined_total"] > len(bad) else ""
    parts += _titled(title + more, columns, bad)
    for task in TASKS:
        of_task = [_card(sample) for sample in shown if sample.task == task]
        if of_task:
            parts += [heading(f"Samples: {task}"), cards(of_task)]
    return page("nexusgen inspect", parts)


def _titled(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[Html]:
    """A table below its title; neither without rows."""
    return [heading(title), table(header, rows)] if rows else []


def _card(sample: Shown) -> Html:
    hidden = sample.num_images - len(sample.pictures)
    lines = [text_line(f"{hidden} more images", "role")] if hidden else []
    lines.append(text_line(f"{sample.shard.rpartition('/')[2]} {sample.key}", "key"))
    lines += [text_line(message.content, label=message.role) for message in sample.messages]
    return card([picture(shown) for shown in sample.pictures], lines)
