"""Remake the page's screenshots, in `pipelines/page/screenshots/`:

python tests/pipelines/page_screenshots.py --url http://127.0.0.1:8000     of a server that runs
python tests/pipelines/page_screenshots.py                                 of the tests' own, which paints
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from page_browser import chromium  # noqa: E402
from page_door import PaintBackend, served  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import Browser, Page, expect  # noqa: E402

from pipelines.api import create_app  # noqa: E402

DESKTOP = {"viewport": {"width": 1200, "height": 900}}
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
ANSWER_MS = 120_000
NUM_COLOURS = 256  # of the files; a screenshot has few, and each weighs a third of what it would


def main() -> None:
    """Take the three pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="address of a running server; without it, one with painted pictures is started")
    parser.add_argument("--out", type=Path, default=ROOT / "pipelines" / "page" / "screenshots")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        url = arguments.url or stack.enter_context(served(create_app(PaintBackend())))
        browser = stack.enter_context(chromium())
        _save(_generated(browser, url, {**DESKTOP, "color_scheme": "light"}), arguments.out / "desktop.png")
        _save(_chatted(browser, url, {**DESKTOP, "color_scheme": "dark"}), arguments.out / "dark.png")
        _save(_edited(browser, url, {**PHONE, "color_scheme": "light"}), arguments.out / "phone.png")


def _generated(browser: Browser, url: str, options: dict[str, Any]) -> bytes:
    page = _open(browser, url, options)
    _go(page, "Generate")
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_label("Pictures", exact=True).fill("3")
    _ask(page, "a circle and a cross")
    return page.screenshot()


def _chatted(browser: Browser, url: str, options: dict[str, Any]) -> bytes:
    page = _open(browser, url, options)
    page.get_by_label("Seed", exact=True).fill("7")
    _choose(page, "image")
    _ask(page, "three squares")
    page.locator(".picture .discuss").click()
    _choose(page, "text,image")
    page.get_by_role("button", name="Settings", exact=True).click()
    _ask(page, "How many things are there?")
    return page.screenshot()


def _choose(page: Page, answer: str) -> None:
    page.get_by_role("combobox", name="Answer").select_option(answer)


def _edited(browser: Browser, url: str, options: dict[str, Any]) -> bytes:
    page = _open(browser, url, options)
    page.get_by_role("button", name="Settings", exact=True).tap()
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_role("button", name="Settings", exact=True).tap()
    _go(page, "Generate")
    _ask(page, "a circle and a cross")
    page.locator(".feed:visible .picture .edit").last.tap()
    _ask(page, "Make the cross green.")
    return page.screenshot()


def _open(browser: Browser, url: str, options: dict[str, Any]) -> Page:
    page = browser.new_context(**options).new_page()
    page.goto(url)
    expect(page.locator("#model")).to_contain_text(re.compile("version|model"))
    return page


def _go(page: Page, mode: str) -> None:
    page.get_by_role("radio", name=mode).check(force=True)


def _ask(page: Page, prompt: str) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Prompt").press("Enter")
    expect(page.locator(".feed:visible .entry").last).to_have_attribute("data-state", "done", timeout=ANSWER_MS)


def _save(png: bytes, path: Path) -> None:
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(NUM_COLOURS).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
