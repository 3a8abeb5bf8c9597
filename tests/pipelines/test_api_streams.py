"""Streams, clients that leave, time limits and retries: the API on a real server, asked by the real openai client."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from api_server import INFO, Painter, picture, serving

from pipelines import orders
from pipelines.api_settings import ApiSettings

LIMIT_S = 1.5
CHAT: dict[str, Any] = {"model": "nexusgen", "messages": [{"role": "user", "content": "Draw a star."}]}


@pytest.fixture(scope="module")
def painter_and_url() -> Iterator[tuple[Painter, str]]:
    painter = Painter()
    with serving(painter, ApiSettings(request_timeout_s=LIMIT_S)) as url:
        yield painter, url


@pytest.fixture
def painter(painter_and_url: tuple[Painter, str]) -> Painter:
    fresh = Painter()
    painter_and_url[0].__dict__.update(fresh.__dict__)
    return painter_and_url[0]


@pytest.fixture
def url(painter_and_url: tuple[Painter, str]) -> str:
    return painter_and_url[1]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_chat_stream_has_role_text_pictures_reason_usage_and_end(painter: Painter, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        **CHAT, stream=True, stream_options={"include_usage": True}, extra_body={"modalities": ["text", "image"]}
    )
    chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "Here it is: done"
    (image,) = [image for delta in deltas for image in (delta.model_extra or {}).get("images", [])]
    assert (image["index"], image["type"]) == (0, "image_url")
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 5 + ["stop"]
    assert chunks[-2].system_fingerprint == INFO.fingerprint
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (7, 3)


def test_chat_stream_on_the_wire(painter: Painter, url: str) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True, "n": 2})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"]
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    bodies = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {body["choices"][0]["index"] for body in bodies} == {0, 1}
    assert all("usage" not in body for body in bodies)


def test_the_clients_own_accumulator_reads_the_stream(painter: Painter, client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**CHAT, extra_body={"modalities": ["image"]}) as stream:
        final = stream.get_final_completion()
    message = final.choices[0].message
    assert message.content == "Here it is: done"
    assert len((message.model_extra or {})["images"]) == 1
    assert final.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("edits", [False, True])
def test_picture_stream_has_every_declared_field(painter: Painter, client: openai.OpenAI, edits: bool) -> None:
    arguments: dict[str, Any] = {"prompt": "x", "stream": True, "partial_images": 2, "n": 2}
    if edits:
        events = list(client.images.edit(image=picture(), **arguments))
    else:
        events = list(client.images.generate(**arguments))
    kind = "image_edit" if edits else "image_generation"
    types = [event.type for event in events]
    assert sorted(types) == [f"{kind}.completed"] * 2 + [f"{kind}.partial_image"] * 4
    for event in events:
        type(event).model_validate(event.model_dump())  # every field that the client declares, of its type
        assert event.b64_json
    assert {e.partial_image_index for e in events if e.type.endswith("partial_image")} == {0, 1}
    assert {e.model_extra["image_index"] for e in events} == {0, 1}
    done = events[-1]
    assert (done.usage.total_tokens, done.size, done.output_format) == (14, "64x64", "png")
    assert done.model_extra["fingerprint"] == INFO.fingerprint


def test_picture_stream_in_another_format(painter: Painter, client: openai.OpenAI) -> None:
    events = list(client.images.generate(prompt="x", stream=True, partial_images=1, output_format="webp"))
    assert [event.output_format for event in events] == ["webp", "webp"]
    assert all(event.b64_json.startswith("UklG") for event in events)  # RIFF


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (orders.UnavailableError("the replica is gone"), "unavailable"),
        (RuntimeError("secret"), "internal_error"),
    ],
)
def test_failure_in_mid_stream_is_an_event(
    painter: Painter, client: openai.OpenAI, error: Exception, code: str
) -> None:
    painter.error_after = error
    stream = client.chat.completions.create(**CHAT, stream=True)
    assert next(stream).choices[0].delta.role == "assistant"
    with pytest.raises(openai.APIError) as failed:
        list(stream)
    assert failed.value.code == code
    assert "secret" not in str(failed.value)
    with pytest.raises(openai.APIError) as failed:
        list(client.images.generate(prompt="x", stream=True, partial_images=2))
    assert failed.value.code == code


@pytest.mark.parametrize("how", ["ends", "cancelled"])
def test_answer_that_is_cut_off_is_no_answer(painter: Painter, client: openai.OpenAI, how: str) -> None:
    if how == "ends":
        painter.is_lost = True
    else:
        painter.error_after = asyncio.CancelledError()  # of what the backend waits for, as when its worker is gone
    for call in (
        lambda: client.chat.completions.create(**CHAT),
        lambda: client.images.generate(prompt="x"),
    ):
        with pytest.raises(openai.InternalServerError) as cut:
            call()
        assert (cut.value.status_code, cut.value.code) == (503, "unavailable")
    with pytest.raises(openai.APIError) as event:
        list(client.chat.completions.create(**CHAT, stream=True))
    assert event.value.code == "unavailable"
    wait_until(lambda: painter.num_open == 0)


def test_time_limit_is_504_before_a_stream_and_an_event_in_it(painter: Painter, client: openai.OpenAI) -> None:
    painter.pause_s = 2 * LIMIT_S
    retrying = client.with_options(max_retries=2)
    for call in (
        lambda: retrying.chat.completions.create(**CHAT),
        lambda: retrying.chat.completions.create(**CHAT, stream=True),
        lambda: retrying.images.generate(prompt="x"),
    ):
        painter.orders.clear()
        with pytest.raises(openai.InternalServerError) as late:
            call()
        assert (late.value.status_code, late.value.code) == (504, "timeout")
        assert len(painter.orders) == 1  # the same request would be as late again
    painter.pause_s, painter.is_stuck = 0, True
    with pytest.raises(openai.APIError) as late_event:
        list(client.chat.completions.create(**CHAT, stream=True))
    assert late_event.value.code == "timeout"
    wait_until(lambda: painter.num_open == 0)


def test_the_client_comes_back_when_told_to(painter: Painter, client: openai.OpenAI) -> None:
    painter.error = orders.OverloadedError("full", retry_after_s=1)

    def make_room() -> None:
        wait_until(lambda: not pool_call.done())
        time.sleep(0.3)
        painter.error = None

    with ThreadPoolExecutor(2) as pool:
        began = time.monotonic()
        pool_call = pool.submit(client.with_options(max_retries=2).images.generate, prompt="x")
        pool.submit(make_room).result()
        assert pool_call.result().data
    assert time.monotonic() - began >= 1  # not the client's own half a second
    painter.error = orders.OverloadedError("full", retry_after_s=1)
    with pytest.raises(openai.RateLimitError):
        client.images.generate(prompt="x")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/images/generations"])
def test_work_stops_when_the_client_leaves(painter: Painter, url: str, path: str, stream: bool) -> None:
    painter.is_stuck = True
    body = {**CHAT, "stream": stream, "n": 3} if "chat" in path else {"prompt": "x", "n": 3, "stream": stream}
    content = json.dumps(body).encode()
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 0)) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        connection.sendall(head.encode() + b"\r\n\r\n" + content)
        wait_until(lambda: painter.num_open == 3)
        left = time.monotonic()
    wait_until(lambda: painter.num_open == 0)
    assert time.monotonic() - left < LIMIT_S  # not the time limit's doing
    metrics = httpx.get(f"{url}/metrics").text
    assert f'nexusgen_requests_total{{route="{path}",status="499"}}' in metrics


def test_many_clients_that_leave_leave_nothing_behind(painter: Painter, url: str) -> None:
    painter.pause_s = 0.05

    def leave_early(number: int) -> None:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            for _ in response.iter_lines():
                if number % 3 == 0:
                    break

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(leave_early, range(60)))
    wait_until(lambda: painter.num_open == 0)
    assert "nexusgen_requests_in_flight 1.0" in httpx.get(f"{url}/metrics").text  # the question itself
