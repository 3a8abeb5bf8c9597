"""What `evaluate` measures: each suite cuts its items into units, turns a unit into rows, and sums rows up as scores.

A suite is its own settings, so that two evaluations are the same exactly if their suites are equal. No Ray here: a
worker is built in an actor, around a model loaded there.

| suite | rows are | scores |
|---|---|---|
| DemoWorldSuite | a prompt or an edit with its picture, or a question with its answer | by category; edits; questions |
| RetrievalSuite | a held-out sample with its predicted and its true embedding | recall@1 among N targets, MSE, cosine |
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional

from nexusgen import scoring, shapes
from nexusgen.config import Config
from nexusgen.errors import FingerprintError, InputError, ModelError
from nexusgen.images import decode_image
from nexusgen.model.autoregressive import collate_conversations
from nexusgen.model.manifest import Manifest
from nexusgen.model.weights import Model
from nexusgen.prompts import encode_conversation
from nexusgen.sampling import decode_embeddings, describe, edit_images, generate_images
from nexusgen.schema import IMAGE_MARK, ROLE_PARTS, Message, Sample
from pipelines import embedded
from pipelines.arrays import decode_entry
from pipelines.shards import ShardReader
from pipelines.sheets import Cell, draw_sheet, is_drawable

Row = dict[str, Any]
ITEM_COLUMNS = (("kind", pa.string()), ("index", pa.int32()))  # which item of its suite a row is
_TEXT, _BYTES = pa.string(), pa.binary()
SHEET_COLUMNS = 8
MAX_ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Unit:
    """One batch of work: items `first` up to (not including) `last` of one kind."""

    kind: str
    first: int
    last: int


@dataclass(frozen=True)
class SuiteResult:
    """Scores (numbers, nested by name) and contact sheets by name."""

    scores: dict[str, Any]
    sheets: dict[str, Image.Image]


class EvaluationSuite(Protocol):
    """One kind of evaluation, fully described by its own fields."""

    name: ClassVar[str]
    schema: ClassVar[pa.Schema]  # of the rows; all begin with ITEM_COLUMNS

    @property
    def path(self) -> str:
        """Where its results lie, below those of the model, and what its metrics are called."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """What two evaluations must have in common to give the same scores."""
        ...

    def check(self, manifest: Manifest) -> None:
        """Find what would fail later. Raises: ModelError, InputError or FingerprintError."""
        ...

    def units(self) -> list[Unit]:
        """All the work, in order."""
        ...

    def worker(self, model: Model) -> Callable[[Unit], list[Row]]:
        """A function that turns a unit into one row per item, without ITEM_COLUMNS."""
        ...

    def summarise(self, rows: Sequence[Row]) -> SuiteResult:
        """Scores and contact sheets of all rows, in order of the items."""
        ...


def cut(kind: str, count: int, batch_size: int) -> list[Unit]:
    """Units of at most `batch_size` items."""
    return [Unit(kind, first, min(first + batch_size, count)) for first in range(0, count, batch_size)]


# --- the demo world ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Explicit:
    """An explicit caption, shaped like `shapes.Prompt`."""

    text: str
    lang: shapes.Lang
    scene: shapes.Scene
    category: str = "explicit"


class DemoWorldSuite(Config):
    """Pictures of held-out combinations, drawn and edited, read back by the exact scorer, and questions about such.

    Short prompts stand in rounds, one of each category, so that the first 24 show all categories; picture i of the
    prompts is drawn from seed + i. A model without an editing decoder edits with its generation decoder, which sees no
    more of the original than the prediction holds.
    """

    name: ClassVar[str] = "demo_world"
    schema: ClassVar[pa.Schema] = pa.schema(
        [
            *ITEM_COLUMNS,
            *((name, _TEXT) for name in ("prompt", "lang", "category")),  # a question's category is its kind
            ("seed", pa.int64()),
            ("expected", _TEXT),  # the scene in words, or the right answer
            ("answer", _TEXT),  # the scene that the scorer sees in the picture, or the answer given
            ("score", pa.float64()),  # 1 or 0; of explicit captions the strict score
            ("strict", pa.float64()),  # pictures only: at the scorer's stricter overlap
            ("colour_and_cell", pa.float64()),  # explicit captions only
            ("done", pa.float64()),  # edits only: the instruction was carried out
            ("unchanged", pa.float64()),  # edits only: the rest is as before; the score asks for both
            ("png", _BYTES),  # the picture drawn, or asked about
            ("source_png", _BYTES),  # edits only: the picture before
        ]
    )

    seed: int
    steps: int | None
    per_category: int
    num_explicit: int
    num_questions: int
    num_edits: int
    num_pictures: int
    batch_size: int

    @property
    def path(self) -> str:
        """One set of results for each model."""
        return self.name

    @property
    def settings(self) -> dict[str, Any]:
        """All fields."""
        return self.model_dump(mode="json")

    def check(self, manifest: Manifest) -> None:
        """Raises: ModelError if the model lacks a part."""
        _require_parts(manifest, ("autoregressive", "generation_decoder", "vae"))

    def units(self) -> list[Unit]:
        """Batches of each kind; the first kinds are the slowest."""
        return [
            *cut("generation", len(shapes.CATEGORIES) * self.per_category, self.batch_size),
            *cut("explicit", self.num_explicit, self.batch_size),
            *cut("editing", self.num_edits, self.batch_size),
            *cut("understanding", self.num_questions, self.batch_size),
        ]

    def worker(self, model: Model) -> Callable[[Unit], list[Row]]:
        """A function that draws, or asks, what a unit says."""
        prompts = self._prompts()
        questions = shapes.evaluation_questions(self.num_questions, self.seed)
        edits = shapes.evaluation_edits(self.num_edits, self.seed)

        def work(unit: Unit) -> list[Row]:
            if unit.kind == "editing":
                return self._edit(model, edits[unit.first : unit.last], unit.first)
            if unit.kind == "understanding":
                return self._ask(model, questions[unit.first : unit.last])
            return self._draw(model, prompts[unit.kind][unit.first : unit.last], unit.first)

        return work

    def summarise(self, rows: Sequence[Row]) -> SuiteResult:
        """Scores by category (`overall` is the mean of the six), and sheets of the first pictures and of all."""
        drawn = [row for row in rows if row["kind"] == "generation"]
        explicit = [row for row in rows if row["kind"] == "explicit"]
        answered = [row for row in rows if row["kind"] == "understanding"]
        edited = [row for row in rows if row["kind"] == "editing"]
        categories = {str(c): _mean(row["score"] for row in drawn if row["category"] == c) for c in shapes.CATEGORIES}
        generation: dict[str, float] = {"overall": _mean(categories.values()), **categories}
        generation["strict"] = _mean(row["strict"] for row in drawn)  # categories are of equal size
        if explicit:
            generation["explicit_strict"] = _mean(row["score"] for row in explicit)
            generation["explicit_colour_and_cell"] = _mean(row["colour_and_cell"] for row in explicit)
        scores: dict[str, Any] = {"n": len(rows), "generation": generation}
        if answered:
            asked = shapes.evaluation_questions(self.num_questions, self.seed)
            pairs = list(zip(answered, asked, strict=True))
            scores["understanding"] = {
                "overall": _mean(row["score"] for row in answered),
                "majority": shapes.majority_score(asked),
            }
            held_out = [row["score"] for row, question in pairs if shapes.held_out(question.scene)]
            if held_out:
                scores["understanding"]["held_out"] = _mean(held_out)
        if edited:
            scores["editing"] = {
                "strict": _mean(row["score"] for row in edited),
                "done": _mean(row["done"] for row in edited),
                "unchanged": _mean(row["unchanged"] for row in edited),
            }
        first, last = self.seed, self.seed + self.num_pictures - 1
        sheets = {
            "samples": (drawn[: self.num_pictures], f"short prompts, unpicked: seeds {first} to {last}"),
            "generation": (drawn, f"all short prompts: {generation['overall']:.3f}"),
            "explicit": (explicit[: self.num_pictures], "explicit captions, unpicked"),
            "editing": (edited[: self.num_pictures], "edits, unpicked: before and after"),
        }
        return SuiteResult(
            scores,
            {
                name: draw_sheet([_scored_cell(row) for row in chosen], SHEET_COLUMNS, title)
                for name, (chosen, title) in sheets.items()
                if chosen
            },
        )

    def _prompts(self) -> dict[str, Sequence[_Explicit | shapes.Prompt]]:
        """The prompts of each kind, in order of the items."""
        by_category = shapes.evaluation_prompts(self.per_category, self.seed)
        rounds = [by_category[start :: self.per_category] for start in range(self.per_category)]
        explicit = shapes.explicit_prompts(self.num_explicit, self.seed)
        return {
            "generation": [prompt for one in rounds for prompt in one],
            "explicit": [_Explicit(text, lang, scene) for text, lang, scene in explicit],
        }

    def _draw(self, model: Model, prompts: Sequence[_Explicit | shapes.Prompt], first: int) -> list[Row]:
        seeds = [self.seed + first + number for number in range(len(prompts))]
        images = generate_images(model, [prompt.text for prompt in prompts], seeds, self.steps)
        return [
            {
                "prompt": prompt.text,
                "lang": prompt.lang,
                "category": prompt.category,
                "seed": seed,
                "expected": shapes.explicit_caption(prompt.scene, "en"),
                "answer": _see(image),
                **_score(prompt, image),
                "png": _to_png(image),
                **_NO_EDIT,
            }
            for prompt, seed, image in zip(prompts, seeds, images, strict=True)
        ]

    def _ask(self, model: Model, questions: Sequence[shapes.Question]) -> list[Row]:
        images = [Image.fromarray(shapes.draw(question.scene)) for question in questions]
        answers = describe(model, images, [q.question for q in questions], max_new_tokens=MAX_ANSWER_TOKENS)
        return [
            {
                "prompt": question.question,
                "lang": question.lang,
                "category": question.kind,
                "seed": None,
                "expected": question.answer,
                "answer": answer,
                "score": float(scoring.score_answer(question.answer, answer)),
                "strict": None,
                "colour_and_cell": None,
                "png": _to_png(image),
                **_NO_EDIT,
            }
            for question, answer, image in zip(questions, answers, images, strict=True)
        ]

    def _edit(self, model: Model, edits: Sequence[shapes.Edit], first: int) -> list[Row]:
        size = model.manifest.image_size
        sources = [Image.fromarray(shapes.draw(edit.source, size[0])) for edit in edits]
        seeds = [self.seed + first + number for number in range(len(edits))]
        images = edit_images(
            model,
            sources,
            [edit.instruction for edit in edits],
            seeds,
            self.steps,
            size,
            "generation" if model.editing_decoder is None else "editing",
        )
        rows = []
        for edit, source, seed, image in zip(edits, sources, seeds, images, strict=True):
            score = scoring.score_edit(edit, np.asarray(image.convert("RGB")))
            rows.append(
                {
                    "prompt": edit.instruction,
                    "lang": edit.lang,
                    "category": edit.kind,
                    "seed": seed,
                    "expected": shapes.explicit_caption(edit.target, "en"),
                    "answer": _see(image),
                    "score": float(score.strict),
                    "strict": None,
                    "colour_and_cell": None,
                    "done": float(score.done),
                    "unchanged": float(score.unchanged),
                    "png": _to_png(image),
                    "source_png": _to_png(source),
                }
            )
        return rows


_NO_EDIT: Row = {"done": None, "unchanged": None, "source_png": None}


def _score(prompt: _Explicit | shapes.Prompt, image: Image.Image) -> Row:
    """Columns score, strict and colour_and_cell of a picture."""
    pixels = np.asarray(image.convert("RGB"))
    if isinstance(prompt, shapes.Prompt):
        passed = scoring.score_prompt(prompt, pixels)
        strict = scoring.score_prompt(prompt, pixels, scoring.STRICT_OVERLAP)
        return {"score": float(passed), "strict": float(strict), "colour_and_cell": None}
    explicit = scoring.score_explicit(prompt.scene, pixels)
    score = float(explicit.strict)
    return {"score": score, "strict": score, "colour_and_cell": float(explicit.colour_and_cell)}


def _see(image: Image.Image) -> str:
    """What the scorer sees in a picture, in words; empty if that is no scene."""
    scene = scoring.read_scene(np.asarray(image.convert("RGB"))).scene()
    return shapes.explicit_caption(scene, "en") if scene is not None else ""


def _scored_cell(row: Row) -> Cell:
    text = row["prompt"] if is_drawable(row["prompt"]) else f"({row['lang']}) {row['expected']}"
    shown = [row[name] for name in ("source_png", "png") if row[name] is not None]
    return Cell(tuple(Image.open(io.BytesIO(data)) for data in shown), text, row["score"] == 1)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


# --- retrieval --------------------------------------------------------------------------------------------------------


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
            *((name, _BYTES) for name in ("target_png", "reconstruction_png", "output_png")),
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
        _require_parts(manifest, ("autoregressive",))
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

    def summarise(self, rows: Sequence[Row]) -> SuiteResult:
        """Scores over all samples and by task; a sheet of target, its reconstruction, and output."""
        targets = torch.stack([_decode_embedding(row["target"], row["num_tokens"]) for row in rows])
        predictions = torch.stack([_decode_embedding(row["prediction"], row["num_tokens"]) for row in rows])
        hits, num_targets = find_targets(predictions, targets, self.num_targets, self.seed)
        tasks = np.array([row["task"] for row in rows])
        scores: dict[str, Any] = {
            "n": len(rows),
            "num_targets": num_targets,
            "chance": 1 / num_targets,
            "recall_at_1": float(hits.mean()),
            **{f"recall_at_1_{task}": float(hits[tasks == task].mean()) for task in sorted(set(tasks))},
            "mse": float((predictions - targets).square().mean()),
            # The best constant for these very samples: no mean over other data could be closer to them.
            "mse_mean_embedding": float((targets - targets.mean(dim=0)).square().mean()),
            "cosine": float(functional.cosine_similarity(predictions, targets, dim=-1).mean()),
        }
        drawn = [(row, bool(hit)) for row, hit in zip(rows, hits, strict=True) if row["output_png"] is not None]
        cells = [Cell(_pictures(row), _caption(row), passed) for row, passed in drawn]
        title = "held-out samples: target | target's own embedding, decoded | predicted embedding, decoded"
        return SuiteResult(scores, {"samples": draw_sheet(cells, 4, title)} if cells else {})

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
        for column, name in (("target", "reconstruction_png"), ("prediction", "output_png")):
            embeddings = torch.stack([_decode_embedding(row[column], row["num_tokens"]) for row in rows])
            for row, image in zip(rows, decode_embeddings(model, embeddings, seeds, self.steps), strict=True):
                row[name] = _to_png(image)
        originals = _originals({(row["shard"], row["key"]): row["target_index"][-1] for row in stored})
        for row in rows:
            original = originals.get((row["shard"], row["key"]))
            if original is not None:
                row["target_png"] = _to_png(original)


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
            "output_png": None,
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


def _decode_embedding(data: bytes, num_tokens: int) -> Float[Tensor, "tokens hidden"]:
    return torch.from_numpy(np.frombuffer(data, dtype=np.float32).copy()).reshape(num_tokens, -1)


def _pictures(row: Row) -> tuple[Image.Image, ...]:
    shown = [row[name] for name in ("target_png", "reconstruction_png", "output_png")]
    return tuple(Image.open(io.BytesIO(png)) if png else Image.new("RGB", (8, 8), "lightgrey") for png in shown)


def _caption(row: Row) -> str:
    return row["prompt"] if is_drawable(row["prompt"]) else f"({row['lang']}) {row['key']}"


def _to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _require_parts(manifest: Manifest, parts: Sequence[str]) -> None:
    missing = [part for part in parts if part not in manifest.parts]
    if missing:
        raise ModelError(
            f"the model has no part {', '.join(missing)}, which this evaluation needs; "
            f"it holds {', '.join(manifest.parts) or 'nothing'}"
        )
