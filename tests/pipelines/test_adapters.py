"""Versions registered with `adapter=keep`, served on one copy of their base: answers, memory, versions that change."""

from __future__ import annotations

import asyncio
import io
import itertools
import random
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from served_versions import move_alias, with_editing_decoder
from servers import free_port
from test_lora import FAST, train_followed
from test_serve import SMALL, assert_same_picture, picture_of, post, replica_pids, served, wait_until
from test_train import make_config
from tiny_training import HIDDEN_SIZE

from nexusgen.errors import FingerprintError
from nexusgen.model.manifest import read_manifest
from nexusgen.model.weights import assemble_model, load_model
from nexusgen.sampling import generate_images
from nexusgen.schema import Message
from pipelines import registry
from pipelines.engines import DrawRequest, Predicted
from pipelines.lora import ADAPTER_FILE, AdapterRecord, merge_file
from pipelines.orders import ChatOrder, ModelInfo, PictureOrder, PictureSettings, Text
from pipelines.register import RegisterConfig, register
from pipelines.replicas import DrawReplica, Held, NotHeldError, ReplicaSettings, ReplyReplica
from pipelines.serve import ServeConfig

pytestmark = pytest.mark.usefixtures("no_server")
NAMES = ("base", "first", "second")


@pytest.fixture(scope="module")
def kept(storage_uri: str, model: Path) -> dict[str, Path]:
    """The base, and two adapters for it as they are stored: versions 1 and 2 of the registry."""
    folders = {"base": model}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name, rank in (("first", 4), ("second", 2)):
            lora = FAST["lora"] | {"rank": rank}
            train_followed(make_config(storage_uri, model, name=name, **(FAST | {"lora": lora, "seed": rank})))
            wanted = RegisterConfig(
                storage=storage_uri, name=name, model=str(model), generation_decoder=None, adapter="keep"
            )
            folders[name] = Path(storage_uri, "models", register(wanted).outputs["fingerprint"])
    return folders


