"""What the door keeps out. The table of threats in the README names these tests."""

from __future__ import annotations

import base64
import contextlib
import hmac
import io
import json
import logging
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import openai
import pytest
from api_server import Painter, picture, serving

from pipelines import api_guard, api_inputs, orders
from pipelines.api_inputs import HostList
from pipelines.api_settings import MAX_JSON_BYTES, MAX_PICTURE_BYTES, ApiSettings

KEY, OTHER_KEY = "sk-first-key", "sk-second-key"


def chat_with(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """An API with default settings."""
    with serving(Painter()) as url:
        yield url


class Files:
    """A server of pictures on loopback, and what it was asked for."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {
            "/star.png": lambda handler: self._send(handler, picture()),
            "/text.png": lambda handler: self._send(handler, b"no picture at all"),
            "/here": lambda handler: self._redirect(handler, "/star.png"),
            "/away": lambda handler: self._redirect(handler, f"http://localhost:{self.port}/star.png"),
            "/file": lambda handler: self._redirect(handler, "file:///etc/passwd"),
            "/loop": lambda handler: self._redirect(handler, "/loop"),
            "/endless": self._send_endlessly,
            "/drip": self._drip,
        }

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:  # noqa: N805 (http.server's names; self is the outer one)
                self.requests.append(handler.path)
                self.headers.append(dict(handler.headers))
                if handler.path in answers:
                    answers[handler.path](handler)
                else:
                    handler.send_error(404)

            def log_message(handler, *_: object) -> None:  # noqa: N805
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _send(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _redirect(self, handler: BaseHTTPRequestHandler, target: str) -> None:
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.end_headers()

    def _send_endlessly(self, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            while True:
                handler.wfile.write(bytes(1 << 20))

    def _drip(self, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(600):
                handler.wfile.write(b"\0")
                handler.wfile.flush()
                time.sleep(0.1)


@pytest.fixture(scope="module")
def files() -> Iterator[Files]:
    files = Files()
    yield files
    files.server.shutdown()
    files.server.server_close()


@pytest.fixture(scope="module")
def fetching(files: Files) -> Iterator[str]:
    """An API that may fetch from the file server by its address, and from the name `localhost`, whose address it is."""
    hosts = (f"127.0.0.1:{files.port}", "localhost:1", f"[::1]:{files.port}")
    with serving(Painter(), ApiSettings(allowed_image_hosts=hosts)) as url:
        yield url


def refusal(url: str, picture_url: str) -> dict[str, Any]:
    response = httpx.post(f"{url}/v1/chat/completions", json=chat_with(picture_url), timeout=60)
    assert response.status_code in (400, 413), response.text
    return response.json()["error"]


# SSRF


@pytest.mark.parametrize("target", ["http://example.org/x.png", "https://127.0.0.1/x", "http://[::1]/x", "HTTP://x/y"])
def test_without_a_list_nothing_is_fetched(url: str, target: str) -> None:
    assert refusal(url, target)["code"] == "image_url_not_allowed"


@pytest.mark.parametrize(
    "target",
    ["file:///etc/passwd", "FILE:///etc/passwd", "ftp://x/y", "gopher://x", "//x/y", "/etc/passwd", "\\\\x\\y"],
)
def test_files_and_other_schemes_are_refused(fetching: str, target: str) -> None:
    error = refusal(fetching, target)
    assert error["code"] == "invalid_image_url"
    assert "root:" not in error["message"]


def test_allowed_host_is_fetched(fetching: str, files: Files) -> None:
    for path in ("/star.png", "/here"):
        target = f"http://127.0.0.1:{files.port}{path}"
        response = httpx.post(f"{fetching}/v1/chat/completions", json=chat_with(target))
        assert response.status_code == 200, response.text
    assert "Authorization" not in files.headers[-1]


def test_redirect_to_another_host_is_not_followed(fetching: str, files: Files) -> None:
    for path in ("/away", "/file"):
        files.requests.clear()
        assert refusal(fetching, f"http://127.0.0.1:{files.port}{path}")["code"] == "image_url_failed"
        assert files.requests == [path]
    assert refusal(fetching, f"http://127.0.0.1:{files.port}/loop")["code"] == "image_url_failed"


@pytest.mark.parametrize(
    "host", ["localhost", "127.1", "2130706433", "0x7f000001", "[::ffff:127.0.0.1]", "u@127.0.0.1", "0"]
)
def test_other_spellings_of_an_address_open_nothing(fetching: str, files: Files, host: str) -> None:
    files.requests.clear()
    code = refusal(fetching, f"http://{host}:{files.port}/star.png")["code"]
    assert code in ("image_url_not_allowed", "invalid_image_url")
    assert files.requests == []


def test_listed_name_with_a_private_address_is_refused(files: Files) -> None:
    settings = ApiSettings(allowed_image_hosts=(f"localhost:{files.port}",))
    files.requests.clear()
    with serving(Painter(), settings) as url:
        assert refusal(url, f"http://localhost:{files.port}/star.png")["code"] == "image_url_not_allowed"
    assert files.requests == []


@pytest.mark.parametrize(
    ("address", "is_public"),
    [
        ("93.184.216.34", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b::5db8:d822", True),
        ("2002:7f00:1::", False),
    ],
)
def test_only_public_addresses_are_connected_to(address: str, is_public: bool) -> None:
    assert HostList(["example.org"]).allows_address(address, 80) is is_public


def test_list_of_hosts_is_read_strictly() -> None:
    hosts = HostList(["example.org", "example.net:8080", "[::1]:9"])
    assert hosts.allows("example.org", 80)
    assert hosts.allows("example.org", 443)
    assert not hosts.allows("example.org", 22)
    assert hosts.allows("example.net", 8080)
    assert not hosts.allows("example.net", 80)
    assert not hosts.allows("a.example.org", 80)
    assert hosts.allows("::1", 9)
    for entry in ("", "http://example.org", "example.org/path", "user@example.org", "example.org:port", "*"):
        with pytest.raises(ValueError, match="allowed_image_hosts"):
            HostList([entry])


def test_fetched_bytes_are_counted(fetching: str, files: Files) -> None:
    assert refusal(fetching, f"http://127.0.0.1:{files.port}/endless")["code"] == "body_too_large"


def test_fetching_has_a_time_limit(fetching: str, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_inputs, "FETCH_TIMEOUT_S", 0.5)
    assert refusal(fetching, f"http://127.0.0.1:{files.port}/drip")["code"] == "image_url_failed"


def test_what_was_fetched_must_be_a_picture(fetching: str, files: Files) -> None:
    error = refusal(fetching, f"http://127.0.0.1:{files.port}/text.png")
    assert error["code"] == "image_undecodable"
    assert refusal(fetching, f"http://127.0.0.1:{files.port}/absent")["code"] == "image_url_failed"


# Bodies


@pytest.mark.parametrize(
    ("path", "limit", "media_type"),
    [
        ("/v1/images/generations", MAX_JSON_BYTES, "application/json"),
        ("/v1/chat/completions", MAX_PICTURE_BYTES, "application/json"),
        ("/v1/images/edits", MAX_PICTURE_BYTES, "multipart/form-data; boundary=x"),
        ("/health", MAX_JSON_BYTES, "application/json"),
    ],
)
def test_announced_and_chunked_bodies_are_counted(url: str, path: str, limit: int, media_type: str) -> None:
    headers = {"content-type": media_type}
    method = "GET" if path == "/health" else "POST"

    def chunks() -> Iterator[bytes]:
        for _ in range(limit // (1 << 16) + 1):
            yield bytes(1 << 16)

    for content in (bytes(limit + 1), chunks()):
        response = httpx.request(method, f"{url}{path}", content=content, headers=headers, timeout=60)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_slow_body_is_given_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_guard, "BODY_TIMEOUT_S", 0.3)
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9"
        connection.sendall(head + b"\r\n\r\n{")
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")


def test_openai_client_understands_a_refused_body(url: str) -> None:
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIStatusError) as refused,
    ):
        client.images.edit(image=("x.png", bytes(MAX_PICTURE_BYTES + 1)), prompt="x")
    assert refused.value.status_code == 413


def test_form_with_too_many_fields_or_files_is_refused(url: str) -> None:
    many_files = [("image[]", (f"{number}.png", picture(size=(8, 8)))) for number in range(17)]
    many_fields = {f"field{number}": "x" for number in range(100)}
    for files, data in ((many_files, {"prompt": "x"}), ([("image", ("x.png", picture()))], many_fields)):
        response = httpx.post(f"{url}/v1/images/edits", files=files, data=data)
        assert response.status_code == 400
        assert "Too many" in response.json()["error"]["message"]
    long = httpx.post(
        f"{url}/v1/images/edits", files=[("image", ("x.png", picture()))], data={"prompt": "x" * 1_100_000}
    )
    assert long.status_code == 400


@pytest.mark.parametrize(
    "content", [b"", b"--x", b"--x\r\n\r\n--x--", b"--x\r\nContent-Disposition: x\r\n\r\n1\r\n--x--"]
)
def test_broken_form_is_refused(url: str, content: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    for sent in (headers, {"content-type": "multipart/form-data"}):
        response = httpx.post(f"{url}/v1/images/edits", content=content, headers=sent)
        assert response.status_code == 400
        assert set(response.json()) == {"error"}


# Bombs


def bomb(side: int) -> bytes:
    """A PNG of `side` x `side` black pixels: a hundred KB that say they are GB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = zlib.compress(bytes(1 << 20))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8001, 12_000, 25_000, 2**31 - 1])
