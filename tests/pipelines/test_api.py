"""The HTTP door, in process: request checks, the orders that become of them, error shapes, what an answer says."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_server import INFO, Painter, picture
from PIL import ExifTags, Image

from nexusgen.errors import InputError, ModelError, SampleError
from nexusgen.schema import IMAGE_MARK, Message
from pipelines import api, orders
from pipelines.api_settings import ApiSettings

JSON = {"content-type": "application/json"}
DATA_URI = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"


class Caller:
    """Sends requests to the app without a socket."""

    def __init__(self, backend: Painter, settings: ApiSettings | None = None) -> None:
        self.transport = httpx.ASGITransport(api.create_app(backend, settings), raise_app_exceptions=False)

    def __call__(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            async with httpx.AsyncClient(transport=self.transport, base_url="http://test") as client:
                return await client.request(method, path, **arguments)

        return asyncio.run(call())

    def generate(self, **body: Any) -> httpx.Response:
        return self("POST", "/v1/images/generations", json=body)

    def edit(self, files: Any, **fields: Any) -> httpx.Response:
        return self("POST", "/v1/images/edits", data=fields, files=files)

    def chat(self, *messages: Any, **body: Any) -> httpx.Response:
        return self("POST", "/v1/chat/completions", json={"messages": messages, **body})


@pytest.fixture
def backend() -> Painter:
    return Painter()


@pytest.fixture
def caller(backend: Painter) -> Caller:
    return Caller(backend)


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


IMAGE = {"type": "image_url", "image_url": {"url": DATA_URI}}


def test_answer_has_openai_shape_and_names_model_seed_and_settings(caller: Caller) -> None:
    response = caller.generate(
        prompt="a red circle", n=2, seed=7, steps=3, size="96x64", model="nexusgen", guidance_scale=2
    )
    assert response.status_code == 200
    body = response.json()
    assert body["size"] == "96x64"
    assert (body["model"], body["version"], body["fingerprint"]) == ("nexusgen", "3", INFO.fingerprint)
    assert (body["steps"], body["guidance_scale"], body["output_format"]) == (3, 2.0, "png")
    assert body["usage"]["input_tokens_details"] == {"text_tokens": 10, "image_tokens": 0}
    assert [picture["seed"] for picture in body["data"]] == [7, 8]
    image = Image.open(io.BytesIO(base64.b64decode(body["data"][1]["b64_json"])))
    assert image.size == (96, 64)
    made = json.loads(image.text["nexusgen"])
    assert made == {
        "model": "nexusgen",
        "version": "3",
        "fingerprint": INFO.fingerprint,
        "seed": 8,
        "steps": 3,
        "guidance_scale": 2.0,
        "width": 96,
        "height": 64,
    }
    assert "AI model" in image.text["Source"]


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_other_formats_say_who_made_them_too(caller: Caller, output_format: str) -> None:
    response = caller.generate(prompt="x", seed=4, output_format=output_format, output_compression=50)
    image = Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"])))
    assert image.format == output_format.upper()
    description = image.getexif()[ExifTags.Base.ImageDescription]
    assert "AI model" in description
    assert json.loads(description[description.index("{") :])["seed"] == 4


def test_compression_makes_smaller_files(caller: Caller) -> None:
    sizes = [
        len(caller.generate(prompt="x", output_format="jpeg", output_compression=quality).content)
        for quality in (100, 10)
    ]
    assert sizes[1] < sizes[0]


def test_nulls_and_auto_mean_the_models_defaults(caller: Caller, backend: Painter) -> None:
    neutral = {"quality": "auto", "background": "auto", "moderation": "auto", "style": "vivid", "stream": False}
    nulls = dict.fromkeys(("n", "seed", "steps", "response_format", "user", "output_format", "partial_images"))
    response = caller.generate(prompt="x", size="auto", **nulls, **neutral)
    assert response.status_code == 200
    (order,) = backend.orders
    assert order == orders.PictureOrder("x", orders.PictureSettings(seed=order.settings.seed))
    assert response.json()["data"][0]["seed"] == order.settings.seed
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
        ({"prompt": "x", "guidance_scale": float("nan")}, "guidance_scale", "invalid_value"),
        ({"prompt": "x", "size": "big"}, "size", "invalid_value"),
        ({"prompt": "x", "size": "65x64"}, "size", "invalid_value"),
        ({"prompt": "x", "size": "16000x16000"}, "size", "invalid_value"),
        ({"prompt": "x", "size": "16x99984"}, "size", "invalid_value"),
        ({"prompt": "x", "response_format": "url"}, "response_format", "invalid_value"),
        ({"prompt": "x", "output_format": "gif"}, "output_format", "invalid_value"),
        ({"prompt": "x", "output_compression": 5}, "output_compression", "invalid_value"),
        ({"prompt": "x", "quality": "high"}, "quality", "invalid_value"),
        ({"prompt": "x", "background": "transparent"}, "background", "invalid_value"),
        ({"prompt": "x", "style": "natural"}, "style", "invalid_value"),
        ({"prompt": "x", "partial_images": 2}, "partial_images", "invalid_value"),
        ({"prompt": "x", "partial_images": 4, "stream": True}, "partial_images", "invalid_value"),
    ],
)
def test_bad_parameter_is_refused_by_name(
    caller: Caller, backend: Painter, body: dict[str, Any], param: str, code: str
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


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/chat/completions", "/v1/images/edits"])
def test_body_of_another_media_type_is_refused(caller: Caller, path: str) -> None:
    response = caller("POST", path, content=b"{}", headers={"content-type": "text/plain"})
    assert response.status_code == 415
    assert error_of(response)["code"] == "unsupported_media_type"


def test_another_models_name_is_not_found(caller: Caller) -> None:
    for response in (caller.generate(prompt="x", model="dall-e-3"), caller.chat(user("x"), model="gpt-5")):
        assert response.status_code == 404
        assert error_of(response)["code"] == "model_not_found"


def test_unknown_path_and_method_have_the_error_shape(caller: Caller) -> None:
    assert error_of(caller("GET", "/v1/nothing"))["type"] == "invalid_request_error"
    response = caller("GET", "/v1/images/generations")
    assert response.status_code == 405
    assert "GET" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after"),
    [
        (orders.UnavailableError("loading"), 503, "server_error", "1"),
        (orders.OverloadedError("full", retry_after_s=4), 429, "rate_limit_error", "4"),
        (InputError("too odd"), 400, "invalid_request_error", None),
        (SampleError("image_truncated", "ends early"), 400, "invalid_request_error", None),
        (ModelError("secret folder"), 500, "server_error", None),
        (RuntimeError("secret detail"), 500, "server_error", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_backends_errors_become_openais(
    caller: Caller,
    backend: Painter,
    error: Exception,
    status: int,
    kind: str,
    retry_after: str | None,
    stream: bool,
) -> None:
    backend.error = error
    for response in (
        caller.generate(prompt="x", stream=stream, n=3),
        caller.edit({"image": picture()}, prompt="x", stream=json.dumps(stream)),
        caller.chat(user("x"), model="nexusgen", stream=stream, n=2),
    ):
        assert response.status_code == status
        assert error_of(response)["type"] == kind
        assert response.headers.get("retry-after") == retry_after
        assert "secret" not in response.text


def test_edit_takes_one_or_several_pictures(caller: Caller, backend: Painter) -> None:
    white, black = picture("white"), picture("black")
    assert caller.edit({"image": white}, prompt="Make it red.").status_code == 200
    several = [("image[]", white), ("image[]", black)]
    response = caller.edit(several, prompt="Join them.", n="2", seed="3", steps="4", size="64x32", guidance_scale="1.5")
    assert response.status_code == 200
    assert response.json()["usage"]["input_tokens_details"] == {"text_tokens": 4, "image_tokens": 6}
    one, first, second = backend.orders
    assert (one.prompt, one.images) == ("Make it red.", (white,))
    assert first.images == second.images == (white, black)
    assert first.settings == orders.PictureSettings(3, 4, (32, 64), 1.5)
    assert second.settings.seed == 4


@pytest.mark.parametrize(
    ("files", "fields", "param", "code"),
    [
        ({"image": picture()}, {"prompt": "x", "sed": "1"}, "sed", "unknown_parameter"),
        ({"image": picture()}, {}, "prompt", "missing_required_parameter"),
        ({"image": picture()}, {"prompt": ""}, "prompt", "invalid_value"),
        ({"image": picture()}, {"prompt": "x", "n": "many"}, "n", "invalid_value"),
        ({"image": picture()}, {"prompt": "x", "n": ["1", "2"]}, "n", "invalid_value"),
        ({"image": picture(), "mask": picture()}, {"prompt": "x"}, "mask", "unsupported_parameter"),
        ({"image": picture(), "prompt": b"x"}, {}, "prompt", "invalid_type"),
        ({"picture": picture()}, {"prompt": "x"}, "picture", "unknown_parameter"),
        ({"image": b"no picture"}, {"prompt": "x"}, "image", "image_undecodable"),
        ({"nothing": (None, "")}, {"prompt": "x"}, "nothing", "unknown_parameter"),
        ({"image": (None, "text")}, {"prompt": "x"}, "image", "invalid_type"),
        ({"user": (None, "me")}, {"prompt": "x"}, "image", "missing_required_parameter"),
    ],
)
def test_bad_field_of_an_edit_is_refused_by_name(
    caller: Caller, backend: Painter, files: Any, fields: dict[str, Any], param: str, code: str
) -> None:
    response = caller.edit(files, **fields)
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == (param, code)
    assert backend.orders == []


def test_empty_fields_are_nulls(caller: Caller, backend: Painter) -> None:
    assert caller.edit({"image": picture()}, prompt="x", n="", size="", stream="").status_code == 200
    assert backend.orders[0].settings.size is None


def test_chat_answer_has_openais_shape_and_pictures_beside_the_text(caller: Caller) -> None:
    response = caller.chat(user("Draw a star."), modalities=["text", "image"], n=2, seed=5, steps=3, size="32x64")
    body = response.json()
    assert body["object"] == "chat.completion"
    assert (body["model"], body["system_fingerprint"], body["version"]) == ("nexusgen", INFO.fingerprint, "3")
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 6,
        "total_tokens": 13,
        "prompt_tokens_details": {"image_tokens": 0},
    }
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    message = body["choices"][1]["message"]
    assert (message["role"], message["content"]) == ("assistant", "Here it is: done")
    (image,) = message["images"]
    assert (image["index"], image["type"], image["offset"]) == (0, "image_url", len("Here it is:"))
    assert (image["seed"], image["steps"], image["size"]) == (6, 3, "32x64")
    png = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(png)).size == (32, 64)


def test_chat_order_says_what_was_asked(caller: Caller, backend: Painter) -> None:
    response = caller.chat(
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [text("Be"), text("kind.")]},
        user([IMAGE, text("What is this?")]),
        {"role": "assistant", "content": "A star: and more", "images": [{"offset": 7, "image_url": {"url": "data:"}}]},
        user([text("And"), text("these?"), IMAGE, IMAGE]),
        modalities=["text"],
        temperature=0.5,
        top_p=0.9,
        stop=["end", "."],
        max_completion_tokens=20,
        seed=9,
        model="nexusgen",
        frequency_penalty=0,
        tools=[{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}],
        tool_choice="auto",
        metadata={"a": "b"},
    )
    assert response.status_code == 200
    (order,) = backend.orders
    assert order.messages == (
        Message("system", "Be brief.\n\nBe\nkind."),
        Message("user", f"{IMAGE_MARK}\nWhat is this?"),
        Message("assistant", f"A star:{IMAGE_MARK} and more"),
        Message("user", f"And\nthese?\n{IMAGE_MARK}\n{IMAGE_MARK}"),
    )
    assert order.images == (picture(),) * 3
    assert (order.temperature, order.top_p, order.stop, order.max_tokens) == (0.5, 0.9, ("end", "."), 20)
    assert (order.seed, order.picture.seed, order.modality) == (9, 9, "text")
    assert orders.picture_to_edit(order) == picture()


@pytest.mark.parametrize(
    ("modalities", "modality"),
    [
        (None, "text"),
        (["text"], "text"),
        (["image"], "image"),
        (["text", "image"], "auto"),
        (["image", "text"], "auto"),
    ],
)
def test_modalities_say_what_an_answer_holds(
    caller: Caller, backend: Painter, modalities: list[str] | None, modality: str
) -> None:
    assert caller.chat(user([IMAGE, text("Make it red.")]), modalities=modalities).status_code == 200
    assert backend.orders[0].modality == modality
    gap = " " if modality == "image" else "\n"  # as in the data of edits, and of questions
    assert backend.orders[0].messages[0].content == f"{IMAGE_MARK}{gap}Make it red."


def test_written_marks_are_no_pictures(caller: Caller, backend: Painter) -> None:
    content = [text("<ima"), text("ge>"), text("<image>"), IMAGE, text("<image")]
    answer = {"role": "assistant", "content": "<image>", "images": [{"offset": 3}, {}]}
    assert caller.chat(user("<image>"), answer, user(content)).status_code == 200
    (order,) = backend.orders
    assert [message.content.count(IMAGE_MARK) for message in order.messages] == [0, 2, 1]
    assert len(order.images) == 1


def test_an_answer_can_be_sent_back_as_it_came(caller: Caller, backend: Painter) -> None:
    answer = caller.chat(user("Draw a star."), modalities=["image"]).json()["choices"][0]["message"]
    as_client_sends = {**answer, "annotations": None, "audio": None, "function_call": None, "tool_calls": None}
    assert caller.chat(user("Draw a star."), as_client_sends, user("Thanks.")).status_code == 200
    assert backend.orders[1].messages[1].content == f"Here it is:{IMAGE_MARK} done"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0]"),
        ({"messages": [user("x"), {"role": "system", "content": "x"}, user("x")]}, "messages[1]"),
        ({"messages": [user("x"), {"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [user("")]}, "messages"),
        ({"messages": [user("x" * 40_000)]}, "messages[0].content"),
        ({"messages": [user("x" * 20_000), user("x" * 20_000)]}, "messages"),
        ({"messages": [user([IMAGE] * 17)]}, "messages"),
        ({"messages": [user([{"type": "input_audio"}])]}, "messages[0].content"),
        ({"messages": [user("\ud800")]}, "messages[0].content"),
        ({"messages": [user("x")], "temperature": 3}, "temperature"),
        ({"messages": [user("x")], "temperature": float("nan")}, "temperature"),
        ({"messages": [user("x")], "top_p": 0}, "top_p"),
        ({"messages": [user("x")], "n": 11}, "n"),
        ({"messages": [user("x")], "stop": ["a"] * 5}, "stop"),
        ({"messages": [user("x")], "stop": ""}, "stop"),
        ({"messages": [user("x")], "max_tokens": 0}, "max_tokens"),
        ({"messages": [user("x")], "max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"messages": [user("x")], "stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": [user("x")], "modalities": ["audio"]}, "modalities[0]"),
        ({"messages": [user("x")], "tools": [{"type": "function"}] * 129}, "tools"),
        ({"messages": [user("x")], "tools": [{"type": "function"}], "tool_choice": "required"}, "tool_choice"),
        ({"messages": [user("x")], "logprobs": True}, "logprobs"),
        ({"messages": [user("x")], "frequency_penalty": 1}, "frequency_penalty"),
        ({"messages": [user("x")], "response_format": {"type": "json_object"}}, "response_format.type"),
        ({"messages": [user("x")], "temprature": 1}, "temprature"),
    ],
)
def test_bad_parameter_of_a_chat_is_refused_by_name(
    caller: Caller, backend: Painter, body: dict[str, Any], param: str
) -> None:
    response = caller("POST", "/v1/chat/completions", content=json.dumps(body), headers=JSON)
    assert response.status_code == 400, response.text
    found = error_of(response)["param"]
    assert found is not None
    assert found.startswith(param)
    assert backend.orders == []


@pytest.mark.parametrize("url", ["data:image/png;base64,!!!!", "data:image/png,abc", "data:", "x", f"{DATA_URI}#"])
def test_bad_data_uri_is_refused(caller: Caller, url: str) -> None:
    response = caller.chat(user([{"type": "image_url", "image_url": {"url": url}}]))
    assert response.status_code == 400
    assert error_of(response)["param"] == "messages[0].content[0].image_url"


def test_models_shows_what_is_loaded(caller: Caller, backend: Painter) -> None:
    listed = caller("GET", "/v1/models").json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert (card["id"], card["object"], card["created"], card["owned_by"]) == ("nexusgen", "model", 1, "nexusgen")
    assert (card["version"], card["fingerprint"]) == ("3", INFO.fingerprint)
    assert caller("GET", "/v1/models/nexusgen").json() == card
    absent = caller("GET", "/v1/models/gpt-5")
    assert (absent.status_code, error_of(absent)["code"]) == (404, "model_not_found")


def test_health_is_ready_only_when_the_model_answers(caller: Caller, backend: Painter) -> None:
    response = caller("GET", "/health")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ok",
        "model": "nexusgen",
        "version": "3",
        "fingerprint": INFO.fingerprint,
        "refused": "",
    }
    backend.error = orders.UnavailableError("loading")
    response = caller("GET", "/health")
    assert response.status_code == 503
    assert response.json()["reason"] == "loading"
    backend.error, backend.loaded = None, []
    assert caller("GET", "/health").status_code == 503


def test_metrics_count_requests_pictures_and_tokens(backend: Painter) -> None:
    async def more() -> str:
        return "nexusgen_queue_length 3\n"

    caller = Caller(backend, ApiSettings(more_metrics=more))
    caller.generate(prompt="x", n=2)
    caller.generate(prompt="")
    caller("GET", "/anything/a/client/makes/up")
    response = caller("GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    route = "/v1/images/generations"
    for line in (
        f'nexusgen_requests_total{{route="{route}",status="200"}} 1.0',
        f'nexusgen_requests_total{{route="{route}",status="400"}} 1.0',
        'nexusgen_requests_total{route="unmatched",status="404"} 1.0',
        f'nexusgen_pictures_total{{route="{route}"}} 2.0',
        'nexusgen_tokens_total{kind="completion"} 18.0',
        f'nexusgen_first_event_seconds_count{{route="{route}"}} 1.0',
        "nexusgen_queue_length 3",
    ):
        assert line in lines
    assert "client" not in response.text.replace("a client that left first", "")


def test_openapi_documents_the_statuses(caller: Caller) -> None:
    paths = caller("GET", "/openapi.json").json()["paths"]
    for path in ("/v1/images/generations", "/v1/images/edits", "/v1/chat/completions"):
        statuses = set(paths[path]["post"]["responses"])
        assert {"200", "400", "401", "403", "404", "408", "413", "415", "429", "500", "503", "504"} <= statuses
        assert "422" not in statuses


def test_docs_page_loads_nothing(caller: Caller) -> None:
    response = caller("GET", "/docs")
    assert response.status_code == 200
    page = response.text
    assert "/v1/chat/completions" in page
    assert "guidance_scale" in page
    assert not re.search(r"<script|<link|<img|url\(|@import|\ssrc=", page)
    assert not re.search(r'href="(?!#|openapi\.json)', page)
    assert "script-src" not in response.headers["content-security-policy"]
    assert response.headers["content-security-policy"].startswith("default-src 'none'")


def test_page_is_served_from_its_folder_alone(backend: Painter, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    caller = Caller(backend, ApiSettings(page_folder=folder))
    assert error_of(caller("GET", "/"))["code"] == "not_found"
    folder.mkdir()
    (folder / "index.html").write_text("<!doctype html><title>hello</title>")
    (folder / "page.js").write_text("1")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    index = caller("GET", "/")
    assert index.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in index.headers["content-security-policy"]
    assert "javascript" in caller("GET", "/page/page.js").headers["content-type"]
    for name in (
        "../secret.txt",
        "..%2fsecret.txt",
        "%2e%2e%2fsecret.txt",
        "link.txt",
        "absent.js",
        "a%00b",
    ):
        response = caller("GET", f"/page/{name}")
        assert response.status_code == 404, name
        assert "secret" not in response.json()["error"]["message"].replace("secret.txt", "")


async def endless() -> AsyncIterator[bytes]:
    for _ in range(40):
        yield b" " * 65_536


def test_bytes_of_a_chunked_body_are_counted(caller: Caller) -> None:
    response = caller("POST", "/v1/images/generations", content=endless(), headers=JSON)
    assert "content-length" not in response.request.headers
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"


def test_more_answers_than_ever_have_room_are_refused_for_good(backend: Painter) -> None:
    caller = Caller(backend, ApiSettings(max_orders=3))
    assert caller.chat(user("x"), n=3).status_code == 200
    for response in (
        caller.chat(user("x"), n=4),
        caller.generate(prompt="x", n=4),
    ):
        assert response.status_code == 400
        error = error_of(response)
        assert (error["param"], error["message"]) == (
            "n",
            "Invalid 'n': 4, but this server works on 3 answers at most at one time.",
        )
