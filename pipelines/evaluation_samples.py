"""What suites evaluate a model on beside the demo world's prompts: samples whose answer is known.

They come from embedded data of mode vision (a user's held-out tars), their pictures from the tars that it was made of;
or, where no data is named, from scenes and edits of the demo world that no training shows (`shapes.held_out`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from nexusgen import shapes
from nexusgen.config import Config
from nexusgen.errors import FingerprintError
from nexusgen.images import decode_image, image_for_role, to_patches
from nexusgen.messages import image_roles
from nexusgen.model.autoregressive import ConversationBatch, collate_conversations
from nexusgen.model.manifest import Manifest
from nexusgen.model.weights import Model
from nexusgen.prompts import encode_conversation, encode_prompt
from nexusgen.schema import IMAGE_MARK, ROLE_PARTS, Message, Sample
from nexusgen.writing import Prompt
from pipelines import embedded
from pipelines.arrays import decode_entry
from pipelines.shards import ShardReader
from pipelines.stages import EmbeddedRow, StoredImage
from pipelines.suites import Row

LOOK_AT = 16  # times as many rows as samples are wanted: so far samples of the second sort are looked for


@dataclass(frozen=True)
class EvaluationSample:
    """A whole conversation with the embeddings of its images: `input` those of the user, `target` the assistant's.

    `shard` is empty for the demo world's.
    """

    row: EmbeddedRow
    shard: str
    lang: str

    @property
    def key(self) -> str:
        return self.row.key

    @property
    def prompt(self) -> str:
        """What the user asks first, without marks of images."""
        text = next((message.content for message in self.row.messages if message.role == "user"), "")
        return text.replace(IMAGE_MARK, "").strip()

    @property
    def columns(self) -> Row:
        """What a row says of it in all suites."""
        return {
            "key": self.key,
            "shard": self.shard,
            "task": self.row.task,
            "lang": self.lang,
            "prompt": self.prompt,
        }


class StoredSamples(Config):
    """Samples of embedded data of mode vision, in its order, at most `max_samples` of either sort."""

    storage: str
    data: str
    data_digest: str  # so that other data under the same name isn't taken for this
    max_samples: int

    def check(self, manifest: Manifest) -> None:
        """Raises: InputError if there is no such data; FingerprintError if another encoder made it."""
        found = embedded.fingerprint_of(self.storage, self.data, "vision")
        wanted = manifest.fingerprints["vision"]
        if found != wanted:
            raise FingerprintError(
                f"embedded data {self.data!r} was made by vision tower {found[:12]}, but the model's is {wanted[:12]}: "
                "embed it with this model"
            )

    def count(self, *, drawn: bool = True) -> int:
        """How many samples there are whose last answer has an image (`drawn`), or whose answers have none."""
        return len(self._items(drawn))

    def read(self, model: Model, first: int, last: int, *, drawn: bool = True) -> list[EvaluationSample]:
        """Samples `first` up to (not including) `last`. Raises: InputError if a slice can't be read."""
        del model
        chosen = self._items(drawn)[first:last]
        slices = {info.uri: info for info in _slices(self.storage, self.data, self.data_digest)}
        return [
            _to_sample(row)
            for uri in dict.fromkeys(uri for uri, _ in chosen)
            for row in _read(slices[uri], [number for of, number in chosen if of == uri])
        ]

    def pictures(self, samples: Sequence[EvaluationSample]) -> list[dict[int, Image.Image]]:
        """The pictures of each sample as they were in the shards, by their place; none if a shard is gone."""
        found: dict[tuple[str, str], dict[int, Image.Image]] = {}
        for shard in dict.fromkeys(sample.shard for sample in samples):
            left = {sample.key for sample in samples if sample.shard == shard}
            for read in ShardReader(shard):
                if isinstance(read, Sample) and read.key in left:
                    images = dict(enumerate(map(decode_image, read.images)))
                    found[shard, read.key] = images
                    left.discard(read.key)
                    if not left:
                        break
        return [found.get((sample.shard, sample.key), {}) for sample in samples]

    def _items(self, drawn: bool) -> list[tuple[str, int]]:
        """(slice, row) of the samples of a sort."""
        both = _items(self.storage, self.data, self.data_digest, self.max_samples)
        return both[0 if drawn else 1]