def test_pixels_are_counted_before_decoding(url: str, side: int) -> None:
    data = bomb(side)
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    assert refusal(url, uri)["code"] in ("image_too_large", "image_undecodable")
    response = httpx.post(f"{url}/v1/images/edits", files={"image": ("x.png", data)}, data={"prompt": "x"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "image"


def test_deeply_nested_json_is_refused(url: str) -> None:
    content = b'{"messages":' + b"[" * 500_000
    response = httpx.post(
        f"{url}/v1/chat/completions", content=content, headers={"content-type": "application/json"}, timeout=60
    )
    assert response.status_code == 400


# Keys


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    with serving(Painter(), ApiSettings(api_keys=(KEY, OTHER_KEY))) as url:
        yield url


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/nexusgen", "/metrics", "/v1/anything"])
def test_key_is_asked_for(guarded: str, path: str) -> None:
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer \xff"},
        {"api-key": KEY},
    ):
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        response = httpx.get(f"{guarded}{path}", headers=raw)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    for key in (KEY, OTHER_KEY):
        response = httpx.get(f"{guarded}{path}", headers={"authorization": f"bearer {key}"})
        assert response.status_code != 401


def test_health_and_docs_need_no_key(guarded: str) -> None:
    for path in ("/health", "/docs", "/openapi.json"):
        assert httpx.get(f"{guarded}{path}").status_code == 200
    assert httpx.get(f"{guarded}/").status_code != 401


def test_key_is_checked_before_the_body_is_read(guarded: str) -> None:
    host, _, port = guarded.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = b"POST /v1/images/edits HTTP/1.1\r\nHost: x\r\nContent-Length: 20000000\r\n\r\n"
        connection.sendall(head)
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")


def test_openai_client_sends_the_key(guarded: str) -> None:
    with openai.OpenAI(base_url=f"{guarded}/v1", api_key=OTHER_KEY, max_retries=0) as client:
        assert client.models.list().data[0].id == "nexusgen"
    with (
        openai.OpenAI(base_url=f"{guarded}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_keys_are_compared_in_constant_time(guarded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bool] = []
    compare = hmac.compare_digest

    def count(given: bytes, known: bytes) -> bool:
        assert len(given) == len(known) == 32  # digests: not even the length tells
        compared.append(compare(given, known))
        return compared[-1]

    monkeypatch.setattr(api_guard.hmac, "compare_digest", count)
    httpx.get(f"{guarded}/v1/models", headers={"authorization": f"Bearer {KEY}"})
    assert compared == [True, False]  # every key, though the first one fits


# Browsers


def test_every_answer_has_its_headers(url: str) -> None:
    for path in ("/health", "/docs", "/v1/models", "/nothing", "/openapi.json", "/"):
        headers = httpx.get(f"{url}{path}").headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-request-id"]


def test_other_sites_pages_may_not_use_the_api(url: str) -> None:
    origin = {"origin": "https://example.org"}
    preflight = httpx.options(f"{url}/v1/models", headers={**origin, "access-control-request-method": "POST"})
    assert preflight.status_code == 405
    simple = httpx.post(
        f"{url}/v1/images/edits",
        files={"image": ("x.png", picture())},
        data={"prompt": "x"},
        headers={**origin, "sec-fetch-site": "cross-site"},
    )
    assert (simple.status_code, simple.json()["error"]["code"]) == (403, "cross_site")
    for response in (preflight, simple, httpx.get(f"{url}/health", headers=origin)):
        assert "access-control-allow-origin" not in response.headers


# Logs


def test_log_holds_ids_and_counts_but_no_secrets() -> None:
    painter = Painter()
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    api_guard.logger.addHandler(handler)
    level = api_guard.logger.level
    api_guard.logger.setLevel(logging.INFO)
    try:
        settings = ApiSettings(api_keys=(KEY,))
        assert KEY not in repr(settings)
        with serving(painter, settings) as url:
            send = {"authorization": f"Bearer {KEY}", "x-request-id": "mine-1"}
            body = {"prompt": "SECRET prompt", "user": "SECRET user"}
            answer = httpx.post(f"{url}/v1/images/generations?SECRET=1", json=body, headers=send)
            assert answer.headers["x-request-id"] == "mine-1"
            httpx.get(f"{url}/v1/models/SECRET", headers={"authorization": "Bearer SECRET-key"})
            painter.error = RuntimeError("SECRET words of a client")
            odd = httpx.post(f"{url}/v1/images/generations", json=body, headers={**send, "x-request-id": "a b\tc"})
            assert odd.status_code == 500
            assert odd.headers["x-request-id"] != "a b\tc"
            painter.error, painter.error_after = None, orders.UnavailableError("gone")
            streamed = {**body, "stream": True, "partial_images": 1}
            httpx.post(f"{url}/v1/images/generations", json=streamed, headers=send)
    finally:
        api_guard.logger.removeHandler(handler)
        api_guard.logger.setLevel(level)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert "SECRET" not in log.getvalue()
    assert KEY not in log.getvalue()
    requests = [line for line in lines if "status" in line]
    assert [line["status"] for line in requests] == [200, 401, 500, 200]
    assert [line["error"] for line in requests] == [None, "invalid_api_key", "internal_error", "unavailable"]
    assert requests[0]["request_id"] == "mine-1"
    assert (requests[0]["route"], requests[0]["pictures"], requests[0]["model"]) == (
        "/v1/images/generations",
        1,
        "nexusgen",
    )
    (fault,) = [line for line in lines if "fault" in line]
    assert fault["fault"] == "RuntimeError"
    assert fault["request_id"] == requests[2]["request_id"]
    assert any("api_server.py" in place for place in fault["stack"])
