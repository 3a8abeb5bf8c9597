"""The page in a real Chromium, against a real HTTP server: what a user does, sees, and doesn't send elsewhere."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("playwright") is None:
    pytest.skip("playwright isn't installed: pip install -c constraints.txt -e '.[dev]'", allow_module_level=True)

from page_browser import chromium
from page_door import INFO, PaintBackend, painted, served
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

from nexusgen.schema import Message
from pipelines import orders
from pipelines.api import create_app
from pipelines.api_settings import PAGE_FOLDER, ApiSettings

KEY = "a-key-of-the-test"
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
WAIT_MS = 30_000  # until something counts as missing, on a machine that is busy
# Run before the page's own script: whatever the policy forbids is written down.
NOTE_VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""


@dataclass
class Visit:
    """A page under test, its server's backend, and what the browser complained of or asked for meanwhile."""

    page: Page
    backend: PaintBackend
    url: str
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    expected: re.Pattern[str] | None = None  # complaints that the test provokes
    asked: str = ""  # since the mode was chosen

    def go(self, mode: str) -> None:
        self.asked = ""
        self.page.get_by_role("radio", name=mode).check(force=True)

    def ask(self, prompt: str) -> None:
        self.asked = prompt
        self.page.get_by_label("Prompt").fill(prompt)
        self.page.get_by_label("Prompt").press("Enter")

    def set(self, **settings: Any) -> None:
        for name, value in settings.items():
            self.page.get_by_label(name.capitalize(), exact=True).fill(str(value))

    @property
    def entry(self) -> Locator:
        """The last entry of the mode that is shown; of what was just asked, even if the page hasn't added it yet."""
        return self.page.locator(".feed:visible .entry").filter(has_text=self.asked).last

    def wait_for(self, state: str) -> None:
        expect(self.entry).to_have_attribute("data-state", state)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=WAIT_MS)
    with chromium() as browser:
        yield browser


Open = Callable[..., Visit]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens the page on a server of its own; afterwards nobody may have complained or asked another host."""
    visits: list[Visit] = []
    with ExitStack() as stack:

        def open_page(keys: tuple[str, ...] = (), models: Sequence[str] = ("nexusgen",), **options: Any) -> Visit:
            backend = PaintBackend(models)
            url = stack.enter_context(served(create_app(backend, ApiSettings(api_keys=keys))))
            context: BrowserContext = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
            stack.callback(context.close)
            context.set_default_timeout(WAIT_MS)
            context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
            context.add_init_script(NOTE_VIOLATIONS)
            visit = Visit(context.new_page(), backend, url)
            visits.append(visit)
            visit.page.on("console", lambda message: _note(visit, message.type, message.text))
            visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
            visit.page.on("request", lambda request: visit.requests.append(request.url))
            visit.page.goto(url)
            return visit

        yield open_page
        for visit in visits:
            assert [c for c in visit.complaints if not (visit.expected and visit.expected.search(c))] == []
            assert visit.page.evaluate("window.violations") == []
            local = (visit.url, "data:", "blob:")
            assert [request for request in visit.requests if not request.startswith(local)] == []


def _note(visit: Visit, kind: str, text: str) -> None:
    if kind in ("error", "warning"):
        visit.complaints.append(text)


@pytest.fixture
def visit(open_page: Open) -> Visit:
    return open_page()


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture file of a user's."""
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.new("RGB", (64, 48), (200, 30, 40)).save(path)
    return path


