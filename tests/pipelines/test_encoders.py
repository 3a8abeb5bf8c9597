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
from nexusgen.model.autoregressive import collate_conversations
from nexusgen.model.weights import Model, load_model
from nexusgen.prompts import encode_conversation
from nexusgen.schema import Message, Sample, StoredDtype, Task
from pipelines.arrays import decode_entry, decode_latents_entry, quantise_tokens
from pipelines.encoders import (
    Encoded,
    Fidelity,
    LatentEncoder,
    Picture,
    PredictionEncoder,
    VisionEncoder,
    encode_slice,
)


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


def encode(
    model: Model, encoder: Any, part: Sequence[Sample], dtype: StoredDtype = "bfloat16", num_threads: int = 1
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    assert model.tokenizer is not None
    made = encode_slice(part, encoder, model.tokenizer, model.manifest.geometry, dtype, num_threads)
    return made.table.to_pylist(), [(row.key, row.reason_code) for row in made.rejected]


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


class Counting:
    """An encoder that gives each picture its number and remembers its batches."""

    roles: tuple[str, ...] = ("input", "target", "crop")

    def __init__(self, model: Model, max_cost: int) -> None:
        assert model.autoregressive is not None
        self.vision = VisionEncoder(model.autoregressive, max_cost)
        self.max_cost = max_cost
        self.batches: list[list[Picture]] = []

    def roles_of(self, speaker: str, task: Task) -> tuple[str, ...]:
        return self.vision.roles_of(speaker, task)

    def picture(self, image: Image.Image, role: str) -> Picture:
        return self.vision.picture(image, role)

    def encode(self, pictures: Sequence[Picture]) -> list[Encoded]:
        first = sum(map(len, self.batches))
        self.batches.append(list(pictures))
        return [Encoded(p.grid, torch.full((p.grid[0] * p.grid[1], 4), first + i)) for i, p in enumerate(pictures)]


def test_equal_images_are_encoded_once_and_batches_keep_their_budget(model: Model) -> None:
    square = picture(7, 96, 96)
    part = [
        a_sample("k0", "understanding", square),
        a_sample("k1", "generation", square),
        a_sample("k2", "generation", picture(8)),
        a_sample("k3", "generation", picture(8)),
        *(a_sample(f"k{i}", "generation", picture(i)) for i in range(9, 40)),
    ]
    counting = Counting(model, 100)
    rows, _ = encode(model, counting, part)
    # The square image is the same in all three roles; the others differ as target (squashed) and as crop.
    assert sum(map(len, counting.batches)) == 3 + 2 * 31
    assert rows[0]["input_data"] == rows[1]["target_data"] == rows[1]["crop_data"]
    assert rows[2]["target_data"] == rows[3]["target_data"] != rows[2]["crop_data"]
    costs = [sum(p.cost for p in batch) for batch in counting.batches]
    assert max(costs) <= 100
    assert all(cost + batch[0].cost > 100 for cost, batch in zip(costs, counting.batches[1:], strict=False))
    # Neither the number of threads nor what they finish first changes a batch.
    threaded = Counting(model, 100)
    assert encode(model, threaded, part, num_threads=5)[0] == rows
    names = [[[p.pixels for p in batch] for batch in one.batches] for one in (counting, threaded)]
    assert names[0] == names[1]


def test_int8_keeps_embeddings_closely_and_says_how_closely(model: Model) -> None:
    assert model.autoregressive is not None
    assert model.tokenizer is not None
    encoder = VisionEncoder(model.autoregressive, 8192)
    made = encode_slice(samples(), encoder, model.tokenizer, model.manifest.geometry, "int8")
    exact, _ = encode(model, encoder, samples())
    assert made.fidelity is not None
    wanted = Fidelity()
    for row, reference in zip(made.table.to_pylist(), exact, strict=True):
        for role in encoder.roles:
            assert row[f"{role}_dtype"] == ("int8" if row[f"{role}_data"] else "")
            assert len(row[f"{role}_scale"]) == len(row[f"{role}_data"])
            grids = zip(row[f"{role}_grid"][::2], row[f"{role}_grid"][1::2], strict=True)
            arrays = zip(grids, row[f"{role}_data"], row[f"{role}_scale"], reference[f"{role}_data"], strict=True)
            for grid, data, scale, stored in arrays:
                assert len(data) * 2 == len(stored)
                array = decode_entry(data, "int8", grid, scale)
                wanted.add(decode_entry(stored, "bfloat16", grid), array)
                largest = array.abs().amax(dim=-1, keepdim=True)
                assert ((array - decode_entry(stored, "bfloat16", grid).float()).abs() <= largest / 127).all()
    assert made.fidelity.cosine_sum / made.fidelity.num_tokens > 0.9999
    assert made.fidelity.squared_error_sum > 0
    # An array of zeros stays one.
    data, scale = quantise_tokens(torch.zeros(2, 8))
    assert decode_entry(data, "int8", (1, 2), scale).eq(0).all()


def test_predictions_are_those_of_a_teacher_forced_forward_as_in_stage_ar(model: Model) -> None:
    assert model.autoregressive is not None
    assert model.tokenizer is not None
    geometry = model.manifest.geometry
    encoder = PredictionEncoder(model.autoregressive, 400, int(model.tokenizer.pad_token_id))
    rows, rejected = encode(model, encoder, samples())
    assert rejected == [("k2", "image_truncated"), ("k5", "image_shape")]
    assert [row["predicted_index"] for row in rows] == [[], [], [2], []]
    assert [row["reference_index"] for row in rows] == [[], [], [0, 1], []]
    assert rows[2]["reference_grid"] == [*geometry.reference_grid] * 2
    edit = samples()[3]
    pictures = [decode_image(image) for image in edit.images[:2]]
    with torch.no_grad():
        patches, grids_thw = to_patches([image_for_role(p, "input", geometry) for p in pictures], geometry)
        shown = model.autoregressive.encode_images(patches, grids_thw)
        grids = [(h // geometry.merge_size, w // geometry.merge_size) for _, h, w in grids_thw.tolist()]
        conversation = encode_conversation(model.tokenizer, edit.messages, [*grids, geometry.target_grid])
        nothing = torch.zeros(geometry.num_target_tokens, model.autoregressive.hidden_size)
        wanted = model.autoregressive(collate_conversations([conversation], shown, nothing, 0)).predictions
        patches, grids_thw = to_patches([image_for_role(p, "reference", geometry) for p in pictures], geometry)
        references = model.autoregressive.encode_images(patches, grids_thw)
    stored = decode_entry(rows[2]["predicted_data"][0], "bfloat16", geometry.target_grid)
    torch.testing.assert_close(stored.float(), wanted, rtol=0.01, atol=0.01)
    found = [decode_entry(data, "bfloat16", geometry.reference_grid) for data in rows[2]["reference_data"]]
    torch.testing.assert_close(torch.cat(found).float(), references, rtol=0.01, atol=0.01)


def test_a_slice_without_good_samples_is_an_empty_table(model: Model) -> None:
    assert model.autoregressive is not None
    rows, rejected = encode(model, VisionEncoder(model.autoregressive, 64), [a_sample("k0", "generation", b"")])
    assert rows == []
    assert rejected == [("k0", "image_undecodable")]


def test_the_same_slice_gives_the_same_bits(model: Model, tmp_path: Path) -> None:
    assert model.autoregressive is not None
    encoder = VisionEncoder(model.autoregressive, 100)
    assert encode(model, encoder, samples()) == encode(model, encoder, samples())