class DemoWorldSamples(Config):
    """Held-out scenes by explicit captions, which determine them, and held-out edits, in equal parts."""

    seed: int
    max_samples: int

    def check(self, manifest: Manifest) -> None:
        """Nothing can be wrong: the model embeds the pictures itself."""

    def count(self, *, drawn: bool = True) -> int:
        """As asked; all are drawn."""
        return self.max_samples if drawn else 0

    def read(self, model: Model, first: int, last: int, *, drawn: bool = True) -> list[EvaluationSample]:
        """Samples `first` up to (not including) `last`, embedded by the model."""
        assert drawn
        return [_embed(model, sample) for sample in _world(self.max_samples, self.seed)[first:last]]

    def pictures(self, samples: Sequence[EvaluationSample]) -> list[dict[int, Image.Image]]:
        """The pictures of each sample, by their place."""
        by_key = {sample.key: sample for sample in _world(self.max_samples, self.seed)}
        return [dict(enumerate(map(Image.fromarray, by_key[sample.key].images))) for sample in samples]


Samples = StoredSamples | DemoWorldSamples


class SamplesSuite(Config):
    """What suites that evaluate on samples have in common; a suite of its own adds what `EvaluationSuite` asks for."""

    name: ClassVar[str]

    samples: Samples
    seed: int
    steps: int | None
    num_pictures: int
    batch_size: int

    @property
    def path(self) -> str:
        """Each data set has its own results."""
        return f"{self.name}/{self.samples.data}" if isinstance(self.samples, StoredSamples) else self.name

    @property
    def settings(self) -> dict[str, Any]:
        """All fields but the place."""
        return self.model_dump(mode="json", exclude={"samples": {"storage"}})


