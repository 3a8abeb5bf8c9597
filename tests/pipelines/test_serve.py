"""A tiny model behind a real Ray Serve, asked over HTTP: the same answers as in process, in any company, over swaps."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
import yaml
from PIL import Image
from ray import serve as ray_serve
from served_versions import add_version, cut_short, move_alias, with_editing_decoder
from servers import free_port

from nexusgen.errors import InputError, ModelError, ResourceError
from nexusgen.model.manifest import read_manifest
from nexusgen.model.weights import load_model
from nexusgen.sampling import describe, edit_images, generate_images
from pipelines import serve
from pipelines.serve import PartConfig, ServeConfig

pytestmark = pytest.mark.usefixtures("no_server")
SMALL = PartConfig(cpus=0.3, max_batch=8)


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models that can edit, with unlike weights."""
    place = tmp_path_factory.mktemp("models")
    first, second = (with_editing_decoder(base, place / str(seed), seed) for seed in (0, 1))
    assert read_manifest(first).fingerprint != read_manifest(second).fingerprint
    return first, second


@pytest.fixture(scope="module")
def config(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    """What is served: the champion of a registry whose first version it is."""
    storage = str(tmp_path_factory.mktemp("storage"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        add_version(storage, folders[0])
    return ServeConfig(
        storage=storage,
        model="models:/nexusgen@champion",
        port=free_port(),
        queue_size=24,
        ar=SMALL,
        generation_decoder=SMALL,
        editing_decoder=SMALL,
    )


@contextlib.contextmanager
def served(config: ServeConfig) -> Iterator[str]:
    """Its address, as long as the body runs. MLflow is embedded in the storage, whatever the environment says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        try:
            yield serve.start(config)
        finally:
            serve.shutdown()


@pytest.fixture(scope="module")
def url(ray_cluster: Any, config: ServeConfig) -> Iterator[str]:
    with served(config) as address:
        yield address
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{config.url}/health")


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=200)


def picture_of(response: httpx.Response, index: int = 0) -> Image.Image:
    assert response.status_code == 200, response.text
    return Image.open(io.BytesIO(base64.b64decode(response.json()["data"][index]["b64_json"])))


def assert_same_picture(ours: Image.Image, theirs: Image.Image) -> None:
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


def noise(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8))


def png_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def ask(url: str, question: str, image: Image.Image, **values: Any) -> httpx.Response:
    data = "data:image/png;base64," + base64.b64encode(png_of(image)).decode()
    content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": question}]
    body = {"model": "nexusgen", "messages": [{"role": "user", "content": content}], **values}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=200)


def edit(url: str, prompt: str, image: Image.Image, **values: Any) -> httpx.Response:
    form = {"prompt": prompt} | {name: str(value) for name, value in values.items()}
    files = {"image": ("a.png", png_of(image), "image/png")}
    return httpx.post(f"{url}/v1/images/edits", data=form, files=files, timeout=200)


def test_what_would_fail_late_is_found_first(tmp_path: Path, base: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        serve.check(ServeConfig(storage=str(tmp_path), model=str(tmp_path / "absent")))
    with pytest.raises(ModelError, match="not a model folder"):
        serve.check(ServeConfig(storage=str(tmp_path), model=str(tmp_path)))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"127.0.0.1:{port}.*another port"):
            serve.check(ServeConfig(storage=str(tmp_path), model=str(base), port=port))


def test_a_port_that_is_taken_meanwhile_is_named_and_nothing_half_started_is_left(
    ray_cluster: Any, config: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left would keep the next start, which is that of all tests below, from listening anywhere."""
    port = free_port()
    monkeypatch.setattr(serve, "check", lambda config: None)  # it has looked too early
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(ResourceError, match=f"cannot listen on 127.0.0.1:{port}.*another port"):
            serve.start(config.model_copy(update={"port": port}))


def test_pictures_and_answers_equal_those_of_the_commands(url: str, folders: tuple[Path, Path]) -> None:
    """Alone, and each in the company of all the others, at other steps and seeds."""
    model, image = load_model(folders[0]), noise()
    prompts = [f"a {colour} circle" for colour in ("red", "green", "blue")]
    with ThreadPoolExecutor(16) as pool:
        drawn = [
            pool.submit(post, url, prompt=prompt, seed=5, steps=steps, n=2) for prompt in prompts for steps in (2, 3)
        ]
        edited = [pool.submit(edit, url, f"{prompt} instead", image, seed=7, steps=2) for prompt in prompts]
        said = [pool.submit(ask, url, f"Is it {prompt}?", image, max_tokens=8) for prompt in prompts]
    for call, (prompt, steps) in zip(drawn, [(p, s) for p in prompts for s in (2, 3)], strict=True):
        response = call.result()
        for index, expected in enumerate(generate_images(model, [prompt] * 2, [5, 6], steps=steps)):
            assert_same_picture(picture_of(response, index), expected)
        made = json.loads(picture_of(response, 1).text["nexusgen"])
        assert (made["seed"], made["steps"], made["version"]) == (6, steps, "1")
        assert made["fingerprint"] == read_manifest(folders[0]).fingerprint
    for call, prompt in zip(edited, prompts, strict=True):
        (expected,) = edit_images(model, [image], [f"{prompt} instead"], [7], steps=2)
        assert_same_picture(picture_of(call.result()), expected)
    for call, prompt in zip(said, prompts, strict=True):
        answer = call.result().json()["choices"][0]["message"]["content"]
        assert answer.strip() == describe(model, [image], [f"Is it {prompt}?"], max_new_tokens=8)[0]


def mixture(url: str, number: int) -> str | bytes:
    """What one of some unlike requests is answered with: a text, or the bytes of a picture."""
    kind, image = number % 3, noise(number % 5)
    if kind == 0:
        return picture_of(post(url, prompt=f"thing {number}", seed=number, steps=24 + number % 8)).tobytes()
    if kind == 1:
        return picture_of(edit(url, f"thing {number}", image, seed=number, steps=24 + number % 8)).tobytes()
    # Not a question that the demo's base knows: of this it talks on.
    values = {"max_tokens": 8 + number % 16, "temperature": number % 2, "seed": number}
    answer = ask(url, f"Describe picture {number}.", image, **values)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def mean_batch(url: str, before: dict[str, float] | None = None) -> dict[str, float]:
    """Rows and steps of each deployment so far; or since `before`, the mean rows of a step."""
    totals: Counter[str] = Counter()
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        for what in ("batch_rows", "steps"):
            if line.startswith(f"nexusgen_engine_{what}_total{{"):
                deployment = line.partition('deployment="')[2].partition('"')[0]
                totals[f"{deployment} {what}"] += float(line.rpartition(" ")[2])
    if before is None:
        return dict(totals)
    since = {name: total - before.get(name, 0) for name, total in totals.items()}
    parts = {name.partition(" ")[0] for name in since}
    return {part: since[f"{part} batch_rows"] / since[f"{part} steps"] for part in parts if since[f"{part} steps"]}


def assert_same_in_company(url: str, count: int, tolerance: int, least_batch: float) -> None:
    """Answers alone and in the company of all others; pixels may differ by so much, texts not at all.

    In company a step of each deployment takes at least so many requests further, on average.
    """
    alone = [mixture(url, number) for number in range(count)]
    order = random.Random(0).sample(range(count), count)
    before = mean_batch(url)
    with ThreadPoolExecutor(24) as pool:
        together = dict(zip(order, pool.map(lambda number: mixture(url, number), order), strict=True))
    batches = mean_batch(url, before)
    print(f"mean requests of a step: {batches}")
    assert len(batches) == 3
    assert min(batches.values()) >= least_batch, batches
    for number, expected in enumerate(alone):
        found = together[number]
        if isinstance(expected, str) or isinstance(found, str):
            assert found == expected
        else:
            ours, theirs = (np.frombuffer(pixels, np.uint8).astype(int) for pixels in (found, expected))
            assert np.abs(ours - theirs).max() <= tolerance


def test_a_hundred_answers_in_random_company_are_those_alone(url: str) -> None:
    assert_same_in_company(url, 100, tolerance=1, least_batch=3)


def test_health_and_models_name_what_is_loaded(url: str, folders: tuple[Path, Path]) -> None:
    fingerprint = read_manifest(folders[0]).fingerprint
    health = httpx.get(f"{url}/health")
    assert (health.status_code, health.json()["fingerprint"]) == (200, fingerprint)
    (listed,) = httpx.get(f"{url}/v1/models").json()["data"]
    assert (listed["id"], listed["version"], listed["fingerprint"]) == ("nexusgen", "1", fingerprint)


def test_a_chat_streams_and_draws(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="nexusgen",
            messages=[{"role": "user", "content": "Draw a red circle."}],
            stream=True,
            extra_body={"modalities": ["image"], "seed": 3, "steps": 2},
        )
        chunks = [chunk for chunk in stream if chunk.choices]
    images = [image for chunk in chunks for image in getattr(chunk.choices[0].delta, "images", None) or []]
    assert len(images) == 1
    assert images[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_overload_is_shed_and_the_rest_served(url: str) -> None:
    with ThreadPoolExecutor(60) as pool:
        calls = [pool.submit(post, url, prompt="a blue square", seed=seed, steps=20) for seed in range(60)]
        responses = [call.result() for call in calls]
    statuses = Counter(response.status_code for response in responses)
    assert set(statuses) == {200, 429}
    assert statuses[200] >= 24  # so many are inside at any time
    for response in responses:
        if response.status_code == 429:
            assert response.json()["error"]["type"] == "rate_limit_error"
            assert int(response.headers["retry-after"]) >= 1


def replica_pids(name: str) -> list[int]:
    """Processes of a deployment's replicas."""
    marks = f"ServeReplica:{serve.APP_NAME}:{name}"
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any(marks in part for part in process.info["cmdline"] or [])
    ]


def wait_until(is_so: Any, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it doesn't come about"
        time.sleep(0.2)


def test_who_goes_away_stops_the_work(url: str) -> None:
    """A picture of a thousand steps would keep the decoder for long; the next one comes at once."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{url}/v1/images/generations",
            json={"prompt": "a circle", "steps": 200, "n": 4},
            timeout=httpx.Timeout(1.0),
        )
    began = time.monotonic()
    assert post(url, prompt="a circle", steps=1).status_code == 200
    assert time.monotonic() - began < 10

    def is_idle() -> bool:
        text = httpx.get(f"{url}/metrics").text
        inside = [line for line in text.splitlines() if line.startswith("nexusgen_requests_inside")]
        return bool(inside) and float(inside[0].rpartition(" ")[2]) == 0

    wait_until(is_idle, 20)


def test_the_alias_moves_without_a_lost_request_and_a_bad_version_changes_nothing(
    url: str, config: ServeConfig, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = (read_manifest(folder).fingerprint for folder in folders)
    statuses: Counter[tuple[int, str]] = Counter()
    is_over = threading.Event()

    def keep_asking(number: int) -> None:
        rng = random.Random(number)
        while not is_over.is_set():
            response = post(url, prompt="a circle", steps=rng.randint(1, 3), seed=number)
            made = response.json().get("fingerprint", "")
            statuses[response.status_code, made] += 1

    def loaded() -> str:
        return str(httpx.get(f"{url}/v1/models").json()["data"][0]["fingerprint"])

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(keep_asking, number) for number in range(4)]
        try:
            version = add_version(config.storage, folders[1])
            wait_until(lambda: loaded() == second)
            wait_until(lambda: statuses[200, second] >= 4)

            # A version whose weights are cut short: it is told, and the old one stays.
            corrupt = cut_short(with_editing_decoder(folders[0], tmp_path / "corrupt", 2))
            move_alias(config.storage, add_version(config.storage, corrupt))
            wait_until(lambda: refused(url).startswith("models:/nexusgen/3: ar: "))
            assert httpx.get(f"{url}/health").json()["refused"] == "models:/nexusgen/3"
            assert loaded() == second
            move_alias(config.storage, "1")
            wait_until(lambda: loaded() == first)
            wait_until(lambda: refused(url) == "")
            assert version == "2"
        finally:
            is_over.set()
        for client in clients:
            client.result()
    assert {status for status, _ in statuses} == {200}
    assert {made for _, made in statuses} == {first, second}


def refused(url: str) -> str:
    """What is said of a version that can't be served; strangers, who see /health, learn only which one it is."""
    return str(httpx.get(f"{url}/v1/models").json()["data"][0]["refused"])


def is_drawing(url: str) -> bool:
    """Whether requests are in the generation decoder."""
    present = 'nexusgen_engine_requests_present{deployment="generation_decoder"'
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return any(line.startswith(present) and float(line.rpartition(" ")[2]) > 0 for line in lines)


def test_a_killed_replica_costs_its_own_requests_and_comes_back(url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(post, url, prompt="a circle", seed=seed, steps=200) for seed in range(4)]
        wait_until(lambda: is_drawing(url))
        for pid in replica_pids("generation_decoder"):
            os.kill(pid, signal.SIGKILL)
        statuses = {call.result().status_code for call in calls}
    assert statuses <= {200, 503}
    assert 503 in statuses
    wait_until(lambda: post(url, prompt="a circle", steps=1).status_code == 200)


def test_the_written_configuration_is_the_application(config: ServeConfig, tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    written = yaml.safe_load(serve.serve_config(config))
    schema = ServeDeploySchema.model_validate(written)
    assert schema.http_options.port == config.port
    (application,) = schema.applications
    assert application.import_path == "pipelines.serve:build_app"
    assert ServeConfig.model_validate(application.args) == config
    assert serve.build_app(application.args) is not None


def deploy_anew(config: ServeConfig, **values: Any) -> None:
    """The application with other settings, on the same door."""
    changed = config.model_copy(update=values).model_dump(mode="json")
    ray_serve.run(serve.build_app(changed), name=serve.APP_NAME, route_prefix="/")


def test_deterministic_answers_have_the_same_bits_in_any_company(url: str, config: ServeConfig) -> None:
    deploy_anew(config, deterministic=True)
    assert_same_in_company(url, 30, tolerance=0, least_batch=1.2)


def test_a_canary_takes_its_share_and_versions_have_names(
    url: str, config: ServeConfig, folders: tuple[Path, Path]
) -> None:
    first, second = (read_manifest(folder).fingerprint for folder in folders)
    move_alias(config.storage, "1")
    deploy_anew(config, canary="models:/nexusgen/2", canary_share=0.4, also=("models:/nexusgen/1",))
    assert [(one["id"], one["version"]) for one in httpx.get(f"{url}/v1/models").json()["data"]] == [
        ("nexusgen", "1"), ("nexusgen/2", "2"), ("nexusgen/1", "1"),
    ]  # fmt: skip

    def made_by(model: str | None, count: int) -> Counter[str]:
        named = {} if model is None else {"model": model}
        responses = [post(url, prompt="a circle", steps=1, seed=seed, **named) for seed in range(count)]
        return Counter(response.json()["fingerprint"] for response in responses)

    shared = made_by(None, 60)
    assert set(shared) == {first, second}
    assert 8 <= shared[second] <= 42  # 24 are expected, with a standard deviation of 3.8
    for seed in range(10):  # all pictures of a request are of the version that the answer names
        answer = post(url, prompt="a circle", steps=1, seed=seed, n=3)
        makers = {json.loads(picture_of(answer, number).text["nexusgen"])["fingerprint"] for number in range(3)}
        assert makers == {answer.json()["fingerprint"]}
    assert made_by("nexusgen/2", 6) == {second: 6}
    assert made_by("nexusgen/1", 6) == {first: 6}
    unknown = post(url, prompt="a circle", model="nexusgen/9")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_a_swap_in_place_makes_requests_wait_and_fails_none(
    url: str, config: ServeConfig, folders: tuple[Path, Path]
) -> None:
    """For want of memory the old version goes before the new one comes."""
    second = read_manifest(folders[1]).fingerprint
    move_alias(config.storage, "1")
    deploy_anew(config, swap="in_place")
    statuses: Counter[int] = Counter()
    is_over = threading.Event()

    def keep_asking() -> None:
        while not is_over.is_set():
            statuses[post(url, prompt="a circle", steps=2).status_code] += 1

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(keep_asking) for _ in range(3)]
        try:
            move_alias(config.storage, "2")
            wait_until(lambda: httpx.get(f"{url}/health").json().get("fingerprint") == second)
        finally:
            is_over.set()
        for client in clients:
            client.result()
    assert set(statuses) == {200}


def test_a_server_that_ends_lets_those_inside_finish_and_nobody_in(url: str, config: ServeConfig) -> None:
    """The last test: the door stays closed."""
    with ThreadPoolExecutor(5) as pool:
        inside = [pool.submit(post, url, prompt="a circle", seed=seed, steps=60) for seed in range(4)]
        wait_until(lambda: "nexusgen_requests_inside 4.0" in httpx.get(f"{url}/metrics").text, 20)
        draining = pool.submit(serve.drain, config)
        wait_until(lambda: post(url, prompt="a circle", steps=1).status_code == 503, 20)
        assert [call.result().status_code for call in inside] == [200] * 4
        draining.result(timeout=20)
    assert "about to end" in post(url, prompt="a circle").json()["error"]["message"]
