"""Reports of evaluations in a real browser: they fit, load nothing, and tell what the rows say."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from page_browser import chromium
from PIL import Image
from playwright.sync_api import Browser, Page
from tiny_training import make_embedded, make_tiny_model, write_shard

from nexusgen.model.weights import load_model
from nexusgen.statistics import Interval, mean_interval, mean_of_groups_interval
from pipelines.evaluation_report import NUM_FIRST, NUM_RANKED, report_page, shown_number
from pipelines.evaluation_samples import StoredSamples
from pipelines.html_page import SHOWN_PX, Html
from pipelines.plots import Curve, draw_curves, draw_histogram, draw_scores
from pipelines.suite_demo_world import DemoWorldSuite
from pipelines.suite_embedding_prediction import EmbeddingPredictionSuite
from pipelines.suite_held_out import HeldOutSuite
from pipelines.suite_reconstruction import ReconstructionSuite
from pipelines.suites import EvaluationSuite
from pipelines.unit_rows import UnitRows

SUITES = ("demo_world", "reconstruction", "embedding_prediction", "held_out")
SIZES = (1280, 390)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's evaluations: of each suite a folder with rows and report, as the job leaves them (no Ray here)."""
    place = tmp_path_factory.mktemp("evaluated")
    model = load_model(make_tiny_model(place / "model"))
    make_embedded(str(place), "held-out", model.folder, num_samples=30, shard=str(place / "shard.tar"))
    write_shard(place / "shard.tar", str(place), "held-out")
    samples = StoredSamples(storage=str(place), data="held-out", data_digest="", max_samples=30)
    drawn: dict[str, Any] = {"seed": 0, "steps": 2, "num_pictures": 6, "batch_size": 8}
    suites: tuple[EvaluationSuite, ...] = (
        DemoWorldSuite(per_category=3, num_explicit=4, num_questions=4, num_edits=7, **drawn),
        ReconstructionSuite(samples=samples, decoders=("generation",), **drawn),
        EmbeddingPredictionSuite(samples=samples, **drawn),
        HeldOutSuite(samples=samples, num_targets=4, **drawn),
    )
    for suite in suites:
        work = suite.worker(model)
        rows = [
            {"kind": unit.kind, "index": unit.first + number, **row}
            for unit in suite.units()
            for number, row in enumerate(work(unit))
        ]
        UnitRows.of(suite, str(place / suite.name)).write_all(rows)
        result = suite.summarise(rows)
        intervals = {name: mean_of_groups_interval(groups).to_json() for name, groups in suite.measures(rows).items()}
        content = {
            "fingerprint": model.manifest.fingerprint, "suite": suite.path, "settings": suite.settings,
            "scores": result.scores, "intervals": intervals, "run_id": "none",
        }  # fmt: skip
        (place / suite.name / "report.html").write_text(report_page(content, rows, result.plots), "utf-8")
    return place


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


