"""The report of an evaluation: one HTML page for each suite, with nothing beside it, that opens offline.

It shows what the suite's file of scores holds, each score with its interval and n, plots, and pictures with prompt and
score: the first ones, unpicked, then the best and the worst. It is made of the scores and rows alone, so that it can
be made again from what an evaluation left.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from nexusgen.statistics import Interval
from pipelines import html_page
from pipelines.html_page import Html, heading, note
from pipelines.plots import draw_scores
from pipelines.suites import Row

REPORT_NAME = "report.html"
NUM_FIRST, NUM_RANKED = 24, 12  # of each kind of items
MAX_BARS = 16  # in one plot
_CAPTIONS = {
    "source_png": "given",
    "target_png": "wanted",
    "reconstruction_png": "its own embedding, decoded",
    "teacher_forced_png": "teacher-forced",
    "png": "made",
}
_ASKED_ABOUT = "understanding"  # the kind whose picture isn't made by the model
_NOT_MEASURED = ("kind", "index", "seed", "score", "num_tokens")


def report_page(
    content: Mapping[str, Any],
    rows: Sequence[Row],
    plots: Sequence[Html] = (),
    pairs: Mapping[str, Image.Image] | None = None,
) -> str:
    """The whole page. `content` is that of the suite's file of scores, `pairs` are sheets of two models' pictures."""
    scores = dict(flatten(content["scores"]))
    intervals = {name: Interval(**found) for name, found in content.get("intervals", {}).items()}
    parts = [
        note(f"Model {content['fingerprint']}, {len(rows):,} items, MLflow run {content['run_id']}."),
        *(
            note(f"Judged by {one['model']} ({one['system_fingerprint'] or 'which says no more'}): {one['answers']:,}.")
            for one in content.get("judges", [])
        ),
        heading("Scores"),
        note("Each with its 95 % confidence interval, and n, the number of items that it is the mean of."),
        html_page.table(
            ("score", "value", "95 % interval", "n"),
            [
                (name, _count_or_number(value, intervals.get(name)), *_bounds(intervals.get(name)))
                for name, value in scores.items()
                if name != "n"
            ],
            numbers=(1, 2, 3),
        ),
        *_comparisons(content),
        *_pairs(pairs or {}),
        heading("Plots") if plots or intervals else Html(""),
        html_page.plots([*plots, *_bars(intervals)]),
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        parts += _pictures(kind, [row for row in rows if row["kind"] == kind])
    parts += [
        heading("Settings"),
        html_page.table(
            ("setting", "value"), [(name, json.dumps(value)) for name, value in content["settings"].items()]
        ),
    ]
    return html_page.page(f"nexusgen evaluate: {content['suite']}", parts)


def flatten(scores: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Nested scores by flat names, like `generation/overall`."""
    for name, value in scores.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", float(value)


def shown_number(value: float, sign: str = "") -> str:
    """A number as the tables have it: three decimals, or two digits of a small one."""
    if value and abs(value) < 0.01:
        return f"{value:{sign}.2g}"
    return f"{value:{sign}.3f}"


def _count_or_number(value: float, interval: Interval | None) -> str:
    return f"{value:,.0f}" if interval is None and value == int(value) else shown_number(value)


def _bounds(interval: Interval | None, sign: str = "") -> tuple[str, str]:
    """Interval and n as cells."""
    if interval is None:
        return "", ""
    return f"{shown_number(interval.low, sign)} to {shown_number(interval.high, sign)}", f"{interval.n:,}"


def _comparisons(content: Mapping[str, Any]) -> list[Html]:
    """A table of paired differences for each model that this one was compared with."""
    parts = []
    for fingerprint, found in content.get("against", {}).items():
        differences = {name: Interval(**values) for name, values in found["differences"].items()}
        rows = []
        for name, difference in differences.items():
            verdict = "higher" if difference.low > 0 else "lower" if difference.high < 0 else ""
            rows.append((name, shown_number(difference.value, "+"), *_bounds(difference, "+"), verdict))
        parts += [
            heading(f"Against {found['model']}"),
            note(
                f"This model's scores less those of {fingerprint}, item by item. The last column says where they "
                "differ beyond chance; of losses and errors lower is better."
            ),
            html_page.table(("score", "difference", "95 % interval", "n", "differs"), rows, numbers=(1, 2, 3)),
        ]
    return parts


