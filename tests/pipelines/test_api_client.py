"""A tiny model behind a real Ray Serve, asked by the real openai client: every call, and what the answers equal."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from api_server import make_editor, picture, serving
from PIL import Image
from servers import free_port

from benchmarks.local_backend import LocalBackend
from nexusgen.images import decode_image
from nexusgen.model.weights import Model, load_model
from nexusgen.replies import SamplingParams
from nexusgen.sampling import edit_images, generate_images, respond
from nexusgen.schema import Message
from pipelines import serve
from pipelines.serve import PartConfig, ServeConfig

SETTINGS = {"seed": 5, "steps": 3}
DRAW: list[Any] = [{"role": "user", "content": "Draw a large red circle."}]
QUEUE_SIZE = 8
NODE = Path(__file__).parent / "openai_smoke.mjs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_editor(tmp_path_factory.mktemp("editor") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder)


@pytest.fixture(scope="module")
def url(ray_cluster: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    part = PartConfig(cpus=0.3)
    yield serve.start(
        ServeConfig(
            storage=str(tmp_path_factory.mktemp("storage")),
            model=str(folder),
            port=free_port(),
            queue_size=QUEUE_SIZE,
            ar=part,
            generation_decoder=part,
            editing_decoder=part,
        )
    )
    serve.shutdown()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def pixels(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"), int)


def pixels_of(image: dict[str, Any]) -> np.ndarray:
    return pixels(image["image_url"]["url"].removeprefix("data:image/png;base64,"))


def image_part(data: bytes) -> dict[str, Any]:
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": uri}}


def test_models(client: openai.OpenAI, model: Model) -> None:
    (listed,) = client.models.list().data
    assert listed.id == "nexusgen"
    assert client.models.retrieve("nexusgen").model_extra["fingerprint"] == model.manifest.fingerprint
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_pictures_equal_those_of_generate(client: openai.OpenAI, model: Model) -> None:
    answer = client.images.generate(prompt="a red circle", model="nexusgen", n=2, size="64x96", extra_body=SETTINGS)
    expected = generate_images(model, ["a red circle"] * 2, [5, 6], steps=3, size=(96, 64))
    assert answer.data is not None
    for image, wanted in zip(answer.data, expected, strict=True):
        assert np.abs(pixels(image.b64_json or "") - np.asarray(wanted, int)).max() <= 1
    assert answer.size == "64x96"
    assert answer.usage is not None
    assert answer.usage.output_tokens == 2 * model.manifest.geometry.num_target_tokens


def test_partial_pictures_come_nearer_to_the_picture(client: openai.OpenAI) -> None:
    events = list(
        client.images.generate(prompt="a red circle", stream=True, partial_images=3, extra_body={"seed": 5, "steps": 8})
    )
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * 3 + ["completed"]
    end = pixels(events[-1].b64_json)
    distances = [np.abs(pixels(event.b64_json) - end).mean() for event in events]
    assert distances[0] > distances[1] > distances[2] > 0


def test_edits_equal_those_of_edit(client: openai.OpenAI, model: Model) -> None:
    white = picture("white")
    answer = client.images.edit(image=("x.png", white), prompt="Make it red.", extra_body=SETTINGS)
    expected = edit_images(model, [decode_image(white)], ["Make it red."], [5], steps=3)[0]
    assert answer.data is not None
    assert np.abs(pixels(answer.data[0].b64_json or "") - np.asarray(expected, int)).max() <= 1
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.image_tokens > 0


def test_edit_of_two_pictures_streams(client: openai.OpenAI) -> None:
    images = [("a.png", picture("white")), ("b.png", picture("black"))]
    one = client.images.edit(image=images[:1], prompt="Join them.", extra_body=SETTINGS)
    events = list(
        client.images.edit(image=images, prompt="Join them.", stream=True, partial_images=1, extra_body=SETTINGS)
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert one.usage is not None
    assert events[-1].usage.input_tokens_details.image_tokens == 2 * one.usage.input_tokens_details.image_tokens


def test_chat_text_equals_respond(client: openai.OpenAI, model: Model) -> None:
    content = [image_part(picture("red")), {"type": "text", "text": "Which colour is it?"}]
    answer = client.chat.completions.create(model="nexusgen", messages=[{"role": "user", "content": content}])
    pieces = list(respond(model, [Message("user", "<image>\nWhich colour is it?")], [decode_image(picture("red"))]))
    reply = pieces[-1].reply
    assert reply is not None
    assert answer.choices[0].message.content == "".join(reply.texts)
    assert answer.choices[0].finish_reason == reply.finish_reason
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(reply.token_ids)


def test_chat_options_reach_the_model(client: openai.OpenAI, model: Model) -> None:
    warm = {"temperature": 1.5, "top_p": 0.9, "seed": 3, "max_tokens": 6}
    answer = client.chat.completions.create(model="nexusgen", messages=DRAW, n=2, **warm)
    for index, choice in enumerate(answer.choices):
        params = SamplingParams(max_new_tokens=6, temperature=1.5, top_p=0.9, seed=3 + index)
        reply = list(respond(model, [Message("user", DRAW[0]["content"])], params=params))[-1].reply
        assert reply is not None
        assert choice.message.content == "".join(reply.texts)
    cut = client.chat.completions.create(model="nexusgen", messages=DRAW, max_completion_tokens=1)
    assert cut.choices[0].finish_reason == "length"
    whole = answer.choices[0].message.content or ""
    stop = whole[2:4]
    assert stop
    stopped = client.chat.completions.create(model="nexusgen", messages=DRAW, stop=[stop], **warm)
    assert stopped.choices[0].message.content == whole[: whole.index(stop)]


def test_forced_picture_equals_that_of_generate(client: openai.OpenAI, model: Model) -> None:
    body = {"modalities": ["image"], "steps": 3, "size": "64x64"}
    answer = client.chat.completions.create(model="nexusgen", messages=DRAW, seed=5, extra_body=body)
    (image,) = answer.choices[0].message.model_extra["images"]
    expected = generate_images(model, [DRAW[0]["content"]], [5], steps=3, size=(64, 64))[0]
    assert np.abs(pixels_of(image) - np.asarray(expected, int)).max() <= 1


def test_conversation_goes_on_from_an_earlier_picture(client: openai.OpenAI, model: Model) -> None:
    body = {"modalities": ["image"], "steps": 2}
    stream = client.chat.completions.create(model="nexusgen", messages=DRAW, seed=5, stream=True, extra_body=body)
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    images = [image for chunk in chunks for image in (chunk.choices[0].delta.model_extra or {}).get("images", [])]
    assert images, text
    earlier = {"role": "assistant", "content": text, "images": images}
    question = {"role": "user", "content": "What did you draw?"}
    answer = client.chat.completions.create(model="nexusgen", messages=[*DRAW, earlier, question])
    offset = images[0]["offset"]
    said = Message("assistant", f"{text[:offset]}<image>{text[offset:]}")
    messages = [Message("user", DRAW[0]["content"]), said, Message("user", question["content"])]
    reply = list(respond(model, messages))[-1].reply
    assert reply is not None
    assert answer.choices[0].message.content == "".join(reply.texts)


def test_picture_given_in_the_last_message_is_edited(client: openai.OpenAI, model: Model) -> None:
    content = [image_part(picture("white")), {"type": "text", "text": "Make it red."}]
    body = {"modalities": ["image"], "steps": 3}
    answer = client.chat.completions.create(
        model="nexusgen", messages=[{"role": "user", "content": content}], seed=5, extra_body=body
    )
    (image,) = answer.choices[0].message.model_extra["images"]
    expected = edit_images(model, [decode_image(picture("white"))], ["Make it red."], [5], steps=3)[0]
    assert np.abs(pixels_of(image) - np.asarray(expected, int)).max() <= 1


def test_errors_have_the_clients_own_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="size") as refused:
        client.images.generate(prompt="x", size="17x17")  # type: ignore[call-overload]
    assert (refused.value.param, refused.value.type) == ("size", "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        client.chat.completions.create(model="gpt-5", messages=DRAW)
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        client.chat.completions.create(model="nexusgen", messages=DRAW, logit_bias={"1": 1})


def test_a_client_that_waits_too_short_gives_up_and_the_next_one_is_served(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).images.generate(prompt="x", n=4, extra_body={"steps": 200})
    assert client.images.generate(prompt="x", extra_body={"steps": 1}).data


def test_clients_that_are_refused_come_again_until_they_are_served(client: openai.OpenAI) -> None:
    """Four times as many as there is room for."""

    def draw(seed: int, max_retries: int) -> str:
        """Nothing, or how long to wait."""
        patient = client.with_options(max_retries=max_retries)
        try:
            assert patient.images.generate(prompt="a star", extra_body={"seed": seed, "steps": 20}).data
        except openai.RateLimitError as error:
            return error.response.headers["retry-after"]
        return ""

    with ThreadPoolExecutor(4 * QUEUE_SIZE) as pool:
        waits = list(pool.map(lambda seed: draw(seed, 0), range(4 * QUEUE_SIZE)))
        assert "" in waits
        assert min(int(wait) for wait in waits if wait) >= 1  # and somebody was refused
        assert not any(pool.map(lambda seed: draw(seed, 50), range(4 * QUEUE_SIZE)))


def test_model_without_an_editing_decoder_says_so(base: Path) -> None:
    with serving(LocalBackend(base)) as url:
        response = httpx.post(f"{url}/v1/images/edits", files={"image": picture()}, data={"prompt": "x"}, timeout=60)
    assert response.status_code == 400
    assert "editing decoder" in response.json()["error"]["message"]


def replica_bytes() -> int:
    """Memory of all replicas."""
    sizes = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if any(f"ServeReplica:{serve.APP_NAME}" in part for part in process.info["cmdline"] or []):
                sizes.append(process.memory_info().rss)
    assert len(sizes) >= 4
    return sum(sizes)


def test_broken_images_are_refused_with_a_reason_or_used_and_others_go_on(
    url: str, client: openai.OpenAI, test_data: Path
) -> None:
    """Meanwhile another client is served as ever."""
    paths = sorted((test_data / "data" / "broken" / "images").iterdir())
    assert paths
    is_over = threading.Event()

    def draw_on() -> int:
        count = 0
        while not is_over.is_set():
            assert client.images.generate(prompt="a star", extra_body={"seed": 1, "steps": 2}).data  # no retries
            count += 1
        return count

    def send(http: httpx.Client, path: Path) -> int:
        data = path.read_bytes()
        uri = f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"
        content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "What is it?"}]
        chat = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        answers = [
            http.post("/v1/images/edits", files={"image": data}, data={"prompt": "x", "steps": "1"}),
            http.post("/v1/chat/completions", json=chat),
        ]
        for answer in answers:
            assert answer.status_code in (200, 400), (path.name, answer.text[:300])
            if answer.status_code == 400:
                assert answer.json()["error"]["message"]
        assert answers[0].status_code == answers[1].status_code, path.name
        return answers[0].status_code

    with httpx.Client(base_url=url, timeout=120) as http, ThreadPoolExecutor(1) as pool:
        others = pool.submit(draw_on)
        statuses = {send(http, path) for path in paths}
        used_bytes = replica_bytes()
        for path in paths:
            send(http, path)
        grown = replica_bytes() - used_bytes
        is_over.set()
        assert others.result() > 1
        assert http.get("/health").status_code == 200
    assert statuses == {200, 400}
    assert grown < 100 << 20  # the largest takes 200 MB once decoded; a second round leaves nothing behind


def test_node_client(url: str, tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    shutil.copy(NODE, tmp_path)
    command = ["npm", "install", "--no-audit", "--no-fund", "--silent", "openai@6"]
    try:
        subprocess.run(command, cwd=tmp_path, check=True, timeout=120, capture_output=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm can't install openai: {type(error).__name__}")
    result = subprocess.run(
        ["node", NODE.name, f"{url}/v1"], cwd=tmp_path, timeout=120, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["models"] == ["nexusgen"]
    assert told["pictures"] == told["edits"] == 1
    assert told["streamed"] == ["image_generation.partial_image", "image_generation.completed"]
    assert told["text"] == told["streamedText"]
    assert told["finish"] == "stop"
    assert told["images"] == 1
    assert (told["refusedStatus"], told["refusedParam"]) == (400, "size")