def opened(browser: Browser, file: Path, width: int, scheme: Any = "light") -> tuple[Page, list[str]]:
    """A page of a file, and the addresses that it asked for."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    return page, asked


def check_fits(page: Page, width: int) -> None:
    """Nothing sticks out of the page, nor out of its own box, and no text of a plot is cut off."""
    assert page.evaluate("document.documentElement.scrollWidth") == width
    sticking_out = page.evaluate(
        """width => [...document.body.querySelectorAll('*')].filter(e => {
            const box = e.getBoundingClientRect();
            return box.right > width + 0.5 || box.left < -0.5 || (!e.closest('svg') && e.scrollWidth > e.clientWidth + 1
                && getComputedStyle(e).display !== 'inline');
        }).map(e => e.outerHTML.slice(0, 120))""",
        width,
    )
    assert sticking_out == []
    cut_off = page.evaluate(
        """() => [...document.querySelectorAll('svg text')].filter(e => {
            const text = e.getBoundingClientRect(), drawing = e.ownerSVGElement.getBoundingClientRect();
            return text.right > drawing.right + 1 || text.left < drawing.left - 1 || text.bottom > drawing.bottom + 1;
        }).map(e => e.textContent)"""
    )
    assert cut_off == []


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("suite", SUITES)
def test_a_report_fits_and_loads_its_pictures(evaluated: Path, browser: Browser, suite: str, width: int) -> None:
    file = evaluated / suite / "report.html"
    page, asked = opened(browser, file, width, "dark" if width == SIZES[1] else "light")
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert page.evaluate("document.images.length") > 10
    assert page.evaluate("[...document.images].filter(image => !image.complete || !image.naturalWidth).length") == 0
    assert page.evaluate("document.scripts.length") == 0
    check_fits(page, width)
    page.context.close()


@pytest.mark.parametrize("suite", SUITES)
def test_its_numbers_are_those_of_the_rows(evaluated: Path, browser: Browser, suite: str) -> None:
    folder = evaluated / suite
    page, _ = opened(browser, folder / "report.html", 1280)
    cells = page.evaluate(
        "[...document.querySelector('table').rows].slice(1).map(r => [...r.cells].map(c => c.innerText))"
    )
    shown = {name: (value, bounds, count) for name, value, bounds, count in cells}
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    for name, groups in recomputed(suite, rows).items():
        interval = mean_of_groups_interval(groups)
        expected = f"{shown_number(interval.low)} to {shown_number(interval.high)}"
        assert shown.pop(name) == (shown_number(interval.value), expected, str(interval.n)), name
    left = {name for name, (_, bounds, _) in shown.items() if bounds}
    assert all(suite == "demo_world" or name.startswith(("recall", "losses/mse_mean")) for name in left), left
    page.context.close()


def recomputed(suite: str, rows: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Scores by other means than the suite's own: of columns that are read here."""
    found: dict[str, list[list[float]]] = {}
    if suite == "demo_world":
        kinds = {"generation": "category", "explicit": None, "editing": None, "understanding": None}
        of = {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
        categories = list(dict.fromkeys(row["category"] for row in of["generation"]))
        groups = [[row["score"] for row in of["generation"] if row["category"] == one] for one in categories]
        found["generation/overall"] = groups
        found |= {f"generation/{name}": [group] for name, group in zip(categories, groups, strict=True)}
        found["generation/explicit_strict"] = [[row["score"] for row in of["explicit"]]]
        found["understanding/overall"] = [[row["score"] for row in of["understanding"]]]
        for column, name in (("score", "strict"), ("done", "done"), ("unchanged", "unchanged")):
            found[f"editing/{name}"] = [[row[column] for row in of["editing"]]]
    elif suite == "reconstruction":
        for kind in ("generation", "autoencoder", "another"):
            for metric in ("psnr", "ssim", "vision_cosine", "vision_mse"):
                found[f"{kind}/{metric}"] = [[row[metric] for row in rows if row["kind"] == kind]]
    elif suite == "embedding_prediction":
        for mode in ("teacher_forced", "free_running", "mean_embedding"):
            for error in ("mse", "cosine"):
                values = [row[f"{mode}_{error}"] for row in rows]
                tasks = {row["task"] for row in rows}
                found[f"{mode}/{error}"] = [[sum(each) / len(each) for each in values]]
                found[f"{mode}/{error}_first"] = [[each[0] for each in values]]
                found[f"{mode}/{error}_last"] = [[each[-1] for each in values]]
                for task in tasks:
                    of_task = [each for each, row in zip(values, rows, strict=True) if row["task"] == task]
                    found[f"{mode}/{error}_{task}"] = [[sum(each) / len(each) for each in of_task]]
    else:
        for loss in ("ce", "mse", "cosine_distance", "generation_flow"):
            measured = [row for row in rows if row[loss] is not None]
            found[f"losses/{loss}"] = [[row[loss] for row in measured]]
            for task in {row["task"] for row in measured}:
                found[f"losses/{loss}_{task}"] = [[row[loss] for row in measured if row["task"] == task]]
    return found


def test_best_and_worst_stand_in_order(evaluated: Path, browser: Browser) -> None:
    folder = evaluated / "reconstruction"
    rows = [row for row in pq.read_table(folder / "results.parquet").to_pylist() if row["kind"] == "generation"]
    by_score = sorted(rows, key=lambda row: -row["score"])
    page, _ = opened(browser, folder / "report.html", 1280)
    sections = page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll('.cards')].map(cards => {
            let before = cards.previousElementSibling;
            while (!/^H[23]$/.test(before.tagName)) before = before.previousElementSibling;
            return [before.innerText, [...cards.children].map(card => card.querySelector('.key').innerText)];
        }))"""
    )
    keys = {name: [text.split(" · ")[1] for text in texts] for name, texts in sections.items()}
    assert keys["Items: generation"] == [row["key"] for row in rows][:NUM_FIRST]
    count = min(NUM_RANKED, len(rows) // 2)
    assert keys["generation: the best"] == [row["key"] for row in by_score[:count]]
    assert keys["generation: the worst"] == [row["key"] for row in by_score[::-1][:count]]
    page.context.close()


HOSTILE = '</td><script>document.title="run"</script><img src="http://example.org/x.png">& "quoted" ' + "long" * 100


def hostile_rows(count: int, side: int = 8) -> list[dict[str, Any]]:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return [
        {
            "kind": HOSTILE, "index": index, "prompt": HOSTILE, "score": float(index % 2), "key": HOSTILE,
            "expected": HOSTILE, "answer": HOSTILE, "png": buffer.getvalue(), "source_png": None,
        }
        for index in range(count)
    ]  # fmt: skip


def hostile_content(**more: Any) -> dict[str, Any]:
    interval = Interval(0.5, 0.25, 0.75, 4).to_json()
    return {
        "fingerprint": HOSTILE, "suite": HOSTILE, "settings": {HOSTILE: HOSTILE}, "run_id": HOSTILE,
        "scores": {"n": 4, "group": {HOSTILE: 0.5, "plain": 0.000123}}, "intervals": {f"group/{HOSTILE}": interval},
        **more,
    }  # fmt: skip


@pytest.mark.parametrize("width", SIZES)
def test_hostile_texts_are_texts(browser: Browser, tmp_path: Path, width: int) -> None:
    plots: list[Html] = [
        draw_curves(HOSTILE[:40], HOSTILE[:40], [Curve(HOSTILE[:20], [mean_interval([0.1, 0.4])] * 9)]),
        draw_histogram(HOSTILE[:40], HOSTILE[:40], {HOSTILE[:10]: [1.0, 2.0]}),
        draw_scores(HOSTILE[:40], {HOSTILE: mean_interval([0.0, 1.0])}),
    ]
    file = tmp_path / "report.html"
    file.write_text(report_page(hostile_content(), hostile_rows(4), plots))
    page, asked = opened(browser, file, width)
    assert len([url for url in asked if not url.startswith("data:")]) == 1
    assert page.title() == f"nexusgen evaluate: {HOSTILE}"
    assert page.evaluate("document.scripts.length") == 0
    assert page.locator(".card").first.inner_text().count("<script>") == 4
    assert (
        "1.2e-04" in page.locator("table").first.inner_text() or "0.00012" in page.locator("table").first.inner_text()
    )
    check_fits(page, width)
    page.context.close()


def test_a_comparison_is_told_with_its_pictures(browser: Browser, tmp_path: Path) -> None:
    differences = {
        "group/up": Interval(0.2, 0.1, 0.3, 40).to_json(),
        "group/down": Interval(-0.2, -0.3, -0.1, 40).to_json(),
        "group/same": Interval(0.0, -0.1, 0.1, 40).to_json(),
    }
    against = {"beef": {"model": "models:/nexusgen/1", "differences": differences, "run_id": "r"}}
    sheet = Image.new("RGB", (1500, 300), "navy")
    file = tmp_path / "report.html"
    file.write_text(report_page(hostile_content(against=against), hostile_rows(2, 600), pairs={"generation": sheet}))
    page, _ = opened(browser, file, 390)
    rows = page.evaluate("[...document.querySelectorAll('table')[1].rows].slice(1).map(r => r.innerText.split('\\t'))")
    assert [[row[0], row[1], row[2], row[-1]] for row in rows] == [
        ["group/up", "+0.200", "+0.100 to +0.300", "higher"],
        ["group/down", "-0.200", "-0.300 to -0.100", "lower"],
        ["group/same", "+0.000", "-0.100 to +0.100", ""],
    ]
    assert page.evaluate("[...document.images].filter(image => image.naturalWidth === 1500).length") == 1
    assert (
        page.evaluate("Math.max(...[...document.querySelectorAll('.card img')].map(i => i.naturalWidth))") == SHOWN_PX
    )
    check_fits(page, 390)
    page.context.close()


def test_what_has_no_pictures_and_no_scores_is_told_in_words() -> None:
    rows = [{"kind": "answered", "index": 0, "prompt": "what is it?", "score": None, "png": None}]
    page = report_page(hostile_content(scores={"n": 1}, intervals={}), rows)
    assert "what is it?" in page
    assert "<img" not in page
    assert "the best" not in page
