"""From a slice of compressed samples to a table of embedded rows: what an encoder actor computes, without Ray.

Threads decode, resize and cut images into patches ahead of the encoder. An image is decoded once for all roles that
need it; equal pictures of a slice are encoded once. What shares a batch depends on the slice alone, never on timing or
on the number of threads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nexusgen.errors import SampleError
from nexusgen.geometry import Geometry
from nexusgen.images import crop_image, decode_image, image_for_role, input_size, to_patches, to_pixels
from nexusgen.messages import image_roles
from nexusgen.model.autoencoder import ImageAutoencoder, encode_latents
from nexusgen.model.autoregressive import AutoregressiveModel, collate_conversations
from nexusgen.prompts import Conversation, encode_conversation
from nexusgen.schema import IMAGE_MARK, QuarantineRow, Sample, StoredDtype, Task, embedded_schema
from pipelines.ahead import map_ahead
from pipelines.arrays import decode_entry, encode_array, quantise_tokens

LATENTS_ROLE = "latents"
PREDICTED_ROLE = "predicted"
REFERENCE_ROLE = "reference"
INPUT_ROLE = "input"
AHEAD_PER_THREAD = 16  # images that a thread may have ready before the encoder takes them: bounds memory


@dataclass(frozen=True)
class Picture:
    """An image made ready for an encoder, in one role: what goes into the batch, the grid of its entry, its cost.

    `pixels` names its content: equal pictures are encoded once.
    """

    pixels: bytes
    tensor: Float[Tensor, "..."]
    grid: tuple[int, int]  # (h, w), in tokens or latent pixels
    cost: int  # patches, or pixels of an autoencoder


@dataclass(frozen=True)
class Encoded:
    """One encoded image: its grid (h, w), in tokens or latent pixels, and its array."""

    grid: tuple[int, int]
    array: Float[Tensor, "..."]


class Encoder(Protocol):
    """Turns images into arrays, batch by batch. Pictures of a batch cost at most `max_cost` together, but for one."""

    roles: tuple[str, ...]
    max_cost: int

    def roles_of(self, speaker: str, task: Task) -> tuple[str, ...]:
        """The roles that an image has by who says it, and in what kind of conversation."""

    def picture(self, image: Image.Image, role: str) -> Picture:
        """The image made ready; called by threads."""

    def encode(self, pictures: Sequence[Picture]) -> list[Encoded]:
        """The arrays of one batch."""


class VisionEncoder:
    """The vision tower of an autoregressive model: roles `input`, `target` and `crop`; arrays [h * w, hidden]."""

    roles: tuple[str, ...] = ("input", "target", "crop")

    def __init__(self, model: AutoregressiveModel, max_patches: int, roles: tuple[str, ...] | None = None) -> None:
        """`roles`: those of its roles that are wanted, default all. Of the model only the tower is used."""
        self.model = model
        self.geometry = model.geometry
        self.max_cost = max_patches
        self.roles = self.roles if roles is None else roles

    def roles_of(self, speaker: str, task: Task) -> tuple[str, ...]:
        return tuple(role for role in self.roles if (role == "input") == (speaker == "user"))

    def picture(self, image: Image.Image, role: str) -> Picture:
        resized = image_for_role(image, role, self.geometry)
        patches, grid_thw = to_patches([resized], self.geometry)
        _, height, width = grid_thw[0].tolist()
        merge = self.geometry.merge_size
        return Picture(_name_pixels(resized), patches, (height // merge, width // merge), height * width)

    @torch.no_grad()
    def encode(self, pictures: Sequence[Picture]) -> list[Encoded]:
        device, merge = self.model.qwen.model.visual.device, self.geometry.merge_size
        grids = torch.tensor([(1, p.grid[0] * merge, p.grid[1] * merge) for p in pictures])
        patches = torch.cat([p.tensor for p in pictures])
        embeddings = self.model.encode_images(patches.to(device), grids.to(device)).cpu()
        parts = embeddings.split([p.grid[0] * p.grid[1] for p in pictures])
        return [Encoded(p.grid, part) for p, part in zip(pictures, parts, strict=True)]


class PredictionEncoder(VisionEncoder):
    """A trained autoregressive model's own predictions, for the editing decoder: roles `reference` and `predicted`.

    Of edits alone: without a reference there is nothing for that decoder to learn. `reference` is the vision tower's
    view, at reference size, of what the user shows; `predicted` comes from one teacher-forced forward over the
    conversation, its images at input size as in stage ar and at inference, so that the decoder learns from what it will
    be given. (The released preparation shows them at reference size here, too: at the released sizes nearly the same.)
    Source: Nexus-Gen's editing decoder is trained on such predictions (arXiv 2504.21356, section 3.3).
    """

    roles: tuple[str, ...] = (REFERENCE_ROLE, PREDICTED_ROLE)

    def __init__(self, model: AutoregressiveModel, max_patches: int, pad_token_id: int) -> None:
        super().__init__(model, max_patches)
        self.max_tokens = max_patches // self.geometry.merge_size**2
        self.pad_token_id = pad_token_id

    def roles_of(self, speaker: str, task: Task) -> tuple[str, ...]:
        return (INPUT_ROLE, REFERENCE_ROLE) if speaker == "user" and task == "editing" else ()

    @torch.no_grad()
    def predict(
        self, conversations: Sequence[Conversation], inputs: Sequence[Sequence[Encoded]]
    ) -> list[list[Encoded]]:
        """What the model predicts for each image that the assistant draws, conversation by conversation.

        Consecutive conversations share a forward, as many as `max_tokens` hold, padding included.
        """
        grid = self.geometry.target_grid
        is_target = [conversation.labels == self.model.image_token_id for conversation in conversations]
        predicted: list[list[Encoded]] = []
        for batch in _padded_batches([len(c.input_ids) for c in conversations], self.max_tokens):
            shown = [one.array for i in batch for one in inputs[i]]
            num_tokens = sum(int(is_target[i].sum()) for i in batch)
            padded = collate_conversations(
                [conversations[i] for i in batch],
                torch.cat([torch.zeros(0, self.model.hidden_size), *shown]),
                torch.zeros(num_tokens, self.model.hidden_size),  # what is to be predicted isn't looked at
                self.pad_token_id,
            )
            output = self.model.predict_targets(padded.to(self.model.vision_head.weight.device)).cpu()
            drawn = iter(output.unflatten(0, (-1, grid[0] * grid[1])))
            for i in batch:
                num_images = int(is_target[i].sum()) // (grid[0] * grid[1])
                predicted.append([Encoded(grid, next(drawn)) for _ in range(num_images)])
        return predicted


class LatentEncoder:
    """The autoencoder of the decoders: role `latents` of the assistant's images; arrays [channels, h, w]."""

    roles: tuple[str, ...] = (LATENTS_ROLE,)

    def __init__(
        self,
        autoencoder: ImageAutoencoder,
        image_size: tuple[int, int],
        max_pixels: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.autoencoder = autoencoder
        self.image_size = image_size
        self.max_cost = max_pixels
        self.device = device

    def roles_of(self, speaker: str, task: Task) -> tuple[str, ...]:
        return (LATENTS_ROLE,) if speaker == "assistant" else ()

    def picture(self, image: Image.Image, role: str) -> Picture:
        cropped = crop_image(image, self.image_size)
        pixels = to_pixels([cropped])
        return Picture(_name_pixels(cropped), pixels, (0, 0), cropped.width * cropped.height)

    @torch.no_grad()
    def encode(self, pictures: Sequence[Picture]) -> list[Encoded]:
        latents = encode_latents(self.autoencoder, torch.cat([p.tensor for p in pictures]).to(self.device)).cpu()
        grid = (int(latents.shape[-2]), int(latents.shape[-1]))
        return [Encoded(grid, latent) for latent in latents]


class ImageKeeper:
    """No encoder: pictures are seen to be good, and stored as they came, to be encoded while a training runs."""

    roles: tuple[str, ...] = ()
    max_cost = 0

    def roles_of(self, speaker: str, task: Task) -> tuple[str, ...]:
        return ()

    def picture(self, image: Image.Image, role: str) -> Picture:
        raise AssertionError("no image has a role")

    def encode(self, pictures: Sequence[Picture]) -> list[Encoded]:
        raise AssertionError("no image has a role")


def _name_pixels(image: Image.Image) -> bytes:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()


def _padded_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Consecutive numbers whose count times the longest length is at most `budget`, at least one at a time."""
    batch: list[int] = []
    longest = 0
    for number, length in enumerate(lengths):
        if batch and max(longest, length) * (len(batch) + 1) > budget:
            yield batch
            batch, longest = [], 0
        batch.append(number)
        longest = max(longest, length)
    if batch:
        yield batch


@dataclass
class Fidelity:
    """How well stored arrays hold what was encoded: sums over tokens, which add up over slices."""

    num_tokens: int = 0
    cosine_sum: float = 0.0
    num_values: int = 0
    squared_error_sum: float = 0.0

    def add(self, exact: Float[Tensor, "tokens hidden"], stored: Float[Tensor, "tokens hidden"]) -> None:
        exact, stored = exact.double(), stored.double()
        self.num_tokens += len(exact)
        self.cosine_sum += float(torch.nn.functional.cosine_similarity(exact, stored, dim=-1).sum())
        self.num_values += exact.numel()
        self.squared_error_sum += float((exact - stored).square().sum())


@dataclass(frozen=True)
class EncodedSlice:
    """Rows of the good samples, in tar order; quarantine rows of the others; what quantising cost, if it was done."""

    table: pa.Table
    rejected: list[QuarantineRow]
    fidelity: Fidelity | None


@dataclass(frozen=True)
class _Ready:
    """One image, decoded and made ready for its roles, or what is wrong with it."""

    size: tuple[int, int] = (0, 0)
    pictures: dict[str, Picture] = field(default_factory=dict)
    problem: SampleError | None = None


class _Batcher:
    """Collects pictures in order and encodes them in batches of at most the encoder's `max_cost`; equal ones once."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.encoded: list[Encoded] = []
        self._waiting: list[Picture] = []
        self._cost = 0
        self._places: dict[bytes, int] = {}

    def add(self, picture: Picture) -> int:
        """Where in `encoded` the picture's array will be."""
        place = self._places.get(picture.pixels)
        if place is None:
            if self._waiting and self._cost + picture.cost > self.encoder.max_cost:
                self.flush()
            place = self._places[picture.pixels] = len(self.encoded) + len(self._waiting)
            self._waiting.append(picture)
            self._cost += picture.cost
        return place

    def flush(self) -> None:
        if self._waiting:
            self.encoded += self.encoder.encode(self._waiting)
        self._waiting, self._cost = [], 0


def encode_slice(
    samples: Sequence[Sample],
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    geometry: Geometry,
    dtype: StoredDtype = "bfloat16",
    num_threads: int = 1,
) -> EncodedSlice:
    """Embedded rows of the samples whose images can be read, in their order, and quarantine rows of the others.

    Which samples are refused doesn't depend on the encoder: all images are decoded, so the modes' rows agree.
    """
    batcher = _Batcher(encoder)
    rows: list[dict[str, Any]] = []
    conversations: list[Conversation | None] = []
    places: list[list[tuple[str, int, int]]] = []  # of each row: role, which of its images, where in `encoded`
    rejected = []
    for sample, ready in _make_ready(samples, encoder, num_threads):
        try:
            grids = _grids(sample, ready, geometry)
            row, conversation = _prepare(sample, grids, tokenizer)
        except SampleError as error:
            texts = (sample.shard, sample.key, error.member, error.reason_code, error.reason[:500])
            rejected.append(QuarantineRow(*texts))
            continue
        if isinstance(encoder, ImageKeeper):
            row["images"] = list(sample.images)
        rows.append(row)
        places.append(
            [(role, i, batcher.add(picture)) for i, one in enumerate(ready) for role, picture in one.pictures.items()]
        )
        is_predicted = PREDICTED_ROLE in encoder.roles and sample.task == "editing"
        conversations.append(conversation if is_predicted else None)
    batcher.flush()
    entries = [[(role, index, batcher.encoded[place]) for role, index, place in of_row] for of_row in places]
    if isinstance(encoder, PredictionEncoder):
        _add_predictions(encoder, rows, conversations, entries)
    fidelity = Fidelity() if dtype == "int8" else None
    store = _Store(dtype, fidelity)
    for row, of_row in zip(rows, entries, strict=True):
        for role in encoder.roles:
            own = [(index, encoded) for name, index, encoded in of_row if name == role]
            stored = [store(encoded) for _, encoded in own]
            row[f"{role}_index"] = [index for index, _ in own]
            row[f"{role}_grid"] = [side for _, encoded in own for side in encoded.grid]
            row[f"{role}_dtype"] = dtype if own else ""
            row[f"{role}_data"] = [data for data, _ in stored]
            row[f"{role}_scale"] = [scale for _, scale in stored if scale]
    return EncodedSlice(pa.Table.from_pylist(rows, schema=embedded_schema(encoder.roles)), rejected, fidelity)


class _Store:
    """Arrays as the bytes of their columns; those of one array are made once."""

    def __init__(self, dtype: StoredDtype, fidelity: Fidelity | None) -> None:
        self.dtype, self.fidelity = dtype, fidelity
        self._known: dict[int, tuple[bytes, bytes]] = {}

    def __call__(self, encoded: Encoded) -> tuple[bytes, bytes]:
        """(data, scale); the scale is empty unless the array is quantised."""
        if id(encoded) not in self._known:
            if self.fidelity is None:
                self._known[id(encoded)] = encode_array(encoded.array, self.dtype), b""
            else:
                data, scale = self._known[id(encoded)] = quantise_tokens(encoded.array)
                self.fidelity.add(encoded.array, decode_entry(data, self.dtype, encoded.grid, scale))
        return self._known[id(encoded)]


def _make_ready(
    samples: Sequence[Sample], encoder: Encoder, num_threads: int
) -> Iterator[tuple[Sample, tuple[_Ready, ...]]]:
    """Every sample with its images, decoded and made ready by threads; equal files are decoded once for equal roles."""
    seen: dict[tuple[bytes, tuple[str, ...]], int] = {}
    jobs: list[tuple[bytes, tuple[str, ...]]] = []  # in order of first use
    wanted: list[list[int]] = []
    last_use: dict[int, int] = {}
    for number, sample in enumerate(samples):
        numbers = []
        for data, speaker in zip(sample.images, image_roles(sample.messages), strict=True):
            roles = encoder.roles_of(speaker, sample.task)
            job = seen.setdefault((hashlib.sha256(data).digest(), roles), len(jobs))
            if job == len(jobs):
                jobs.append((data, roles))
            last_use[job] = number
            numbers.append(job)
        wanted.append(numbers)
    ready: dict[int, _Ready] = {}
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        results = map_ahead(pool, lambda job: _make_one_ready(encoder, *job), jobs, num_threads * AHEAD_PER_THREAD)
        num_ready = 0
        for number, (sample, numbers) in enumerate(zip(samples, wanted, strict=True)):
            while numbers and num_ready <= max(numbers):
                ready[num_ready] = next(results)
                num_ready += 1
            yield sample, tuple(ready[job] for job in numbers)
            for job in set(numbers):
                if last_use[job] == number:
                    del ready[job]


def _make_one_ready(encoder: Encoder, data: bytes, roles: Sequence[str]) -> _Ready:
    try:
        image = decode_image(data)
        return _Ready((image.height, image.width), {role: encoder.picture(image, role) for role in roles})
    except SampleError as error:
        return _Ready(problem=error)


def _grids(sample: Sample, ready: Sequence[_Ready], geometry: Geometry) -> list[tuple[int, int]]:
    """Token grids of a sample's images, as stage ar sees them. Raises: SampleError for the first unusable image."""
    grids = []
    for index, (one, speaker) in enumerate(zip(ready, image_roles(sample.messages), strict=True)):
        try:
            if one.problem is not None:
                raise one.problem
            height, width = input_size(one.size, geometry)
        except SampleError as error:
            raise SampleError(error.reason_code, f"image {index}: {error.reason}", error.member) from None
        is_target = speaker == "assistant"
        grids.append(geometry.target_grid if is_target else (height // geometry.factor, width // geometry.factor))
    return grids


def _prepare(
    sample: Sample, grids: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Any], Conversation]:
    conversation = encode_conversation(tokenizer, sample.messages, grids)
    row = {
        "key": sample.key,
        "shard": sample.shard,
        "row": sample.row,
        "task": sample.task,
        "lang": sample.lang,
        "messages": [{"role": message.role, "content": message.content} for message in sample.messages],
        "meta": json.dumps(sample.meta, ensure_ascii=False).encode("utf-8", "backslashreplace").decode(),
        "num_tokens": len(conversation.input_ids),
    }
    return row, conversation


def _add_predictions(
    encoder: PredictionEncoder,
    rows: Sequence[dict[str, Any]],
    conversations: Sequence[Conversation | None],
    entries: Sequence[list[tuple[str, int, Encoded]]],
) -> None:
    """Put what the model predicts beside the references of what it was shown."""
    numbers = [number for number, conversation in enumerate(conversations) if conversation is not None]
    asked = [conversation for conversation in conversations if conversation is not None]
    shown = [[encoded for role, _, encoded in entries[number] if role == INPUT_ROLE] for number in numbers]
    for number, predicted in zip(numbers, encoder.predict(asked, shown), strict=True):
        speakers = [m["role"] for m in rows[number]["messages"] for _ in range(m["content"].count(IMAGE_MARK))]
        drawn = [index for index, who in enumerate(speakers) if who == "assistant"]
        entries[number].extend((PREDICTED_ROLE, i, one) for i, one in zip(drawn, predicted, strict=True))
