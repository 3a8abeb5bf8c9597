"""A rolling swap: one replica after another changes its version, under load, with room for one version in each."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from served_versions import add_version, cut_short, move_alias, with_editing_decoder
from servers import free_port
from test_serve import assert_same_picture, picture_of, post, refused, served, wait_until
from tiny_training import make_tiny_model

from nexusgen.config import parse_config
from nexusgen.errors import ConfigError
from nexusgen.model.manifest import read_manifest
from nexusgen.model.weights import load_model
from nexusgen.sampling import generate_images
from pipelines.serve import PartConfig, ServeConfig

pytestmark = pytest.mark.usefixtures("no_server")
TWO = PartConfig(replicas=2, cpus=0.2, max_batch=4)
PARTS = ("ar", "generation_decoder", "editing_decoder")


def test_each_deployment_needs_a_second_replica() -> None:
    values = {"storage": "s", "model": "demo-base", "swap": "rolling", "ar": {"replicas": 2}}
    with pytest.raises(ConfigError, match=r"swap=rolling: generation_decoder, editing_decoder may have one replica"):
        parse_config(ServeConfig, values, "x")


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models all of whose parts are unlike, so that a picture tells which version's parts made it."""
    place = tmp_path_factory.mktemp("models")
    other = make_tiny_model(place / "other", seed=1)
    return [with_editing_decoder(one, place / name) for one, name in ((base, "first"), (other, "second"))]


@pytest.fixture(scope="module")
def config(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    storage = str(tmp_path_factory.mktemp("storage"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        add_version(storage, folders[0])
    parts = dict.fromkeys(PARTS, TWO)
    return ServeConfig(storage=storage, model="models:/nexusgen@champion", port=free_port(), swap="rolling", **parts)


@pytest.fixture(scope="module")
def url(ray_cluster: Any, config: ServeConfig) -> Iterator[str]:
    with served(config) as address:
        yield address


def weights_of_replicas(url: str) -> dict[str, float]:
    """Bytes of weights by replica."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    found = [line for line in lines if line.startswith("nexusgen_weight_bytes{")]
    return {line.partition(" ")[0]: float(line.rpartition(" ")[2]) for line in found}


@pytest.mark.timeout(900)
def test_no_request_fails_or_mixes_versions_while_replicas_change_one_by_one(
    url: str, config: ServeConfig, folders: list[Path], tmp_path: Path
) -> None:
    first, second = fingerprints = [read_manifest(folder).fingerprint for folder in folders]
    expected = {
        fingerprint: generate_images(load_model(folder), ["a circle"] * 6, list(range(6)), steps=2)
        for fingerprint, folder in zip(fingerprints, folders, strict=True)
    }
    before = weights_of_replicas(url)
    assert len(before) == 6
    made: list[tuple[int, str, int]] = []  # of each request: status, fingerprint, pictures
    peaks = dict(before)
    is_over = threading.Event()

    def keep_asking(number: int) -> None:
        rng = random.Random(number)
        while not is_over.is_set():
            seed, count = rng.randrange(5), 1 + number % 2
            response = post(url, prompt="a circle", steps=2, seed=seed, n=count)
            fingerprint = str(response.json().get("fingerprint", response.text))
            made.append((response.status_code, fingerprint, count))
            if response.status_code == 200:
                for index in range(count):  # of one version, from the language model to the pixels
                    picture = picture_of(response, index)
                    assert json.loads(picture.text["nexusgen"])["fingerprint"] == fingerprint
                    assert_same_picture(picture, expected[fingerprint][seed + index])

    def watch_memory() -> None:
        while not is_over.is_set():
            for replica, num_bytes in weights_of_replicas(url).items():
                peaks[replica] = max(peaks.get(replica, 0), num_bytes)
            time.sleep(0.3)

    def loaded() -> str:
        return str(httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["fingerprint"])

    def more(fingerprint: str) -> None:
        """Until the clients have had some more answers."""
        count = len(made)
        wait_until(lambda: sum(one[1] == fingerprint for one in made[count:]) >= 20, 300)

    with ThreadPoolExecutor(5) as pool:
        clients = [pool.submit(keep_asking, number) for number in range(4)]
        clients.append(pool.submit(watch_memory))
        try:
            more(first)
            add_version(config.storage, folders[1])  # the alias points to it
            wait_until(lambda: loaded() == second, 300)
            more(second)
            move_alias(config.storage, "1")
            wait_until(lambda: loaded() == first, 300)
            more(first)

            corrupt = cut_short(with_editing_decoder(folders[1], tmp_path / "corrupt", 2))
            add_version(config.storage, corrupt)
            wait_until(lambda: refused(url).startswith("models:/nexusgen/3: ar: "), 300)
            assert httpx.get(f"{url}/health", timeout=60).json()["refused"] == "models:/nexusgen/3"
            assert loaded() == first
            more(first)
        finally:
            is_over.set()
        for client in clients:
            client.result()
    print(Counter(made))
    assert {status for status, _, _ in made} == {200}
    assert {one[1:] for one in made} == {(fingerprint, count) for fingerprint in fingerprints for count in (1, 2)}
    move_alias(config.storage, "2")
    wait_until(lambda: loaded() == second, 300)
    wait_until(lambda: weights_of_replicas(url) == before, 120)
    assert peaks == before  # none had two
