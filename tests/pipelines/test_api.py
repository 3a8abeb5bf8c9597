"""The HTTP door, in process: request checks, error shapes, what an answer and its PNG say."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import httpx
import pytest
from PIL import Image

from nexusgen.errors import InputError
from pipelines import api

JSON = {"content-type": "application/json"}
INFO = api.ModelInfo(name="nexusgen", version="3", fingerprint="0123456789abcdef", image_size=(64, 64), steps=8)


class PaintBackend:
    """A backend that paints each order's size in one colour, and refuses as told."""

    def __init__(self) -> None:
        self.orders: list[api.PictureOrder] = []
        self.error: Exception | None = None

    async def info(self) -> api.ModelInfo:
        if isinstance(self.error, api.UnavailableError):
            raise self.error
        return INFO

    async def draw(self, orders: Sequence[api.PictureOrder]) -> list[api.Drawing]:
        if self.error is not None:
            raise self.error
        self.orders += orders
        return [self._paint(order) for order in orders]

    def _paint(self, order: api.PictureOrder) -> api.Drawing:
        height, width = size = order.size or INFO.image_size
        steps = order.steps or INFO.steps
        png = api.encode_png(Image.new("RGB", (width, height), "red"), INFO, order.seed, steps)
        return api.Drawing(png, INFO, order.seed, steps, size)


class Caller:
    """Posts to the app without a socket."""

    def __init__(self, backend: PaintBackend) -> None:
        self.transport = httpx.ASGITransport(api.create_app(backend, "nexusgen"), raise_app_exceptions=False)

    def __call__(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            async with httpx.AsyncClient(transport=self.transport, base_url="http://test") as client:
                return await client.request(method, path, **arguments)

        return asyncio.run(call())

    def generate(self, **body: Any) -> httpx.Response:
        return self("POST", "/v1/images/generations", json=body)


@pytest.fixture
def backend() -> PaintBackend:
    return PaintBackend()


@pytest.fixture
def caller(backend: PaintBackend) -> Iterator[Caller]:
    return Caller(backend)


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def test_answer_has_openai_shape_and_names_model_seed_and_settings(caller: Caller) -> None:
    response = caller.generate(prompt="a red circle", n=2, seed=7, steps=3, size="96x64", model="nexusgen")
    assert response.status_code == 200
    body = response.json()
    assert body["size"] == "96x64"
    assert body["fingerprint"] == INFO.fingerprint
    assert [picture["seed"] for picture in body["data"]] == [7, 8]
    picture = Image.open(io.BytesIO(base64.b64decode(body["data"][1]["b64_json"])))
    assert picture.size == (96, 64)
    made = json.loads(picture.text["nexusgen"])
    assert made == {
        "model": "nexusgen",
        "version": "3",
        "fingerprint": INFO.fingerprint,
        "seed": 8,
        "steps": 3,
        "width": 96,
        "height": 64,
    }
    assert "AI model" in picture.text["Source"]


def test_nulls_and_auto_mean_the_models_defaults(caller: Caller, backend: PaintBackend) -> None:
    response = caller.generate(prompt="x", n=None, size="auto", seed=None, steps=None, response_format=None, user=None)
    assert response.status_code == 200
    (order,) = backend.orders
    assert (order.steps, order.size) == (None, None)
    assert response.json()["data"][0]["seed"] == order.seed
    assert response.json()["size"] == "64x64"


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"prompt": "x", "sed": 1}, "sed", "unknown_parameter"),
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": "x" * 100_000}, "prompt", "string_above_max_length"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": " \n"}, "prompt", "invalid_value"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value"),
        ({"prompt": 3}, "prompt", "invalid_value"),
        ({"prompt": "x", "n": 0}, "n", "invalid_value"),
        ({"prompt": "x", "n": 11}, "n", "invalid_value"),
        ({"prompt": "x", "n": "2"}, "n", "invalid_value"),
        ({"prompt": "x", "seed": -1}, "seed", "invalid_value"),
        ({"prompt": "x", "seed": 2**64}, "seed", "invalid_value"),
        ({"prompt": "x", "steps": 100_000}, "steps", "invalid_value"),
        ({"prompt": "x", "size": "big"}, "size", "invalid_value"),
        ({"prompt": "x", "size": "65x64"}, "size", "invalid_value"),
        ({"prompt": "x", "size": "16000x16000"}, "size", "invalid_value"),
        ({"prompt": "x", "response_format": "url"}, "response_format", "invalid_value"),
    ],
)
def test_bad_parameter_is_refused_by_name(
    caller: Caller, backend: PaintBackend, body: dict[str, Any], param: str, code: str
) -> None:
    response = caller("POST", "/v1/images/generations", content=json.dumps(body), headers=JSON)
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert backend.orders == []


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000])
def test_body_that_is_no_json_object_is_refused(caller: Caller, content: bytes) -> None:
    response = caller("POST", "/v1/images/generations", content=content, headers=JSON)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


def test_another_models_name_is_not_found(caller: Caller) -> None:
    response = caller.generate(prompt="x", model="dall-e-3")
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


def test_unknown_path_and_method_have_the_error_shape(caller: Caller) -> None:
    assert error_of(caller("GET", "/v1/nothing"))["type"] == "invalid_request_error"
    response = caller("GET", "/v1/images/generations")
    assert response.status_code == 405
    assert "GET" in error_of(response)["message"]


def test_bytes_of_a_chunked_body_are_counted(caller: Caller) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 65_536

    response = caller("POST", "/v1/images/generations", content=chunks(), headers=JSON)
    assert "content-length" not in response.request.headers
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after"),
    [
        (api.UnavailableError("loading"), 503, "server_error", "1"),
        (api.OverloadedError("full", retry_after_s=4), 429, "rate_limit_error", "4"),
        (InputError("too odd"), 400, "invalid_request_error", None),
        (RuntimeError("secret detail"), 500, "server_error", None),
    ],
)
def test_backends_errors_become_openais(
    caller: Caller, backend: PaintBackend, error: Exception, status: int, kind: str, retry_after: str | None
) -> None:
    backend.error = error
    response = caller.generate(prompt="x")
    assert response.status_code == status
    assert error_of(response)["type"] == kind
    assert response.headers.get("retry-after") == retry_after
    assert "secret" not in response.text


def test_health_is_ready_only_when_the_model_answers(caller: Caller, backend: PaintBackend) -> None:
    response = caller("GET", "/health")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ok",
        "model": "nexusgen",
        "version": "3",
        "fingerprint": INFO.fingerprint,
    }
    backend.error = api.UnavailableError("loading")
    response = caller("GET", "/health")
    assert response.status_code == 503
    assert response.json()["reason"] == "loading"


def test_openapi_documents_the_statuses(caller: Caller) -> None:
    paths = caller("GET", "/openapi.json").json()["paths"]
    statuses = set(paths["/v1/images/generations"]["post"]["responses"])
    assert {"200", "400", "404", "413", "429", "500", "503"} <= statuses