def _pairs(sheets: Mapping[str, Image.Image]) -> list[Html]:
    parts = []
    for kind, sheet in sheets.items():
        parts += [heading(f"Side by side: {kind}"), html_page.wide_picture(sheet, f"pictures of both models: {kind}")]
    return parts


def _bars(intervals: Mapping[str, Interval]) -> list[Html]:
    """A plot for each group of scores that all lie from 0 to 1."""
    groups: dict[str, dict[str, Interval]] = {}
    for name, interval in intervals.items():
        group, _, last = name.rpartition("/")
        groups.setdefault(group, {})[last] = interval
    drawn = []
    for group, found in groups.items():
        if all(min(one.low, one.value) >= 0 and max(one.high, one.value) <= 1 for one in found.values()):
            names = list(found)
            for first in range(0, len(names), MAX_BARS):
                chosen = {name: found[name] for name in names[first : first + MAX_BARS]}
                drawn.append(draw_scores(group or "scores", chosen))
    return drawn


def _pictures(kind: str, rows: Sequence[Row]) -> list[Html]:
    """The first items, unpicked, and by their score the best and the worst; with pictures, if there are any."""
    shown = [row for row in rows if any(row.get(name) for name in _CAPTIONS)] or list(rows)
    parts = [
        heading(f"Items: {kind}"),
        note(f"The first {min(NUM_FIRST, len(shown))} of {len(rows):,}, unpicked."),
        html_page.cards([_card(row) for row in shown[:NUM_FIRST]]),
    ]
    scored = [row for row in shown if row.get("score") is not None]
    if len({row["score"] for row in scored}) > 1:
        by_score = sorted(scored, key=lambda row: row["score"], reverse=True)  # stable: equal ones in their order
        of = f"of {len(scored):,}" if len(scored) == len(rows) else f"of the {len(scored):,} with pictures"
        worst = sorted(scored, key=lambda row: row["score"])[: min(NUM_RANKED, len(scored) // 2)]
        best = by_score[: min(NUM_RANKED, len(scored) // 2)]
        for title, chosen in (("best", best), ("worst", worst)):
            low, high = min(row["score"] for row in chosen), max(row["score"] for row in chosen)
            span = shown_number(low) if low == high else f"{shown_number(low)} to {shown_number(high)}"
            parts += [
                heading(f"{kind}: the {title}", 3),
                note(f"{len(chosen)} {of}, score {span}."),
                html_page.cards([_card(row) for row in chosen]),
            ]
    return parts


def _card(row: Row) -> Html:
    pictures = []
    for name, caption in _CAPTIONS.items():
        if row.get(name):
            told = "asked about" if name == "png" and row["kind"] == _ASKED_ABOUT else caption
            pictures.append(html_page.picture(row[name], told))
    score = row.get("score")
    lines = [html_page.text_line(row["prompt"])]
    measured = [] if score is None else [f"score {score:.3g}"]
    measured += [
        f"{name} {value:.3g}"
        for name, value in row.items()
        if isinstance(value, float) and name not in _NOT_MEASURED and value != score
    ]
    if measured:
        lines.append(html_page.text_line(", ".join(measured), "score"))
    lines += [html_page.text_line(str(row[name]), label=name) for name in ("expected", "answer") if row.get(name)]
    whose = [str(row["index"]), *(str(row[name]) for name in ("key", "category", "task", "lang") if row.get(name))]
    if row.get("seed") is not None:
        whose.append(f"seed {row['seed']}")
    lines.append(html_page.text_line(" · ".join(whose), "key"))
    is_graded = score not in (0, 1) or bool(row.get("judge_model"))  # a judge's 1 may be the lowest of its scale
    return html_page.card(pictures, lines, None if is_graded else score == 1)