@pytest.fixture(scope="module")
def merged(kept: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same versions as whole models, in fp32: published weights are rounded to bf16, an adapter's sum isn't."""
    place = tmp_path_factory.mktemp("merged")
    folders = {"base": kept["base"]}
    for name in NAMES[1:]:
        record = AdapterRecord.model_validate_json((kept[name] / "adapter.json").read_text())
        merge_file(kept["base"], kept[name] / ADAPTER_FILE, place / f"{name}.safetensors", record.lora)
        folders[name] = place / name
        assemble_model(
            kept["base"],
            folders[name],
            autoregressive=place / f"{name}.safetensors",
            lineage={},
            dtype=torch.float32,
        )
    return folders


def hold_of(folder: Path) -> Held:
    manifest = read_manifest(folder)
    info = ModelInfo(folder.name, None, manifest.fingerprint, manifest.parts, manifest.image_size, 2, 0)
    return Held(str(folder), info)


async def start(kind: type[Any], storage: str, folders: Sequence[Path], **values: Any) -> Any:
    """A replica outside Serve that holds these versions."""

    async def wanted() -> list[Held]:
        return [hold_of(folder) for folder in folders]

    part = "autoregressive" if kind is ReplyReplica else "generation_decoder"
    settings = ReplicaSettings(storage, part, max_batch=8, num_threads=1, on_gpu=False, deterministic=False, **values)
    replica = object.__new__(kind)
    await replica.__init__(settings, SimpleNamespace(wanted=SimpleNamespace(remote=wanted)))
    return replica


def orders() -> list[ChatOrder | PictureOrder]:
    """Pictures to predict, and things to say."""
    settings = PictureSettings(seed=0)
    drawn = [PictureOrder(f"a {colour} circle", settings) for colour in ("red", "green", "blue")]
    said = [
        ChatOrder((Message("user", text),), (), settings, max_tokens=16, temperature=temperature, seed=3)
        for text in ("What is it?", "How many things are there?")
        for temperature in (0.0, 1.0)
    ]
    return [*drawn, *said]


async def answer(replica: Any, folder: Path, order: ChatOrder | PictureOrder) -> tuple[str, list[np.ndarray]]:
    """The text and the embeddings that a version answers with."""
    events = [event async for event in replica.reply(read_manifest(folder).fingerprint, order)]
    text = "".join(event.text for event in events if isinstance(event, Text))
    return text, [event.embeddings for event in events if isinstance(event, Predicted)]


def farthest(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """The largest difference, as a share of the largest number."""
    assert len(ours) == len(theirs)
    return max((float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def test_adapters_in_company_answer_as_merged_versions_do(
    storage_uri: str, kept: dict[str, Path], merged: dict[str, Path]
) -> None:
    async def compare() -> None:
        together = await start(ReplyReplica, storage_uri, [kept[name] for name in NAMES])
        asked = list(itertools.product(NAMES, orders()))
        found = await asyncio.gather(*(answer(together, kept[name], order) for name, order in asked))
        (loop,) = (await together.stats())["loops"]
        assert loop["batch_sum"] / loop["steps"] > 3  # they shared steps
        texts: dict[str, list[str]] = {name: [] for name in NAMES}
        for name in NAMES:
            alone = await start(ReplyReplica, storage_uri, [merged[name]])
            published = await start(ReplyReplica, storage_uri, [registry.resolve_model(str(kept[name]))])
            differences = []
            for (of, order), (text, embeddings) in zip(asked, found, strict=True):
                if of == name:
                    wanted, theirs = await answer(alone, merged[name], order)
                    assert text == wanted
                    assert farthest(embeddings, theirs) <= 1e-5
                    texts[name].append(text)
                    _, rounded = await answer(published, registry.resolve_model(str(kept[name])), order)
                    if len(rounded) == len(embeddings):
                        differences.append((farthest(embeddings, theirs), farthest(embeddings, rounded)))
            print(
                name,
                "from merged in fp32, from published in bf16:",
                *(f"{most:.1e}" for most in map(max, *differences)),
            )
        assert texts["base"] != texts["first"] != texts["second"]
        pictures = {name: found[number * len(orders())][1][0] for number, name in enumerate(NAMES)}
        assert farthest([pictures["first"]], [pictures["base"]]) > 1e-2
        assert farthest([pictures["first"]], [pictures["second"]]) > 1e-2

    asyncio.run(compare())


def test_memory_grows_by_adapters_which_come_and_go_while_the_base_works_on(
    storage_uri: str, kept: dict[str, Path]
) -> None:
    async def change() -> None:
        replica = await start(ReplyReplica, storage_uri, [kept["base"]])

        async def weight_bytes() -> int:
            return int((await replica.stats())["weight_bytes"])

        of_base = await weight_bytes()
        sizes = {
            name: sum(tensor.nbytes for tensor in load_file(kept[name] / ADAPTER_FILE).values()) for name in NAMES[1:]
        }
        print(f"base {of_base:,} bytes; adapters {sizes}")
        assert max(sizes.values()) < of_base / 5
        is_over = asyncio.Event()
        done: Counter[str] = Counter()

        async def keep_asking(name: str) -> None:
            while not is_over.is_set():
                try:
                    await answer(replica, kept[name], orders()[done[name] % 4])
                    done[name] += 1
                except NotHeldError:
                    await asyncio.sleep(0.01)

        async def until_all_answer(*names: str) -> None:
            before = Counter(done)
            while any(done[name] < before[name] + 3 for name in names):
                await asyncio.sleep(0.01)

        asking = [asyncio.create_task(keep_asking(name)) for name in NAMES]
        for names in (("base", "first"), NAMES, ("base", "second"), NAMES, ("base",), ("second",), ("first", "second")):
            reasons = await replica.hold([hold_of(kept[name]) for name in names])
            assert not any(reasons.values()), reasons
            assert await weight_bytes() == of_base + sum(sizes.get(name, 0) for name in names)
            assert len((await replica.stats())["loops"]) == 1  # the engine is the one that began
            await until_all_answer(*names)
        is_over.set()
        await asyncio.gather(*asking)

    asyncio.run(change())


def test_an_adapter_that_can_not_be_put_on_changes_nothing(
    storage_uri: str, kept: dict[str, Path], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(kept["first"], damaged)
    tensors = load_file(damaged / ADAPTER_FILE)
    tensors["vision_head.weight"] += 1
    save_file(tensors, damaged / ADAPTER_FILE)
    record = AdapterRecord.model_validate_json((kept["first"] / "adapter.json").read_text())
    odd = tmp_path / "odd"
    shutil.copytree(kept["first"], odd)
    (odd / "adapter.json").write_text(record.model_copy(update={"base_fingerprint": "0" * 16}).model_dump_json())
    with pytest.raises(FingerprintError, match=r"holds an adapter.*register the checkpoint again"):
        registry.find_manifest(str(odd), storage_uri)

    async def refuse() -> None:
        replica = await start(ReplyReplica, storage_uri, [kept["base"], kept["second"]])
        before = (await replica.stats())["weight_bytes"]
        (reason,) = (await replica.hold([hold_of(damaged)])).values()
        assert "adapter.safetensors has changed: its sha256 is" in reason
        # Whole, but with numbers that no answer can be made of.
        tensors["vision_head.weight"][:] = float("nan")
        save_file(tensors, damaged / ADAPTER_FILE)
        (damaged / "adapter.json").write_text(record.model_copy(update={"digest": None}).model_dump_json())
        (reason,) = (await replica.hold([hold_of(damaged)])).values()
        assert reason == "its predictions aren't finite numbers"
        assert (await replica.stats())["weight_bytes"] == before
        assert len((await replica.stats())["loops"]) == 1
        for name in ("base", "second"):
            assert (await answer(replica, kept[name], orders()[0]))[1]

    asyncio.run(refuse())


def test_versions_with_one_decoder_share_it(storage_uri: str, kept: dict[str, Path], tmp_path: Path) -> None:
    other = with_editing_decoder(kept["base"], tmp_path / "other", seed=3)  # the same generation decoder

    async def share() -> None:
        replica = await start(DrawReplica, storage_uri, [kept["base"]])
        before = (await replica.stats())["weight_bytes"]
        await replica.hold([hold_of(folder) for folder in (*kept.values(), other)])
        stats = await replica.stats()
        assert stats["weight_bytes"] == before
        assert len(stats["fingerprints"]) == 4
        assert len(stats["loops"]) == 1
        await replica.hold([hold_of(kept["second"])])
        stats = await replica.stats()
        assert (stats["weight_bytes"], len(stats["loops"])) == (before, 1)

    asyncio.run(share())


def test_an_adapter_with_a_decoder_of_its_own_draws_with_it_unmerged(
    storage_uri: str, model: Path, kept: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    decoder = make_config(storage_uri, model, name="first", stage="generation_decoder", num_steps=2, learning_rate=0.01)
    train_followed(decoder)
    wanted = RegisterConfig(storage=storage_uri, name="first", model=str(model), adapter="keep")
    own = Path(storage_uri, "models", register(wanted).outputs["fingerprint"])
    rows, columns = read_manifest(own).geometry.target_grid
    embeddings = np.random.default_rng(0).standard_normal((rows * columns, HIDDEN_SIZE), np.float32)
    request = DrawRequest(Predicted(embeddings), PictureSettings(seed=1, steps=2))

    async def draw(replica: Any, folder: Path) -> np.ndarray:
        drawn = await replica.draw_at_once(read_manifest(folder).fingerprint, request)
        return np.asarray(Image.open(io.BytesIO(drawn.png)))

    async def compare() -> None:
        replica = await start(DrawReplica, storage_uri, [kept["base"], kept["first"], own])
        assert len((await replica.stats())["loops"]) == 2
        assert not list(tmp_path.rglob("adapted-*"))
        ours, of_base, of_other = [await draw(replica, folder) for folder in (own, kept["base"], kept["first"])]
        assert np.array_equal(of_base, of_other)
        assert not np.array_equal(ours, of_base)
        alone = await start(DrawReplica, storage_uri, [registry.resolve_model(str(own))])
        assert np.array_equal(await draw(alone, own), ours)

    asyncio.run(compare())


# --- behind Ray Serve -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(storage_uri: str, kept: dict[str, Path]) -> ServeConfig:
    """The base by default; by their names the first adapter, and the one that an alias points to."""
    move_alias(storage_uri, "1", "candidate")
    return ServeConfig(
        storage=storage_uri,
        model=str(kept["base"]),
        also=("models:/nexusgen@candidate",),
        port=free_port(),
        ar=SMALL,
        generation_decoder=SMALL,
        editing_decoder=SMALL,
    )


@pytest.fixture(scope="module")
def url(ray_cluster: Any, config: ServeConfig) -> Iterator[str]:
    with served(config) as address:
        yield address


def metric(url: str, name: str, deployment: str) -> list[float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return [
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith(f"nexusgen_{name}{{") and f'deployment="{deployment}"' in line
    ]


def test_an_alias_moves_from_adapter_to_adapter_without_a_lost_request(
    url: str, config: ServeConfig, kept: dict[str, Path], merged: dict[str, Path]
) -> None:
    """The base's replicas stay, and so do its weights; pictures are those of the merged version."""
    whole = {name: load_model(folder) for name, folder in merged.items()}
    makers = {read_manifest(folder).fingerprint: name for name, folder in kept.items()}
    expected = {
        name: [generate_images(one, ["a circle"], [seed], steps=2)[0] for seed in range(3)]
        for name, one in whole.items()
    }
    (of_adapter,) = metric(url, "weight_bytes", "ar")
    (of_decoder,) = metric(url, "weight_bytes", "generation_decoder")
    pids = {name: replica_pids(name) for name in ("ar", "generation_decoder")}
    statuses: Counter[int] = Counter()
    made: Counter[str] = Counter()
    is_over = threading.Event()

    def keep_asking(number: int) -> None:
        rng = random.Random(number)
        while not is_over.is_set():
            seed = rng.randrange(3)
            named = {"model": rng.choice(names())} if number else {}
            response = post(url, prompt="a circle", steps=2, seed=seed, **named)
            if response.status_code == 404:  # it was called so a moment ago
                continue
            statuses[response.status_code] += 1
            if response.status_code == 200:
                name = makers[response.json()["fingerprint"]]
                made[name] += 1
                assert_same_picture(picture_of(response), expected[name][seed])

    def names() -> list[str]:
        return [one["id"] for one in httpx.get(f"{url}/v1/models").json()["data"]]

    assert names() == ["nexusgen", "nexusgen/1"]
    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(keep_asking, number) for number in range(4)]
        try:
            wait_until(lambda: made["base"] >= 3 and made["first"] >= 3)
            move_alias(config.storage, "2", "candidate")
            wait_until(lambda: names() == ["nexusgen", "nexusgen/2"])
            wait_until(lambda: made["second"] >= 3)
        finally:
            is_over.set()
        for client in clients:
            client.result()
    print(statuses, made)
    assert set(statuses) == {200}
    assert {name: replica_pids(name) for name in pids} == pids
    sizes = {name: sum(t.nbytes for t in load_file(kept[name] / ADAPTER_FILE).values()) for name in NAMES[1:]}
    wanted = of_adapter - sizes["first"] + sizes["second"]
    wait_until(lambda: metric(url, "weight_bytes", "ar") == [wanted])
    assert metric(url, "weight_bytes", "generation_decoder") == [of_decoder]
