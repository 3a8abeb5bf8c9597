"""Parts of HTML reports: a page that needs nothing beside it, tables, cards of pictures. No script, and no other host.

Every function escapes the texts that it is given; only what is `Html` already goes in as it is. Pages follow the
reader's light or dark colours, and are as wide as a phone or a desktop.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import NewType

from PIL import Image

Html = NewType("Html", str)

SMALL_PX = 160  # pictures up to this side are shown with their pixels
MAX_PNG_BYTES = 24_000  # of a small picture that is kept to the bit; a photograph would be some 40,000
SHOWN_PX = 320  # larger ones are shrunk to this side
_MAX_TEXT = 600  # characters of a text on a card
# Nothing but the page itself and the pictures in it: a browser refuses whatever a text in it might ask for.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """:root{color-scheme:light dark;--ink:light-dark(#1f2328,#e6edf3);--paper:light-dark(#fff,#0d1117);
--pale:light-dark(#59636e,#9198a1);--line:light-dark(#d1d9e0,#3d444d);--card:light-dark(#f6f8fa,#151b23);
--a:light-dark(#0969da,#4493f8);--b:light-dark(#bc4c00,#f0883e);--c:light-dark(#1a7f37,#3fb950);
--d:light-dark(#8250df,#ab7df8);--bad:light-dark(#cf222e,#f85149)}
*{box-sizing:border-box}
body{font:15px/1.45 system-ui,sans-serif;max-width:1180px;margin:0 auto;padding:1em;color:var(--ink);
background:var(--paper);overflow-wrap:anywhere}
h1{font-size:1.5em}h2{margin-top:2em;border-bottom:1px solid var(--line)}h3{margin:1.4em 0 .4em}
pre{white-space:pre-wrap}p.note,.pale{color:var(--pale)}p.note{margin:.2em 0 .8em}
table{border-collapse:collapse;margin:.5em 0;max-width:100%}
td,th{padding:.2em .9em .2em 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;overflow-wrap:normal}
@media(max-width:600px){table{font-size:13px}td,th{padding-right:.6em}}
td.number:last-child,th.number:last-child{padding-right:0}
img.wide{max-width:100%;background:#fff}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:16px}
figure{margin:0}figcaption.plot{font-weight:600;margin-bottom:4px}
figure svg{display:block;width:100%;height:auto;max-width:560px}
svg text{fill:var(--ink);font:11px system-ui,sans-serif}svg .pale{fill:var(--pale)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,240px),1fr));gap:12px}
.card{border:1px solid var(--line);border-radius:6px;padding:8px;font-size:13px;background:var(--card);min-width:0}
.card.good{border-color:var(--c)}.card.poor{border-color:var(--bad)}
.shots{display:flex;flex-wrap:wrap;gap:4px}.shots figure{flex:1 1 64px;max-width:160px}
.shots img{display:block;width:100%;height:auto;background:#fff}.shots img.small{image-rendering:pixelated}
.shots figcaption{font-size:11px;color:var(--pale)}
.key,.role{color:var(--pale);font-size:12px}.score{font-weight:600}"""


def escape(value: object) -> Html:
    """Any value as text."""
    return Html(html.escape(str(value)))


def join(parts: Iterable[Html], separator: str = "") -> Html:
    """Parts after one another."""
    return Html(separator.join(parts))


def page(title: str, parts: Iterable[Html]) -> str:
    """A whole document."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>\n{join(parts, chr(10))}\n</body></html>\n"
    )


def heading(text: str, level: int = 2) -> Html:
    """A heading; the title of the page has level 1."""
    return Html(f"<h{level}>{escape(text)}</h{level}>")


def note(text: str) -> Html:
    """A line of explanation."""
    return Html(f'<p class="note">{escape(text)}</p>')


def table(header: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int] = ()) -> Html:
    """Rows below a header, nothing without rows; the columns whose places are in `numbers` are aligned right."""
    if not rows:
        return Html("")

    def line(tag: str, values: Sequence[object]) -> str:
        cells = (
            f"<{tag}{_class('number' if place in numbers else '')}>{_breakable(value)}</{tag}>"
            for place, value in enumerate(values)
        )
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return Html(f"<table><thead>{line('th', header)}</thead><tbody>{body}</tbody></table>")


def picture(shown: Image.Image | bytes, caption: str = "", alternative: str = "") -> Html:
    """A picture as part of the page; a large one is shrunk to `SHOWN_PX`, a small and simple one kept to the bit."""
    image = (Image.open(io.BytesIO(shown)) if isinstance(shown, bytes) else shown).convert("RGB")
    is_small = max(image.size) <= SMALL_PX
    if not is_small:
        image.thumbnail((SHOWN_PX, SHOWN_PX), Image.Resampling.LANCZOS)
    kind, data = "png", to_png(image) if is_small else b""
    if not is_small or len(data) > MAX_PNG_BYTES:
        kind, data = "jpeg", _jpeg(image)
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Html(
        f'<figure><img{_class("small" if is_small else "")} width="{image.width}" height="{image.height}" '
        f'alt="{escape(alternative or caption)}" src="{data_uri(data, kind)}">{below}</figure>'
    )


def wide_picture(shown: Image.Image | bytes, alternative: str) -> Html:
    """A large picture, bit for bit, as wide as the page at most."""
    data = shown if isinstance(shown, bytes) else to_png(shown)
    return Html(f'<img class="wide" alt="{escape(alternative)}" src="{data_uri(data, "png")}">')


def card(pictures: Iterable[Html], lines: Iterable[Html], passed: bool | None = None) -> Html:
    """Pictures side by side and lines of text below them; its frame says whether it passed."""
    kind = "card" if passed is None else "card good" if passed else "card poor"
    return Html(f'<div{_class(kind)}><div class="shots">{join(pictures)}</div>{join(lines)}</div>')


def text_line(text: str, kind: str = "", label: str = "") -> Html:
    """A line of a card, shortened if it is very long; `kind` is one of the style's classes."""
    shown = text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."
    before = f'<span class="role">{escape(label)}:</span> ' if label else ""
    return Html(f"<div{_class(kind)}>{before}{escape(shown)}</div>")


def cards(found: Sequence[Html]) -> Html:
    """Cards in as many columns as there is room for."""
    return Html(f'<div class="cards">{join(found)}</div>') if found else Html("")


def plots(drawn: Sequence[Html]) -> Html:
    """Drawings side by side."""
    return Html(f'<div class="plots">{join(drawn)}</div>') if drawn else Html("")


def data_uri(data: bytes, kind: str) -> str:
    """The bytes of an image file, as an address."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def to_png(image: Image.Image) -> bytes:
    """A picture as a PNG file, as small as it gets."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _breakable(value: object) -> Html:
    """A text whose long names may be broken where their words end."""
    return Html(escape(value).replace("/", "/<wbr>").replace("_", "_<wbr>"))


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