def shown(picture: Locator) -> Image.Image:
    """What an <img> really shows, pixel by pixel, at its natural size."""
    expect(picture).to_have_js_property("complete", True)
    script = """async (image) => {
        await image.decode();
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        canvas.getContext("2d").drawImage(image, 0, 0);
        return canvas.toDataURL("image/png");
    }"""
    data = picture.evaluate(script).partition(",")[2]
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def expected_picture(seed: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    return painted(orders.PictureSettings(seed=seed, size=size))


def words(message: Message) -> str:
    """A message's words and marks, whatever space the door puts between them."""
    return " ".join(message.content.replace("<image>", " <image> ").split())


def drop_file(page: Page, path: Path, media_type: str = "image/png", name: str = "dropped.png") -> None:
    """Drag a file over the page and let go of it."""
    data = base64.b64encode(path.read_bytes()).decode()
    transfer = page.evaluate_handle(
        """([data, type, name]) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type }));
            return transfer;
        }""",
        [data, media_type, name],
    )
    page.dispatch_event("main", "dragover", {"dataTransfer": transfer})
    expect(page.get_by_text("Drop pictures here")).to_be_visible()
    page.dispatch_event("main", "drop", {"dataTransfer": transfer})
    expect(page.get_by_text("Drop pictures here")).to_be_hidden()


def test_page_and_its_files_carry_the_policy_and_nothing_else_is_sent(open_page: Open) -> None:
    visit = open_page()
    for path in ("/", "/page/page.js", "/page/page.css", "/page/icon.svg"):
        with urllib.request.urlopen(visit.url + path, timeout=10) as response:
            policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
            assert {policy[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
            assert {policy[name] for name in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}
            assert policy["default-src"] in ("'self'", "'none'")
            assert policy["img-src"] == "'self' data: blob:"
            assert response.headers["x-content-type-options"] == "nosniff"
    for path in ("/page/screenshots", "/page/..%2forders.py", "/page/index.html.bak"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(visit.url + path, timeout=10)


def test_policy_stops_what_a_script_that_got_in_would_do(open_page: Open) -> None:
    visit = open_page()
    visit.expected = re.compile("Content.Security.Policy|violates the following", re.IGNORECASE)
    visit.page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.gotIn = true";
            const image = new Image();
            image.src = "http://elsewhere.invalid/leak.png";
            document.body.append(script, image);
        }"""
    )
    blocked = visit.page.evaluate("new Promise((resolve) => setTimeout(() => resolve(window.violations), 300))")
    assert {directive.split("-")[0] for directive in blocked} == {"script", "img"}
    assert visit.page.evaluate("window.gotIn") is None
    visit.page.evaluate("window.violations = []")
    visit.requests = [request for request in visit.requests if "elsewhere" not in request]


def test_files_hold_nothing_inline_and_name_no_other_host() -> None:
    html = (PAGE_FOLDER / "index.html").read_text()
    assert not re.search(r"<style|\son\w+=|\sstyle=|javascript:", html)
    assert re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL) == [""]
    for name in ("index.html", "page.css", "page.js"):
        assert not re.search(r"(https?:)?//\w+[.:]\w", (PAGE_FOLDER / name).read_text()), name


def test_model_and_version_are_shown(visit: Visit) -> None:
    expect(visit.page.get_by_role("combobox", name="Model")).to_be_hidden()  # there is but one
    expect(visit.page.locator("#model")).to_have_text("version 3")
    expect(visit.page.locator("#model")).to_have_attribute("title", f"fingerprint {INFO.fingerprint}")


def test_one_of_several_models_is_chosen(open_page: Open) -> None:
    visit = open_page(models=("nexusgen", "nexusgen-sketch"))
    visit.page.get_by_role("combobox", name="Model").select_option("nexusgen-sketch")
    visit.ask("hello")
    visit.wait_for("done")
    visit.go("Generate")
    visit.ask("a circle")
    visit.wait_for("done")
    assert [order.model for order in visit.backend.orders] == ["nexusgen-sketch"] * 2


def test_pictures_are_generated_from_the_settings_one_seed_each(visit: Visit) -> None:
    visit.go("Generate")
    visit.set(seed=7, pictures=3, steps=5, width=128, height=64, guidance=2.5)
    visit.ask("a circle and a square")
    visit.wait_for("done")
    pictures = visit.entry.locator(".picture")
    expect(pictures).to_have_count(3)
    for index in range(3):
        expect(pictures.nth(index).locator("figcaption")).to_contain_text(
            f"version 3 · seed {7 + index} · 5 steps · 128 × 64 · guidance 2.5"
        )
        assert shown(pictures.nth(index).locator("img")) == expected_picture(7 + index, (64, 128))
    expected = [orders.PictureSettings(7 + index, 5, (64, 128), 2.5) for index in range(3)]
    assert sorted((order.settings for order in visit.backend.orders), key=lambda s: s.seed) == expected
    assert {order.prompt for order in visit.backend.orders} == {"a circle and a square"}
    expect(visit.page.get_by_role("status")).to_have_text("3 pictures are done.")


def test_settings_left_open_are_not_sent_and_the_seed_is_shown(visit: Visit) -> None:
    visit.go("Generate")
    visit.ask("a circle")
    visit.wait_for("done")
    (order,) = visit.backend.orders
    assert (order.settings.steps, order.settings.size, order.settings.guidance) == (None, None, None)
    expect(visit.entry.locator("figcaption")).to_contain_text(f"seed {order.settings.seed} · 8 steps · 96 × 96")


def test_partial_pictures_are_shown_on_the_way(visit: Visit) -> None:
    visit.go("Generate")
    visit.set(seed=1)
    visit.ask("held picture")
    frame = visit.entry.locator(".frame")
    expect(frame).to_have_attribute("data-state", "preview")
    expect(frame.locator("img")).to_have_attribute("src", re.compile("^data:image/png"))
    expect(frame.locator(".progress")).to_have_text("preview 1")
    visit.backend.release.set()
    expect(frame).to_have_attribute("data-state", "done")
    assert shown(frame.locator("img")) == expected_picture(1)


def test_chat_streams_text_and_remembers_the_conversation(visit: Visit) -> None:
    visit.ask("held hello there")
    text = visit.entry.locator(".text")
    expect(text).to_have_text("You")  # text shows before the answer is whole
    assert visit.entry.get_attribute("data-state") == "running"
    visit.backend.release.set()
    visit.wait_for("done")
    expect(text).to_have_text("You said: held hello there I saw 0 pictures.")
    visit.ask("and more")
    visit.wait_for("done")
    roles = [(message.role, message.content.strip()) for message in visit.backend.orders[-1].messages]
    assert roles == [
        ("user", "held hello there"),
        ("assistant", "You said: held hello there I saw 0 pictures."),
        ("user", "and more"),
    ]


def test_chat_takes_and_gives_pictures(visit: Visit, photo: Path) -> None:
    visit.page.locator("#files").set_input_files([photo, photo])
    visit.set(seed=3)
    visit.ask("Draw these in one picture")
    visit.wait_for("done")
    expect(visit.entry.locator(".text")).to_contain_text("I saw 2 pictures.")
    expect(visit.entry.locator(".inputs img")).to_have_count(2)
    expect(visit.entry.locator(".picture figcaption")).to_contain_text("version 3 · seed 3")
    assert shown(visit.entry.locator(".picture img")) == expected_picture(3)
    (order,) = visit.backend.orders
    assert order.images == (photo.read_bytes(),) * 2
    assert (order.modality, words(order.messages[0])) == ("auto", "<image> <image> Draw these in one picture")
    visit.ask("What was it?")  # what was attached went along once, and stays part of the conversation
    visit.wait_for("done")
    assert words(visit.backend.orders[-1].messages[0]) == "<image> <image> Draw these in one picture"
    assert visit.backend.orders[-1].messages[1].content.endswith("<image>")  # the model drew something here
    assert visit.backend.orders[-1].messages[-1].content == "What was it?"


@pytest.mark.parametrize(("answer", "modality"), [("text only", "text"), ("a picture", "image")])
def test_chat_can_ask_for_text_or_for_a_picture(visit: Visit, answer: str, modality: str) -> None:
    visit.page.get_by_role("combobox", name="Answer").select_option(answer)
    visit.set(steps=4)
    visit.ask("draw something")
    visit.wait_for("done")
    (order,) = visit.backend.orders
    assert (order.modality, order.picture.steps) == (modality, 4 if modality == "image" else None)
    expect(visit.entry.locator(".picture")).to_have_count(int(modality == "image"))
    expect(visit.entry.locator(".text")).to_be_visible(visible=modality == "text")


def test_edit_takes_several_pictures_and_its_result_can_be_edited_again(visit: Visit, photo: Path) -> None:
    visit.go("Edit")
    visit.ask("invert it")
    expect(visit.page.get_by_role("alert")).to_contain_text("Add the picture to edit first")
    assert visit.backend.orders == []
    visit.page.locator("#files").set_input_files([photo, photo])
    visit.set(seed=4)
    visit.ask("invert it")
    visit.wait_for("done")
    (order,) = visit.backend.orders
    assert (order.images, order.settings.seed) == ((photo.read_bytes(),) * 2, 4)
    assert shown(visit.entry.locator(".picture img")).getpixel((0, 0)) == (55, 225, 215)
    visit.entry.get_by_role("button", name="Edit this").click()
    expect(visit.page.locator("#attachments li")).to_have_count(1)
    visit.ask("and back")
    visit.wait_for("done")
    assert shown(visit.entry.locator(".picture img")).getpixel((0, 0)) == (200, 30, 40)


def test_a_drawn_picture_goes_into_the_chat(visit: Visit) -> None:
    visit.go("Generate")
    visit.set(seed=2)
    visit.ask("a circle")
    visit.wait_for("done")
    visit.entry.get_by_role("button", name="Ask").click()
    expect(visit.page.get_by_role("radio", name="Chat")).to_be_checked()
    visit.ask("What is this?")
    visit.wait_for("done")
    (image,) = visit.backend.orders[-1].images
    assert Image.open(io.BytesIO(image)).tobytes() == expected_picture(2).tobytes()


def test_stop_ends_the_answer_and_the_work_behind_it(visit: Visit) -> None:
    for number, stop in enumerate(("button", "Escape"), start=1):
        visit.ask("held")
        expect(visit.entry.locator(".text")).to_have_text("You")
        if stop == "button":
            visit.page.get_by_role("button", name="Stop").click()
        else:
            visit.page.keyboard.press("Escape")
        visit.wait_for("stopped")
        expect(visit.page.get_by_role("status")).to_have_text("Stopped.")
        expect(visit.page.get_by_role("button", name="Send")).to_be_visible()
        expect(visit.page.get_by_label("Prompt")).to_be_focused()
        deadline = time.monotonic() + WAIT_MS / 1000
        while visit.backend.num_closed < number:
            assert time.monotonic() < deadline, "the server goes on"
            time.sleep(0.05)


def test_stop_ends_every_picture_of_a_request(visit: Visit) -> None:
    visit.go("Generate")
    visit.set(pictures=2)
    visit.ask("held circles")
    expect(visit.entry.locator(".frame[data-state=preview]")).to_have_count(2)
    visit.page.get_by_role("button", name="Stop").click()
    visit.wait_for("stopped")
    expect(visit.entry.locator(".frame[data-state=stopped]")).to_have_count(2)
    deadline = time.monotonic() + WAIT_MS / 1000
    while visit.backend.num_closed < 2:
        assert time.monotonic() < deadline, "the server goes on"
        time.sleep(0.05)


def test_dropped_pictures_are_attached_and_other_files_refused(visit: Visit, photo: Path) -> None:
    visit.go("Generate")
    drop_file(visit.page, photo)
    expect(visit.page.get_by_role("radio", name="Edit")).to_be_checked()  # a picture can't go into a new one
    attached = visit.page.locator("#attachments li")
    expect(attached).to_have_count(1)
    assert shown(attached.locator("img")).size == (64, 48)
    drop_file(visit.page, photo, "application/pdf", "paper.pdf")
    expect(visit.page.get_by_role("alert")).to_have_text("paper.pdf: not a picture, so left out.")
    expect(attached).to_have_count(1)
    visit.page.get_by_role("button", name="Remove dropped.png").click()
    expect(attached).to_have_count(0)


def test_pasted_picture_is_attached(visit: Visit, photo: Path) -> None:
    data = base64.b64encode(photo.read_bytes()).decode()
    visit.page.evaluate(
        """async (data) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const item = new ClipboardItem({ "image/png": new Blob([bytes], { type: "image/png" }) });
            await navigator.clipboard.write([item]);
        }""",
        data,
    )
    visit.page.get_by_label("Prompt").press("Control+v")
    expect(visit.page.locator("#attachments li")).to_have_count(1)
    visit.ask("What is it?")
    visit.wait_for("done")
    (image,) = visit.backend.orders[0].images
    assert Image.open(io.BytesIO(image)).getpixel((0, 0))[:3] == (200, 30, 40)


def test_big_picture_is_sent_with_a_warning(visit: Visit, tmp_path: Path) -> None:
    path = tmp_path / "big.bmp"
    Image.new("RGB", (2700, 2700), "white").save(path)
    assert path.stat().st_size > 20 * 2**20
    visit.page.locator("#files").set_input_files(path)
    expect(visit.page.get_by_role("alert")).to_contain_text("big.bmp: above 20 MiB")
    expect(visit.page.locator("#attachments li")).to_have_count(1)
    visit.expected = re.compile("413|ERR_")  # a server may refuse it, and that is shown like any refusal
    with visit.page.expect_request("**/v1/chat/completions") as request:
        visit.ask("What is it?")
    expect(visit.entry).to_have_attribute("data-state", re.compile("done|failed"))
    assert len(request.value.post_data_buffer or b"") > path.stat().st_size


def test_history_outlives_a_reload_and_is_cleared_mode_by_mode(visit: Visit, photo: Path) -> None:
    visit.page.locator("#files").set_input_files(photo)
    visit.ask("draw a house")
    visit.wait_for("done")
    visit.go("Generate")
    visit.set(seed=9)
    visit.ask("a circle")
    visit.wait_for("done")
    visit.page.reload()
    expect(visit.page.get_by_role("radio", name="Generate")).to_be_checked()
    expect(visit.page.get_by_label("Seed", exact=True)).to_have_value("9")
    assert shown(visit.entry.locator(".picture img")) == expected_picture(9)
    expect(visit.entry.locator("figcaption")).to_contain_text("version 3 · seed 9")
    visit.go("Chat")
    expect(visit.entry.locator(".text")).to_contain_text("I saw 1 pictures.")
    assert shown(visit.entry.locator(".inputs img")).size == (64, 48)
    visit.ask("and now?")  # the conversation goes on, with its picture
    visit.wait_for("done")
    assert visit.backend.orders[-1].images == (photo.read_bytes(),)

    visit.page.get_by_role("button", name="Clear").click()
    visit.page.get_by_role("button", name="Keep").click()
    expect(visit.page.locator("#feed-chat .entry")).to_have_count(2)
    visit.page.get_by_role("button", name="Clear").click()
    visit.page.get_by_role("dialog").get_by_role("button", name="Clear").click()
    expect(visit.page.get_by_role("heading", name="Talk about pictures, and ask for some")).to_be_visible()
    visit.page.reload()
    expect(visit.page.locator("#feed-chat .entry")).to_have_count(0)
    expect(visit.page.locator("#feed-generate .entry")).to_have_count(1)
    num_kept = visit.page.evaluate(
        """() => new Promise((resolve) => {
            indexedDB.open("nexusgen", 1).onsuccess = ({ target }) => {
                const store = target.result.transaction("pictures").objectStore("pictures");
                store.count().onsuccess = ({ target }) => resolve(target.result);
            };
        })"""
    )
    assert num_kept == 1  # of the pictures, too, only that of the other mode is left


def test_download_is_the_servers_png_named_by_its_seed(visit: Visit) -> None:
    visit.go("Generate")
    visit.set(seed=11)
    visit.ask("a circle")
    visit.wait_for("done")
    with visit.page.expect_download() as download:
        visit.entry.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "nexusgen-seed-11.png"
    picture = Image.open(download.value.path())
    assert json.loads(picture.text["nexusgen"])["seed"] == 11  # with what it says of itself


def test_prompt_and_settings_are_reused(visit: Visit) -> None:
    visit.go("Generate")
    visit.set(steps=3)
    visit.ask("a circle")
    visit.wait_for("done")
    seed = visit.backend.orders[0].settings.seed
    visit.set(steps=9)
    visit.entry.get_by_role("button", name="Reuse").click()
    expect(visit.page.get_by_label("Prompt")).to_have_value("a circle")
    expect(visit.page.get_by_label("Seed", exact=True)).to_have_value(str(seed))
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator(".entry")).to_have_count(2)
    visit.wait_for("done")
    assert visit.backend.orders[0].settings == visit.backend.orders[1].settings


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_until_they_are_chosen(open_page: Open, scheme: Any) -> None:
    visit = open_page(color_scheme=scheme)

    def is_dark() -> bool:
        colour = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) < 3 * 128

    assert is_dark() == (scheme == "dark")
    other = "light" if scheme == "dark" else "dark"
    visit.page.get_by_role("button", name=f"Switch to {other} colours").click()
    assert is_dark() == (other == "dark")
    visit.page.reload()
    assert is_dark() == (other == "dark")


def test_everything_is_done_by_keyboard_alone(visit: Visit) -> None:
    keyboard = visit.page.keyboard
    prompt = visit.page.get_by_label("Prompt")
    expect(prompt).to_be_focused()

    def focused() -> str:
        return visit.page.evaluate("document.activeElement.id || document.activeElement.name || ''")

    def tab_to(name: str, key: str = "Tab") -> None:
        for _ in range(40):
            keyboard.press(key)
            outline = visit.page.evaluate(
                """() => {
                    const own = document.activeElement;
                    const looks = [own, own.nextElementSibling, own.closest(".box")].filter(Boolean);
                    return looks.some((element) => getComputedStyle(element).outlineStyle !== "none");
                }"""
            )
            assert outline, f"the focus isn't seen on {focused()}"
            if focused() == name:
                return
        raise AssertionError(f"{name} isn't reached")

    tab_to("mode", "Shift+Tab")
    keyboard.press("ArrowRight")
    expect(visit.page.get_by_role("radio", name="Generate")).to_be_checked()
    tab_to("seed")
    keyboard.type("6")
    tab_to("prompt", "Shift+Tab")
    keyboard.type("two")
    keyboard.press("Shift+Enter")
    keyboard.type("lines")
    keyboard.press("Enter")
    visit.wait_for("done")
    (order,) = visit.backend.orders
    assert (order.prompt, order.settings.seed) == ("two\nlines", 6)
    expect(prompt).to_be_focused()
    for _ in range(10):
        keyboard.press("Shift+Tab")
        if visit.page.evaluate("document.activeElement.textContent.trim()") == "Edit this":
            break
    keyboard.press("Enter")
    expect(visit.page.get_by_role("radio", name="Edit")).to_be_checked()
    expect(prompt).to_be_focused()
    keyboard.type("held edit")
    keyboard.press("Enter")
    visit.wait_for("running")
    keyboard.press("Escape")
    visit.wait_for("stopped")


def test_every_control_has_a_name(visit: Visit, photo: Path) -> None:
    visit.page.locator("#files").set_input_files(photo)
    visit.ask("draw a house")
    visit.wait_for("done")
    visit.page.locator("#files").set_input_files(photo)
    for mode in ("Chat", "Generate", "Edit"):
        visit.go(mode)
        for control in visit.page.locator("button:visible, input:visible, select:visible, textarea:visible").all():
            snapshot = control.aria_snapshot()
            assert re.search(r'"[^"]+"', snapshot), snapshot
    assert visit.page.locator("img:not([alt])").count() == 0


def test_phone_has_all_of_it_without_scrolling_sideways(open_page: Open, photo: Path) -> None:
    visit = open_page(**PHONE)

    def check() -> None:
        width, inner = visit.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert (width, inner) == (360, 360)
        for control in visit.page.locator("button:visible, .modes label:visible").all():
            box = control.bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360
            assert box["height"] >= 24

    check()
    visit.page.locator("#files").set_input_files(photo)
    visit.ask("draw " + "a-very-long-word-that-does-not-break" * 4)
    visit.wait_for("done")
    check()
    visit.page.get_by_role("button", name="Settings", exact=True).tap()
    check()
    for mode in ("Generate", "Edit"):
        visit.page.locator(".modes label", has_text=mode).tap()
        check()
    visit.page.locator(".modes label", has_text="Generate").tap()
    visit.set(pictures=2)
    visit.ask("circles")
    visit.wait_for("done")
    check()
    visit.entry.get_by_role("button", name="Edit this").first.tap()
    visit.ask("invert")
    visit.wait_for("done")
    check()


def test_key_is_asked_for_kept_in_the_session_and_sent(open_page: Open) -> None:
    visit = open_page(keys=(KEY,))
    visit.expected = re.compile("401")
    field = visit.page.get_by_label("This server asks for an API key")
    expect(field).to_be_focused()
    visit.ask("hello")
    visit.wait_for("failed")
    expect(visit.entry.locator(".failure-text")).to_contain_text("API key")
    field.fill("wrong")
    field.press("Enter")
    expect(field).to_be_visible()
    field.fill(KEY)
    field.press("Enter")
    visit.wait_for("done")  # what had failed for want of a key is asked again
    expect(field).to_be_hidden()
    expect(visit.page.locator("#model")).to_have_text("version 3")
    assert KEY not in json.dumps(visit.page.evaluate("({ ...localStorage })"))
    assert KEY in json.dumps(visit.page.evaluate("({ ...sessionStorage })"))
    visit.page.reload()
    visit.ask("hello again")
    visit.wait_for("done")


def test_refusal_is_shown_with_its_wait_and_tried_again(visit: Visit) -> None:
    visit.expected = re.compile("429")
    visit.go("Generate")
    visit.set(seed=5, pictures=3)
    visit.ask("busy picture")
    visit.wait_for("failed")
    expect(visit.entry.locator(".failure-text")).to_have_text("The queue is full; try again shortly.")
    expect(visit.page.get_by_role("status")).to_have_text("Failed: The queue is full; try again shortly.")
    expect(visit.entry.locator(".picture .actions:visible")).to_have_count(2)  # the others came
    again = visit.entry.get_by_role("button", name="Try again")
    expect(again).to_have_text("Try again")  # after the second that the server asked to wait
    again.click()
    visit.wait_for("done")
    assert sorted(order.settings.seed for order in visit.backend.orders) == [5, 5, 6, 7]  # only what was missing
    expect(visit.entry.locator(".failure")).to_be_hidden()


@pytest.mark.parametrize("mode", ["Chat", "Generate"])
def test_answer_that_breaks_in_the_middle_is_shown_as_failed(visit: Visit, mode: str) -> None:
    visit.go(mode)
    visit.ask("this breaks")
    visit.wait_for("failed")
    expect(visit.entry.locator(".failure-text")).to_contain_text("The model's replica is gone")
    if mode == "Chat":
        expect(visit.entry.locator(".text")).to_contain_text("You said: this breaks")  # what came stays


def test_unreachable_server_and_half_a_size_are_told(visit: Visit) -> None:
    visit.expected = re.compile("ERR_|Failed to load")
    visit.go("Generate")
    visit.set(width=96)
    visit.ask("a circle")
    expect(visit.page.get_by_role("alert")).to_have_text("Give both width and height, or neither.")
    visit.set(height=96)
    visit.page.route("**/v1/images/**", lambda route: route.abort())
    visit.ask("a circle")
    visit.wait_for("failed")
    expect(visit.entry.locator(".failure-text")).to_contain_text("The server can't be reached")
    expect(visit.page.get_by_role("button", name="Generate", exact=True)).to_be_visible()


def test_new_answer_is_scrolled_into_view(visit: Visit) -> None:
    visit.set(height=640, width=640)
    for number in range(3):
        visit.ask(f"draw picture {number}")
        visit.wait_for("done")
    expect(visit.entry.get_by_role("button", name="Edit this")).to_be_in_viewport()
    ends = "[document.documentElement.scrollHeight, window.scrollY + window.innerHeight]"
    height, seen = visit.page.evaluate(ends)
    assert height - seen <= 1


def test_markup_in_an_answer_stays_text(visit: Visit) -> None:
    visit.ask("<img src=x onerror=alert(1)> <b>bold</b>")
    visit.wait_for("done")
    expect(visit.entry.locator(".text")).to_contain_text("<b>bold</b>")
    assert visit.page.locator(".entry b, .entry .text img").count() == 0
