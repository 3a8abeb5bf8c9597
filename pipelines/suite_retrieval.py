"""The suite of retrieval: held-out samples of embedded data, and whether predictions find their own targets."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional

from nexusgen.config import Config
from nexusgen.errors import FingerprintError, InputError
from nexusgen.images import decode_image
from nexusgen.model.autoregressive import collate_conversations
from nexusgen.model.manifest import Manifest
from nexusgen.model.weights import Model
from nexusgen.prompts import encode_conversation
from nexusgen.sampling import decode_embeddings
from nexusgen.schema import IMAGE_MARK, ROLE_PARTS, Message, Sample
from pipelines import embedded
from pipelines.arrays import decode_entry
from pipelines.shards import ShardReader
from pipelines.sheets import Cell, draw_sheet, is_drawable
from pipelines.suites import ITEM_COLUMNS, Measures, Row, SuiteResult, Unit, cut, nested_scores, require_parts, to_png

_TEXT, _BYTES = pa.string(), pa.binary()


class RetrievalSuite(Config):
    """Does the predicted embedding of a held-out sample find its own target among others?

    The prediction is one pass over the sample's own conversation, as in training. Every sample that the assistant
    answers with an image counts once, with its last image. Equal targets count as one.
    """

    name: ClassVar[str] = "retrieval"
    schema: ClassVar[pa.Schema] = pa.schema(
        [
            *ITEM_COLUMNS,
            *((name, _TEXT) for name in ("key", "shard", "task", "lang", "prompt")),
            ("num_tokens", pa.int32()),
            *((name, _BYTES) for name in ("target", "prediction")),  # raw float32 [tokens, hidden]
            *((name, _BYTES) for name in ("target_png", "reconstruction_png", "png")),
        ]
    )

    storage: str
    data: str
    data_digest: str
    seed: int
    steps: int | None
    max_samples: int
    num_targets: int
    num_pictures: int
    batch_size: int

    @property
    def path(self) -> str:
        """Each data set has its own results."""
        return f"{self.name}/{self.data}"

    @property
    def settings(self) -> dict[str, Any]:
        """All fields but the place."""
        return self.model_dump(mode="json", exclude={"storage"})

    def check(self, manifest: Manifest) -> None:
        """Raises: ModelError, InputError; FingerprintError if another encoder embedded the data."""
        require_parts(manifest, ("autoregressive",))
        found = embedded.fingerprint_of(self.storage, self.data, "vision")
        wanted = manifest.fingerprints["vision"]
        if found != wanted:
            raise FingerprintError(
                f"embedded data {self.data!r} was made by vision tower {found[:12]}, but the model's is {wanted[:12]}: "
                "embed it with this model"
            )
        if len(self._items()) < 2:
            raise InputError(f"embedded data {self.data!r} holds fewer than 2 samples with a target image")

    def units(self) -> list[Unit]:
        """Batches of samples."""
        return cut("retrieval", len(self._items()), self.batch_size)

    def worker(self, model: Model) -> Callable[[Unit], list[Row]]:
        """A function that predicts the embeddings of a unit's samples."""
        items = self._items()
        slices = {info.uri: info for info in embedded.list_slices(self.storage, self.data, "vision")}

        def work(unit: Unit) -> list[Row]:
            chosen = items[unit.first : unit.last]
            stored = [row for uri in dict.fromkeys(uri for uri, _ in chosen) for row in _read(slices[uri], chosen)]
            rows = _predict(model, stored)
            num_drawn = max(0, min(len(rows), self.num_pictures - unit.first))
            if num_drawn and model.generation_decoder is not None:
                self._draw(model, rows[:num_drawn], stored[:num_drawn], self.seed + unit.first)
            return rows

        return work

    def measures(self, rows: Sequence[Row]) -> Measures:
        """recall@1 of all and by task; errors of each sample, and those of the best constant for these very samples."""
        targets, predictions = _embeddings(rows, "target"), _embeddings(rows, "prediction")
        hits = [float(hit) for hit in self._find(rows)[0]]
        tasks = [row["task"] for row in rows]
        mean = targets.mean(dim=0)  # no mean over other data could be closer to them
        likeness = functional.cosine_similarity(predictions, targets, dim=-1)
        return {
            "recall_at_1": [hits],
            **{
                f"recall_at_1_{task}": [[hit for hit, its in zip(hits, tasks, strict=True) if its == task]]
                for task in sorted(set(tasks))
            },
            "mse": [(predictions - targets).square().flatten(1).mean(dim=1).tolist()],
            "mse_mean_embedding": [(targets - mean).square().flatten(1).mean(dim=1).tolist()],
            "cosine": [likeness.mean(dim=1).tolist()],
        }

    def summarise(self, rows: Sequence[Row]) -> SuiteResult:
        """Scores as in `measures`; a sheet of target, its reconstruction, and output."""
        hits, num_targets = self._find(rows)
        scores: dict[str, Any] = {
            "n": len(rows),
            "num_targets": num_targets,
            "chance": 1 / num_targets,
            **nested_scores(self.measures(rows)),
        }
        drawn = [(row, bool(hit)) for row, hit in zip(rows, hits, strict=True) if row["png"] is not None]
        cells = [Cell(_pictures(row), _caption(row), passed) for row, passed in drawn]
        title = "held-out samples: target | target's own embedding, decoded | predicted embedding, decoded"
        return SuiteResult(scores, {"samples": draw_sheet(cells, 4, title)} if cells else {})

    def _find(self, rows: Sequence[Row]) -> tuple[np.ndarray, int]:
        predictions, targets = _embeddings(rows, "prediction"), _embeddings(rows, "target")
        return find_targets(predictions, targets, self.num_targets, self.seed)

    def _items(self) -> list[tuple[str, int]]:
        """(slice, row) of the samples that have a target, in order, at most `max_samples`."""
        items: list[tuple[str, int]] = []
        for info in embedded.list_slices(self.storage, self.data, "vision"):
            if len(items) >= self.max_samples:
                break
            targets = embedded.read_slice(info, ["target_index"])["target_index"].to_pylist()
            items += [(info.uri, row) for row, indices in enumerate(targets) if indices]
        return items[: self.max_samples]

    def _draw(self, model: Model, rows: list[Row], stored: list[Row], seed: int) -> None:
        """Decode the true and the predicted embeddings with the same seeds, and fetch the original pictures."""
        seeds = [seed + index for index in range(len(rows))]
        for column, name in (("target", "reconstruction_png"), ("prediction", "png")):
            embeddings = torch.stack([_decode_embedding(row[column], row["num_tokens"]) for row in rows])
            for row, image in zip(rows, decode_embeddings(model, embeddings, seeds, self.steps), strict=True):
                row[name] = to_png(image)
        originals = _originals({(row["shard"], row["key"]): row["target_index"][-1] for row in stored})
        for row in rows:
            original = originals.get((row["shard"], row["key"]))
            if original is not None:
                row["target_png"] = to_png(original)


