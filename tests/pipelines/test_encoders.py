from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import make_tiny_model

from nexusgen.images import crop_image, decode_image, image_for_role, to_patches, to_pixels
from nexusgen.model.autoencoder import encode_latents
from nexusgen.model.weights import Model, load_model
from nexusgen.prompts import encode_conversation
from nexusgen.schema import Message, Sample, Task
from pipelines.embedded import decode_entry, decode_latents_entry
from pipelines.encoders import Entry, LatentEncoder, VisionEncoder, encode_slice


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(make_tiny_model(tmp_path_factory.mktemp("model")), ["autoregressive", "vae"])


def picture(seed: int, height: int = 40, width: int = 64) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def a_sample(key: str, task: Task, *images: bytes) -> Sample:
    marks = "<image>" * len(images)
    user, assistant = {
        "generation": ("draw", marks),
        "understanding": (f"{marks} what?", "a circle"),
        "editing": (f"{marks[7:]} mend", "<image>"),
    }[task]
    messages = (Message("user", user), Message("assistant", assistant))
    return Sample(key, "shard.tar", int(key[1:]), task, "en", messages, images, {"score": "1", "名": "x"})


def samples() -> list[Sample]:
    return [
        a_sample("k0", "generation", picture(0)),
        a_sample("k1", "understanding", picture(1)),
        a_sample("k2", "generation", picture(2)[:300]),
        a_sample("k3", "editing", picture(0), picture(1), picture(3, 64, 64)),
        a_sample("k4", "understanding"),
        a_sample("k5", "understanding", picture(4, 1, 300)),
    ]


def encode(model: Model, encoder: Any, part: Sequence[Sample]) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    assert model.tokenizer is not None
    table, rejected = encode_slice(part, encoder, model.tokenizer, model.manifest.geometry)
    return table.to_pylist(), [(row.key, row.reason_code) for row in rejected]


def test_vision_rows_hold_the_towers_own_numbers(model: Model) -> None:
    assert model.autoregressive is not None
    assert model.tokenizer is not None
    geometry = model.manifest.geometry
    rows, rejected = encode(model, VisionEncoder(model.autoregressive, 64), samples())
    assert rejected == [("k2", "image_truncated"), ("k5", "image_shape")]
    assert [(row["key"], row["row"]) for row in rows] == [("k0", 0), ("k1", 1), ("k3", 3), ("k4", 4)]
    edit = rows[2]
    assert (edit["input_index"], edit["target_index"], edit["crop_index"]) == ([0, 1], [2], [2])
    assert rows[3]["input_data"] == []
    assert rows[3]["input_dtype"] == ""
    for row, sample in zip(rows, [s for s in samples() if s.key not in ("k2", "k5")], strict=True):
        for role in ("input", "target", "crop"):
            grids = list(zip(row[f"{role}_grid"][::2], row[f"{role}_grid"][1::2], strict=True))
            for index, grid, data in zip(row[f"{role}_index"], grids, row[f"{role}_data"], strict=True):
                image = image_for_role(decode_image(sample.images[index]), role, geometry)
                assert (image.height, image.width) == (grid[0] * geometry.factor, grid[1] * geometry.factor)
                with torch.no_grad():
                    wanted = model.autoregressive.encode_images(*to_patches([image], geometry))
                stored = decode_entry(data, row[f"{role}_dtype"], grid)
                torch.testing.assert_close(stored.float(), wanted, rtol=0.01, atol=0.01)
        grids_of_inputs = dict(
            zip(row["input_index"], zip(row["input_grid"][::2], row["input_grid"][1::2], strict=True), strict=True)
        )
        grids_in_order = [grids_of_inputs.get(i, geometry.target_grid) for i in range(len(sample.images))]
        wanted_ids = encode_conversation(model.tokenizer, sample.messages, grids_in_order).input_ids
        assert row["num_tokens"] == len(wanted_ids)
    assert json.loads(rows[0]["meta"]) == {"score": "1", "名": "x"}


def test_latent_rows_join_the_vision_rows_by_position(model: Model) -> None:
    assert model.autoregressive is not None
    assert model.autoencoder is not None
    vision, refused_by_vision = encode(model, VisionEncoder(model.autoregressive, 8192), samples())
    latents, refused_by_latents = encode(model, LatentEncoder(model.autoencoder, (64, 64), 64 * 64), samples())
    assert refused_by_vision == refused_by_latents
    shared = ("key", "shard", "row", "task", "lang", "messages", "meta", "num_tokens")
    assert [{c: row[c] for c in shared} for row in vision] == [{c: row[c] for c in shared} for row in latents]
    assert [row["latents_index"] for row in latents] == [[0], [], [2], []]
    image = crop_image(decode_image(picture(0)), (64, 64))
    stored = decode_latents_entry(latents[0]["latents_data"][0], "bfloat16", tuple(latents[0]["latents_grid"]))
    torch.testing.assert_close(
        stored.float(), encode_latents(model.autoencoder, to_pixels([image]))[0], rtol=0.01, atol=0.01
    )


def test_equal_images_are_encoded_once_and_batches_keep_their_budget(model: Model) -> None:
    class Counting:
        roles: tuple[str, ...] = ("input", "target", "crop")
        seen: list[Image.Image]

        def roles_of(self, speaker: str) -> tuple[str, ...]:
            return ("input",) if speaker == "user" else ("target", "crop")

        def resize(self, image: Image.Image, role: str) -> Image.Image:
            return image_for_role(image, role, model.manifest.geometry)

        def encode(self, images: Sequence[Image.Image]) -> list[Entry]:
            self.seen = list(images)
            return [Entry((1, 1), str(number).encode()) for number in range(len(images))]

    counting = Counting()
    square = picture(7, 96, 96)
    rows, _ = encode(
        model,
        counting,
        [
            a_sample("k0", "understanding", square),
            a_sample("k1", "generation", square),
            a_sample("k2", "generation", picture(8)),
            a_sample("k3", "generation", picture(8)),
        ],
    )
    # The square image is the same in all three roles; the other differs as target (squashed) and as crop.
    assert len(counting.seen) == 3
    assert rows[0]["input_data"] == rows[1]["target_data"] == rows[1]["crop_data"]
    assert rows[2]["target_data"] == rows[3]["target_data"] != rows[2]["crop_data"]


def test_a_slice_without_good_samples_is_an_empty_table(model: Model) -> None:
    assert model.autoregressive is not None
    rows, rejected = encode(model, VisionEncoder(model.autoregressive, 64), [a_sample("k0", "generation", b"")])
    assert rows == []
    assert rejected == [("k0", "image_undecodable")]


def test_the_same_slice_gives_the_same_bits(model: Model, tmp_path: Path) -> None:
    assert model.autoregressive is not None
    encoder = VisionEncoder(model.autoregressive, 100)
    assert encode(model, encoder, samples()) == encode(model, encoder, samples())