def conversation_batch(model: Model, samples: Sequence[EvaluationSample]) -> ConversationBatch:
    """Whole conversations, as training sees them."""
    tokenizer, autoregressive = model.tokenizer, model.autoregressive
    assert tokenizer is not None
    assert autoregressive is not None
    nothing = torch.zeros(0, autoregressive.hidden_size)
    conversations, inputs, targets = [], [nothing], [nothing]
    for sample in samples:
        images = sample.row.images
        in_order = sorted([*images["input"], *images["target"]], key=lambda image: image.index)
        conversations.append(encode_conversation(tokenizer, sample.row.messages, [image.grid for image in in_order]))
        inputs += [image.values.float() for image in images["input"]]
        targets += [image.values.float() for image in images["target"]]
    pad = int(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    return collate_conversations(conversations, torch.cat(inputs), torch.cat(targets), pad)


def drawing_prompt(model: Model, sample: EvaluationSample) -> Prompt:
    """A sample's conversation up to the last answer that has an image: what a reply at inference begins from."""
    tokenizer, autoregressive = model.tokenizer, model.autoregressive
    assert tokenizer is not None
    assert autoregressive is not None
    end = _drawing_message(sample.row.messages)
    messages = sample.row.messages[:end]
    num_images = sum(message.content.count(IMAGE_MARK) for message in messages)
    images = sample.row.images
    in_order = sorted([*images["input"], *images["target"]], key=lambda image: image.index)[:num_images]
    grids = [image.grid for image in in_order]
    given = [image.values.float() for image in images["input"] if image.index < num_images]
    embeddings = torch.cat([torch.zeros(0, autoregressive.hidden_size), *given])
    return Prompt(encode_prompt(tokenizer, messages, grids), embeddings)


def drawn_image(sample: EvaluationSample) -> StoredImage:
    """The image that a reply to `drawing_prompt` should have: the first of the last answer that has any."""
    messages = sample.row.messages
    before = sum(message.content.count(IMAGE_MARK) for message in messages[: _drawing_message(messages)])
    return min((image for image in sample.row.images["target"] if image.index >= before), key=lambda image: image.index)


@torch.inference_mode()
def look(model: Model, images: Sequence[Image.Image]) -> Float[Tensor, "images tokens hidden"]:
    """What the vision tower makes of pictures, scaled and cropped as in the training of the generation decoder."""
    autoregressive, geometry = model.autoregressive, model.manifest.geometry
    assert autoregressive is not None
    patches, grids = to_patches([image_for_role(image, "crop", geometry) for image in images], geometry)
    device = autoregressive.vision_head.weight.device
    embeddings = autoregressive.encode_images(patches.to(device), grids.to(device))
    return embeddings.float().unflatten(0, (len(images), -1)).clone()


def _drawing_message(messages: Sequence[Message]) -> int:
    """The place of the last message of the assistant that has an image."""
    return max(i for i, message in enumerate(messages) if message.role == "assistant" and IMAGE_MARK in message.content)


@cache
def _slices(storage_uri: str, data: str, digest: str) -> list[embedded.SliceInfo]:
    del digest  # part of the key: other data under the same name
    return embedded.list_slices(storage_uri, data, "vision")


@cache
def _items(
    storage_uri: str, data: str, digest: str, max_samples: int
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(slice, row) of the first samples with a target, and of the first without.

    When the former are found, not all of a large data set is read for the latter.
    """
    with_target: list[tuple[str, int]] = []
    without: list[tuple[str, int]] = []
    num_read = 0
    for info in _slices(storage_uri, data, digest):
        if len(with_target) >= max_samples and (len(without) >= max_samples or num_read >= LOOK_AT * max_samples):
            break
        num_read += info.num_rows
        targets = embedded.read_slice(info, ["target_index"])["target_index"].to_pylist()
        with_target += [(info.uri, row) for row, indices in enumerate(targets) if indices]
        without += [(info.uri, row) for row, indices in enumerate(targets) if not indices]
    return with_target[:max_samples], without[:max_samples]


def _read(info: embedded.SliceInfo, wanted: Sequence[int]) -> list[Row]:
    """Rows of a slice by their numbers; only their row groups are read."""
    columns = ["key", "shard", "task", "lang", "messages"]
    columns += [f"{role}_{part}" for role in ("input", "target") for part in ROLE_PARTS]
    size = embedded.ROW_GROUP_ROWS
    groups = sorted({row // size for row in wanted})
    table = embedded.read_slice(info, columns, groups)
    place = {group: position * size for position, group in enumerate(groups)}
    rows: list[Row] = table.take([place[row // size] + row % size for row in wanted]).to_pylist()
    return rows


def _to_sample(row: Row) -> EvaluationSample:
    messages = tuple(Message(message["role"], message["content"]) for message in row["messages"])
    images = {role: _stored_images(row, role) for role in ("input", "target")}
    return EvaluationSample(EmbeddedRow(row["key"], row["task"], messages, images), row["shard"], row["lang"])


def _stored_images(row: Row, role: str) -> tuple[StoredImage, ...]:
    grids = np.array(row[f"{role}_grid"], dtype=int).reshape(-1, 2)
    arrays = row[f"{role}_data"]
    scales = row[f"{role}_scale"] or [b""] * len(arrays)  # empty unless quantised
    images = []
    for index, (height, width), data, scale in zip(row[f"{role}_index"], grids, arrays, scales, strict=True):
        grid = (int(height), int(width))
        images.append(StoredImage(int(index), grid, decode_entry(data, row[f"{role}_dtype"], grid, scale).float()))
    return tuple(images)


@cache
def _world(count: int, seed: int) -> list[shapes.WorldSample]:
    """Captions and edits in turn."""
    captions = shapes.explicit_prompts(-(-count // 2), seed)
    edits = shapes.evaluation_edits(count // 2, seed)
    made = []
    for index in range(count):
        number, task = index // 2, ("generation", "editing")[index % 2]
        key = f"{task}-{number:05d}"
        if task == "generation":
            text, lang, scene = captions[number]
            messages = (Message("user", text), Message("assistant", shapes.DRAWN[lang]))
            made.append(shapes.WorldSample(key, "generation", lang, messages, (shapes.draw(scene),)))
        else:
            edit = edits[number]
            answer = Message("assistant", shapes.edit_reply(edit))
            messages = (Message("user", f"{IMAGE_MARK} {edit.instruction}"), answer)
            pictures = (shapes.draw(edit.source), shapes.draw(edit.target))
            made.append(shapes.WorldSample(key, "editing", edit.lang, messages, pictures))
    return made


@torch.inference_mode()
def _embed(model: Model, sample: shapes.WorldSample) -> EvaluationSample:
    """A sample of the demo world with its embeddings, as mode vision of `embed` makes them."""
    autoregressive, geometry = model.autoregressive, model.manifest.geometry
    assert autoregressive is not None
    images: dict[str, list[StoredImage]] = {"input": [], "target": []}
    for index, (pixels, role) in enumerate(zip(sample.images, image_roles(sample.messages), strict=True)):
        kind = "target" if role == "assistant" else "input"
        patches, grids = to_patches([image_for_role(Image.fromarray(pixels), kind, geometry)], geometry)
        _, height, width = grids[0].tolist()
        grid = (height // geometry.merge_size, width // geometry.merge_size)
        images[kind].append(StoredImage(index, grid, autoregressive.encode_images(patches, grids)))
    row = EmbeddedRow(sample.key, sample.task, sample.messages, {role: tuple(of) for role, of in images.items()})
    return EvaluationSample(row, "", sample.lang)
