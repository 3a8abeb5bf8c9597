"""`/docs`: the API's schema as one page of plain HTML, without scripts, and without anything from another host."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
code, pre { font: 14px/1.5 ui-monospace, monospace; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid color-mix(in srgb, currentColor 25%, transparent); }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; }
tr { border-top: 1px solid color-mix(in srgb, currentColor 20%, transparent); }
section { margin: 2.5rem 0; }
summary { cursor: pointer; }
""".strip()
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

DOCS_POLICY = f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; frame-ancestors 'none'"

_EXAMPLES = {
    "/v1/chat/completions": '{"messages": [{"role": "user", "content": "Draw a red circle."}], '
    '"modalities": ["text", "image"]}',
    "/v1/images/generations": '{"prompt": "a red circle", "seed": 0}',
}


def docs_page(openapi: Mapping[str, Any]) -> str:
    """The page of an OpenAPI schema: every path with its parameters, its answers and a call by curl."""
    operations = [
        (path, method, operation) for path, methods in openapi["paths"].items() for method, operation in methods.items()
    ]
    links = "".join(
        f'<li><a href="#{_anchor(path, method)}"><code>{method.upper()} {_escape(path)}</code></a> '
        f"{_escape(operation.get('summary', ''))}</li>"
        for path, method, operation in operations
    )
    sections = "".join(_section(openapi, *operation) for operation in operations)
    shapes = "".join(
        f'<section id="{_escape(name)}"><h3><code>{_escape(name)}</code></h3>'
        f"<p>{_escape(schema.get('description', ''))}</p>{_table(('name', 'type', ''), _rows(schema))}</section>"
        for name, schema in openapi["components"]["schemas"].items()
    )
    title = f"{openapi['info']['title']} {openapi['info']['version']}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escape(title)}: API</title><style>{_STYLE}</style></head><body>"
        f"<h1>{_escape(title)}</h1><p>{_escape(openapi['info'].get('description', ''))}</p>"
        '<p>The whole schema: <a href="openapi.json">openapi.json</a></p>'
        f"<ul>{links}</ul>{sections}<h2>Shapes</h2>{shapes}</body></html>"
    )


def _section(openapi: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any]) -> str:
    parts = [
        f'<section id="{_anchor(path, method)}"><h2><code>{method.upper()} {_escape(path)}</code></h2>',
        f"<p>{_escape(operation.get('summary', ''))}</p>",
    ]
    for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
        rows = _rows(_resolve(openapi, content["schema"]))
        parts.append(f"<h3>Body: <code>{_escape(media_type)}</code></h3>{_table(('name', 'type', ''), rows)}")
    if path in _EXAMPLES:
        call = f"curl -s http://127.0.0.1:8000{path} -H 'Content-Type: application/json' -d '{_EXAMPLES[path]}'"
        parts.append(f"<pre>{_escape(call)}</pre>")
    answers = operation["responses"]
    meanings = [(f"<code>{status}</code>", _escape(answer["description"])) for status, answer in answers.items()]
    parts.append(f"<h3>Answers</h3>{_table(('status', ''), meanings)}")
    schema = answers["200"].get("content", {}).get("application/json", {}).get("schema")
    if schema:
        parts.append(f"<p>200: {_type(schema)}</p>")
    return "".join(parts) + "</section>"


def _rows(schema: Mapping[str, Any]) -> list[tuple[str, ...]]:
    required = schema.get("required", [])
    return [
        (
            f"<code>{_escape(name)}</code>{' (required)' if name in required else ''}",
            _type(field),
            _escape(field.get("description", "")),
        )
        for name, field in schema.get("properties", {}).items()
    ]


def _type(field: Mapping[str, Any]) -> str:
    """A field's type and bounds in a few words of HTML."""
    if "anyOf" in field or "oneOf" in field:
        kinds = [kind for kind in field.get("anyOf", field.get("oneOf")) if kind.get("type") != "null"]
        return " or ".join(dict.fromkeys(_type(kind) for kind in kinds))
    if "$ref" in field:
        name = _escape(str(field["$ref"]).rpartition("/")[2])
        return f'<a href="#{name}"><code>{name}</code></a>'
    if "enum" in field or "const" in field:
        values = field.get("enum", [field.get("const")])
        return " or ".join(f"<code>{_escape(json.dumps(value))}</code>" for value in values)
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    low, high = field.get("minimum", field.get("exclusiveMinimum")), field.get("maximum")
    bounds = f", {low} to {high}" if low is not None and high is not None else ""
    return _escape(f"{field.get('type', 'any')}{bounds}")


def _resolve(openapi: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    name = str(schema.get("$ref", "")).rpartition("/")[2]
    found: Mapping[str, Any] = openapi["components"]["schemas"][name] if name else schema
    return found


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{text}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _anchor(path: str, method: str) -> str:
    return _escape(f"{method}{path}".replace("/", "-").replace("{", "").replace("}", ""))


def _escape(text: str) -> str:
    return html.escape(str(text))
