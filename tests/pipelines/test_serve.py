"""The replica's queue, in process; and a tiny model behind a real Ray Serve, asked over HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from pydantic import ValidationError
from servers import free_port
from tiny_training import make_tiny_model

from nexusgen.errors import InputError, ModelError, ResourceError
from nexusgen.model.manifest import read_manifest
from nexusgen.model.weights import load_model
from nexusgen.sampling import generate_images
from pipelines import orders, serve
from pipelines.serve import BatchQueue, DrawTask, ServeConfig

INFO = orders.ModelInfo("nexusgen", None, "f", parts=(), image_size=(64, 64), steps=4, loaded_at=0)


def task(number: int, steps: int = 4) -> DrawTask:
    return DrawTask(f"prompt {number}", seed=number, steps=steps, size=(64, 64))


class SlowDraw:
    """Remembers its batches; the first waits until it is released, so that others gather."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.may_go_on = threading.Event()

    def __call__(self, tasks: list[DrawTask]) -> list[orders.Drawing]:
        self.batches.append([task.seed for task in tasks])
        self.may_go_on.wait(10)
        if any(task.seed == 13 for task in tasks):
            raise InputError("thirteen")
        return [orders.Drawing(b"png", INFO, task.seed, task.steps, task.size) for task in tasks]


def test_tasks_gather_while_a_batch_is_drawn() -> None:
    draw = SlowDraw()

    async def scenario() -> list[orders.Drawing]:
        queue = BatchQueue(draw, max_batch=3)
        first = asyncio.create_task(queue.submit(task(0)))
        await asyncio.sleep(0.05)
        others = [asyncio.create_task(queue.submit(task(number, 4 if number != 3 else 9))) for number in range(1, 7)]
        await asyncio.sleep(0.05)
        draw.may_go_on.set()
        return await asyncio.gather(first, *others)

    drawings = asyncio.run(scenario())
    assert [drawing.seed for drawing in drawings] == list(range(7))
    # Full batches in order of arrival; the one with other steps is drawn apart when its turn has come.
    assert draw.batches == [[0], [1, 2, 4], [3], [5, 6]]


def test_a_cancelled_task_is_not_drawn() -> None:
    draw = SlowDraw()

    async def scenario() -> None:
        queue = BatchQueue(draw, max_batch=3)
        first = asyncio.create_task(queue.submit(task(0)))
        await asyncio.sleep(0.05)
        gone, stays = asyncio.create_task(queue.submit(task(1))), asyncio.create_task(queue.submit(task(2)))
        await asyncio.sleep(0.05)
        gone.cancel()
        draw.may_go_on.set()
        await asyncio.gather(first, stays)

    asyncio.run(scenario())
    assert draw.batches == [[0], [2]]


def test_a_failing_task_does_not_fail_its_company() -> None:
    draw = SlowDraw()
    draw.may_go_on.set()

    async def scenario() -> list[orders.Drawing | BaseException]:
        queue = BatchQueue(draw, max_batch=8)
        return await asyncio.gather(*(queue.submit(task(number)) for number in (12, 13, 14)), return_exceptions=True)

    before, failed, after = asyncio.run(scenario())
    assert isinstance(before, orders.Drawing)
    assert isinstance(failed, InputError)
    assert isinstance(after, orders.Drawing)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder with random weights."""
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def test_what_would_fail_late_is_found_first(tmp_path: Path, model: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        serve.check(ServeConfig(storage=str(tmp_path), model=str(tmp_path / "absent")))
    with pytest.raises(ModelError, match="not a model folder"):
        serve.check(ServeConfig(storage=str(tmp_path), model=str(tmp_path)))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"127.0.0.1:{port}.*another port"):
            serve.check(ServeConfig(storage=str(tmp_path), model=str(model), port=port))


def test_hosts_of_pictures_are_hosts(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ValidationError, match=r"allowed_image_hosts[\s\S]*http://example\.org.*wanted HOST"):
        ServeConfig(storage=str(tmp_path), model=str(model), allowed_image_hosts=["http://example.org"])


@pytest.fixture(scope="module")
def url(ray_cluster: Any, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = ServeConfig(
        storage=str(tmp_path_factory.mktemp("storage")),
        model=str(model),
        port=free_port(),
        max_batch=4,
        queue_size=4,
        replica_cpus=0.5,
    )
    yield serve.start(config)
    serve.shutdown()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{config.url}/health")


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=200)


def picture_of(response: httpx.Response, index: int = 0) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(response.json()["data"][index]["b64_json"])))


def test_picture_over_http_equals_that_of_generate(url: str, model: Path) -> None:
    prompt = "a red circle"
    response = post(url, prompt=prompt, seed=5, steps=3, n=2)
    assert response.status_code == 200, response.text
    expected = generate_images(load_model(model), [prompt] * 2, [5, 6], steps=3)
    for index in range(2):
        difference = np.asarray(picture_of(response, index), int) - np.asarray(expected[index], int)
        assert np.abs(difference).max() <= 1
    made = json.loads(picture_of(response, 1).text["nexusgen"])
    assert (made["seed"], made["steps"]) == (6, 3)
    assert made["fingerprint"] == read_manifest(model).fingerprint == response.json()["fingerprint"]


def test_health_names_the_loaded_model(url: str, model: Path) -> None:
    response = httpx.get(f"{url}/health")
    assert response.status_code == 200
    assert response.json()["fingerprint"] == read_manifest(model).fingerprint


def test_errors_arrive_in_openais_shape(url: str) -> None:
    too_long = post(url, prompt="x" * 100_000)
    assert too_long.status_code == 400
    assert too_long.json()["error"]["code"] == "string_above_max_length"
    unknown = post(url, prompt="x", qualiti="high")
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "qualiti")


def test_overload_is_shed_and_the_rest_served(url: str) -> None:
    with ThreadPoolExecutor(32) as pool:
        calls = [pool.submit(post, url, prompt="a blue square", seed=seed, steps=20) for seed in range(32)]
        responses = [call.result() for call in calls]
    statuses = {response.status_code for response in responses}
    assert statuses == {200, 429}  # 8 are at work and 4 wait at any time
    for response in responses:
        if response.status_code == 429:
            assert response.json()["error"]["type"] == "rate_limit_error"
            assert int(response.headers["retry-after"]) >= 1


def test_openai_client_reads_the_answer(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.images.generate(
            prompt="a red circle", model="nexusgen", n=1, extra_body={"seed": 1, "steps": 2}
        )
        assert answer.data[0].b64_json
        with pytest.raises(openai.BadRequestError) as refused:
            client.images.generate(prompt="a red circle", size="1x1")
    assert refused.value.param == "size"