def find_targets(
    predictions: Float[Tensor, "samples tokens hidden"],
    targets: Float[Tensor, "samples tokens hidden"],
    num_targets: int,
    seed: int,
) -> tuple[np.ndarray, int]:
    """Whether each prediction is nearer to its own target than to `num_targets` - 1 others, drawn for each anew.

    Nearness is the cosine between whole embeddings after the mean of the distinct targets is taken off, as embeddings
    share a large common part. Returns the hits and the number of targets, which is smaller if there are too few.
    """
    distinct, own = torch.unique(targets.flatten(1).float(), dim=0, return_inverse=True)
    num_targets = min(num_targets, len(distinct))
    mean = distinct.mean(dim=0)
    likeness = functional.normalize(predictions.flatten(1).float() - mean) @ functional.normalize(distinct - mean).T
    hits = np.zeros(len(predictions), dtype=bool)
    for row in range(len(predictions)):
        others = np.delete(np.arange(len(distinct)), int(own[row]))
        drawn = np.random.default_rng((seed, row)).choice(others, num_targets - 1, replace=False)
        hits[row] = bool((likeness[row, own[row]] > likeness[row, torch.from_numpy(drawn)]).all())
    return hits, num_targets


def _read(info: embedded.SliceInfo, chosen: Sequence[tuple[str, int]]) -> list[Row]:
    columns = ["key", "shard", "task", "lang", "messages"]
    columns += [f"{role}_{part}" for role in ("input", "target") for part in ROLE_PARTS]
    wanted = [row for uri, row in chosen if uri == info.uri]
    groups = sorted({row // embedded.ROW_GROUP_ROWS for row in wanted})
    table = embedded.read_slice(info, columns, groups)
    place = {group: position * embedded.ROW_GROUP_ROWS for position, group in enumerate(groups)}
    size = embedded.ROW_GROUP_ROWS
    rows: list[Row] = table.take([place[row // size] + row % size for row in wanted]).to_pylist()
    return rows


@torch.inference_mode()
def _predict(model: Model, stored: Sequence[Row]) -> list[Row]:
    """One forward over the samples' conversations; keeps the last target of each."""
    autoregressive, tokenizer = model.autoregressive, model.tokenizer
    assert autoregressive is not None
    assert tokenizer is not None
    count = autoregressive.geometry.num_target_tokens
    nothing = torch.zeros(0, autoregressive.hidden_size)
    conversations, inputs, targets = [], [], []
    for row in stored:
        images = {role: _stored_images(row, role) for role in ("input", "target")}
        in_order = sorted([*images["input"], *images["target"]])
        messages = [Message(message["role"], message["content"]) for message in row["messages"]]
        conversations.append(encode_conversation(tokenizer, messages, [grid for _, grid, _ in in_order]))
        inputs.append(torch.cat([nothing, *(array for _, _, array in images["input"])]))
        targets.append(torch.cat([array for _, _, array in images["target"]]))
    pad = int(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    batch = collate_conversations(conversations, torch.cat(inputs), torch.cat(targets), pad)
    predictions = autoregressive(batch).predictions.split([len(target) for target in targets])
    return [
        {
            "key": row["key"],
            "shard": row["shard"],
            "task": row["task"],
            "lang": row["lang"],
            "prompt": next(m["content"] for m in row["messages"] if m["role"] == "user")
            .replace(IMAGE_MARK, "")
            .strip(),
            "num_tokens": count,
            "target": target[-count:].float().numpy().tobytes(),
            "prediction": prediction[-count:].float().numpy().tobytes(),
            "target_png": None,
            "reconstruction_png": None,
            "png": None,
        }
        for row, target, prediction in zip(stored, targets, predictions, strict=True)
    ]


def _stored_images(row: Row, role: str) -> list[tuple[int, tuple[int, int], Tensor]]:
    """(index, grid, embeddings) of a role's images."""
    grids = np.array(row[f"{role}_grid"], dtype=int).reshape(-1, 2)
    images = []
    arrays = row[f"{role}_data"]
    scales = row[f"{role}_scale"] or [b""] * len(arrays)  # empty unless quantised
    for index, (height, width), data, scale in zip(row[f"{role}_index"], grids, arrays, scales, strict=True):
        grid = (int(height), int(width))
        images.append((int(index), grid, decode_entry(data, row[f"{role}_dtype"], grid, scale).float()))
    return images


def _originals(wanted: dict[tuple[str, str], int]) -> dict[tuple[str, str], Image.Image]:
    """The pictures as they were in the shards, by (shard, key); those of a shard that is gone are left out."""
    found: dict[tuple[str, str], Image.Image] = {}
    for shard in dict.fromkeys(shard for shard, _ in wanted):
        left = {key for of, key in wanted if of == shard}
        for sample in ShardReader(shard):
            if isinstance(sample, Sample) and sample.key in left:
                found[shard, sample.key] = decode_image(sample.images[wanted[shard, sample.key]])
                left.discard(sample.key)
                if not left:
                    break
    return found


def _embeddings(rows: Sequence[Row], column: str) -> Float[Tensor, "samples tokens hidden"]:
    return torch.stack([_decode_embedding(row[column], row["num_tokens"]) for row in rows])


def _decode_embedding(data: bytes, num_tokens: int) -> Float[Tensor, "tokens hidden"]:
    return torch.from_numpy(np.frombuffer(data, dtype=np.float32).copy()).reshape(num_tokens, -1)


def _pictures(row: Row) -> tuple[Image.Image, ...]:
    shown = [row[name] for name in ("target_png", "reconstruction_png", "png")]
    return tuple(Image.open(io.BytesIO(png)) if png else Image.new("RGB", (8, 8), "lightgrey") for png in shown)


def _caption(row: Row) -> str:
    return row["prompt"] if is_drawable(row["prompt"]) else f"({row['lang']}) {row['key']}"
