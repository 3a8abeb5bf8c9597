"""The suite of held-out data: any tars that were embedded but not trained on. Losses, retrieval, contact sheet."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional

from nexusgen.embedding_error import position_errors
from nexusgen.errors import InputError
from nexusgen.images import crop_image, to_pixels
from nexusgen.model.autoencoder import encode_latents
from nexusgen.model.manifest import Manifest
from nexusgen.model.weights import Model
from nexusgen.sample_losses import flow_losses, text_losses
from nexusgen.sampling import decode_embeddings, drawing_parts, encode_references
from pipelines.evaluation_samples import EvaluationSample, SamplesSuite, StoredSamples, conversation_batch, look
from pipelines.plots import draw_histogram
from pipelines.sheets import draw_sheet, sample_cell
from pipelines.suites import ITEM_COLUMNS, Measures, Row, SuiteResult, Unit, cut, nested_scores, require_parts, to_png

RECALLS = (1, 5)
LOSSES = ("ce", "mse", "cosine_distance", "generation_flow", "editing_flow")
_TEXT, _BYTES = pa.string(), pa.binary()


class HeldOutSuite(SamplesSuite):
    """How well a model does on samples of its own kind that it hasn't seen.

    Items of kind `drawn` are samples that the assistant answers with an image, each with its last one; of kind
    `answered` all others. The prediction is one pass over the sample's own conversation, as in training; losses are
    those of the training's stages, of each sample (`sample_losses`):

    | column | stage | of |
    |---|---|---|
    | ce | ar | text that the assistant says |
    | mse, cosine_distance | ar | the predicted embedding: mean square, and 1 - cosine |
    | generation_flow | generation_decoder | the picture under its own embeddings; None if its tar is gone |
    | editing_flow | editing_decoder | edited pictures under the prediction and the first picture given, as reference |

    Retrieval: is the predicted embedding nearer to its own target than to others? Equal targets count as one.
    """

    name: ClassVar[str] = "held_out"
    schema: ClassVar[pa.Schema] = pa.schema(
        [
            *ITEM_COLUMNS,
            *((name, _TEXT) for name in ("key", "shard", "task", "lang", "prompt")),
            ("score", pa.float64()),  # the cosine between prediction and target
            *((name, pa.float64()) for name in LOSSES),
            ("num_tokens", pa.int32()),
            *((name, _BYTES) for name in ("target", "prediction")),  # raw float32 [tokens, hidden]
            *((name, _BYTES) for name in ("target_png", "reconstruction_png", "png")),
        ]
    )

    samples: StoredSamples
    num_targets: int

    def check(self, manifest: Manifest) -> None:
        """Raises: ModelError, InputError; FingerprintError if another encoder embedded the data."""
        require_parts(manifest, ("autoregressive",))
        self.samples.check(manifest)
        if not self.samples.count() and not self.samples.count(drawn=False):
            raise InputError(f"embedded data {self.samples.data!r} holds no sample")

    def units(self) -> list[Unit]:
        """Batches of samples of both kinds."""
        return [
            *cut("drawn", self.samples.count(), self.batch_size),
            *cut("answered", self.samples.count(drawn=False), self.batch_size),
        ]

    def worker(self, model: Model) -> Callable[[Unit], list[Row]]:
        """A function that predicts the embeddings of a unit's samples."""

        def work(unit: Unit) -> list[Row]:
            samples = self.samples.read(model, unit.first, unit.last, drawn=unit.kind == "drawn")
            rows = _predict(model, samples)
            if unit.kind == "drawn":
                pictures = self.samples.pictures(samples)
                self._add_flow_losses(model, rows, samples, pictures)
                num_drawn = max(0, min(len(rows), self.num_pictures - unit.first))
                if num_drawn and model.generation_decoder is not None:
                    self._draw(model, rows[:num_drawn], samples, pictures, self.seed + unit.first)
            return rows

        return work

    def measures(self, rows: Sequence[Row]) -> Measures:
        """Losses and recall, of all and by task, and the error of the best constant for these very samples."""
        found: Measures = {}
        drawn = [row for row in rows if row["kind"] == "drawn"]
        for loss in LOSSES:
            _add(found, f"losses/{loss}", rows, [row[loss] for row in rows])
        if drawn:
            targets = _embeddings(drawn, "target")
            mean = targets.mean(dim=0)  # no mean over other data could be closer to them
            found["losses/mse_mean_embedding"] = [(targets - mean).square().flatten(1).mean(dim=1).tolist()]
        if len(drawn) > 1:
            ranks, num_targets = self._rank(drawn)
            for count in RECALLS:
                if count < num_targets:
                    hits = [float(rank < count) for rank in ranks.tolist()]
                    _add(found, f"recall_at_{count}", drawn, hits)
        return found

    def summarise(self, rows: Sequence[Row]) -> SuiteResult:
        """Scores as in `measures`; a sheet of target, its reconstruction, and output."""
        drawn = [row for row in rows if row["kind"] == "drawn"]
        scores: dict[str, Any] = {"n": len(rows), **nested_scores(self.measures(rows))}
        plots = [
            draw_histogram(label, label, {task: values for task, values in _by_task(rows, column) if values})
            for column, label in (("ce", "cross entropy per text token"), ("mse", "MSE of the prediction"))
        ]
        hits = [False] * len(drawn)
        if len(drawn) > 1:
            ranks, num_targets = self._rank(drawn)
            hits = [rank == 0 for rank in ranks.tolist()]
            scores |= {
                "num_targets": num_targets,
                "chance": {f"recall_at_{count}": count / num_targets for count in RECALLS if count < num_targets},
            }
        title = "held-out samples: target | target's own embedding, decoded | predicted embedding, decoded"
        cells = [
            sample_cell(row, ("target_png", "reconstruction_png", "png"), hit)
            for row, hit in zip(drawn, hits, strict=True)
            if row["png"] is not None
        ]
        return SuiteResult(scores, {"samples": draw_sheet(cells, 4, title)} if cells else {}, tuple(plots))

    def _rank(self, drawn: Sequence[Row]) -> tuple[Int[np.ndarray, " samples"], int]:
        return rank_targets(_embeddings(drawn, "prediction"), _embeddings(drawn, "target"), self.num_targets, self.seed)

    def _add_flow_losses(
        self,
        model: Model,
        rows: Sequence[Row],
        samples: Sequence[EvaluationSample],
        pictures: Sequence[dict[int, Image.Image]],
    ) -> None:
        """The decoders' losses of the samples whose pictures are at hand."""
        places = [place for place, sample in enumerate(samples) if _last_target(sample) in pictures[place]]
        if not places or model.autoencoder is None or model.generation_decoder is None:
            return
        wanted = [pictures[place][_last_target(samples[place])].convert("RGB") for place in places]
        crops = [crop_image(image, model.manifest.image_size) for image in wanted]
        latents = encode_latents(model.autoencoder, to_pixels(crops))
        seeds = [zlib.crc32(f"{self.seed}/{samples[place].key}".encode()) for place in places]
        seen = look(model, wanted)
        losses = flow_losses(drawing_parts(model, "generation"), seen, latents, seeds)
        for place, loss in zip(places, losses.tolist(), strict=True):
            rows[place]["generation_flow"] = loss
        edited = [number for number, place in enumerate(places) if _first_input(samples[place]) in pictures[place]]
        if not edited or model.editing_decoder is None:
            return
        given = [pictures[places[number]][_first_input(samples[places[number]])].convert("RGB") for number in edited]
        predicted = torch.stack([_decode_embedding(rows[places[number]], "prediction") for number in edited])
        losses = flow_losses(
            drawing_parts(model, "editing"),
            predicted,
            latents[edited],
            [seeds[number] for number in edited],
            encode_references(model, given),
        )
        for number, loss in zip(edited, losses.tolist(), strict=True):
            rows[places[number]]["editing_flow"] = loss

    def _draw(
        self,
        model: Model,
        rows: Sequence[Row],
        samples: Sequence[EvaluationSample],
        pictures: Sequence[dict[int, Image.Image]],
        seed: int,
    ) -> None:
        """Decode the true and the predicted embeddings with the same seeds; the original pictures stand beside."""
        seeds = [seed + index for index in range(len(rows))]
        for column, name in (("target", "reconstruction_png"), ("prediction", "png")):
            embeddings = _embeddings(rows, column)
            for row, image in zip(rows, decode_embeddings(model, embeddings, seeds, self.steps), strict=True):
                row[name] = to_png(image)
        for row, sample, found in zip(rows, samples, pictures, strict=False):
            original = found.get(_last_target(sample))
            row["target_png"] = to_png(original) if original is not None else None


def rank_targets(
    predictions: Float[Tensor, "samples tokens hidden"],
    targets: Float[Tensor, "samples tokens hidden"],
    num_targets: int,
    seed: int,
) -> tuple[Int[np.ndarray, " samples"], int]:
    """How many of `num_targets` - 1 others, drawn for each anew, are as near to a prediction as its own target.

    Nearness is the cosine between whole embeddings after the mean of the distinct targets is taken off, as embeddings
    share a large common part. Returns the ranks (0: its own is the nearest) and the number of targets, which is smaller
    if there are too few.
    """
    distinct, own = torch.unique(targets.flatten(1).float(), dim=0, return_inverse=True)
    num_targets = min(num_targets, len(distinct))
    mean = distinct.mean(dim=0)
    likeness = functional.normalize(predictions.flatten(1).float() - mean) @ functional.normalize(distinct - mean).T
    ranks = np.zeros(len(predictions), dtype=np.int64)
    for row in range(len(predictions)):
        others = np.delete(np.arange(len(distinct)), int(own[row]))
        drawn = np.random.default_rng((seed, row)).choice(others, num_targets - 1, replace=False)
        ranks[row] = int((likeness[row, torch.from_numpy(drawn)] >= likeness[row, own[row]]).sum())
    return ranks, num_targets


@torch.inference_mode()
def _predict(model: Model, samples: Sequence[EvaluationSample]) -> list[Row]:
    """One forward over the samples' conversations; keeps the last target of each that has any."""
    autoregressive = model.autoregressive
    assert autoregressive is not None
    batch = conversation_batch(model, samples)
    output = autoregressive(batch)
    texts = text_losses(output, batch, autoregressive.image_token_id).tolist()
    of_images = iter(output.predictions.float().split(autoregressive.geometry.num_target_tokens))
    rows = []
    for sample, ce in zip(samples, texts, strict=True):
        targets = sample.row.images["target"]
        predictions = [next(of_images) for _ in targets]
        rows.append({**sample.columns, **_NOTHING, "ce": ce})
        if targets:
            target, prediction = max(targets, key=lambda image: image.index).values.float(), predictions[-1]
            errors = position_errors(prediction[None], target[None])
            cosine = float(errors.cosine.mean())
            rows[-1] |= {
                "score": cosine,
                "mse": float(errors.mse.mean()),
                "cosine_distance": 1 - cosine,
                "num_tokens": len(target),
                "target": target.numpy().tobytes(),
                "prediction": prediction.numpy().tobytes(),
            }
    return rows


_NOTHING: Row = dict.fromkeys(
    ("score", *LOSSES, "num_tokens", "target", "prediction", "target_png", "reconstruction_png", "png")
)


def _add(found: Measures, name: str, rows: Sequence[Row], values: Sequence[float | None]) -> None:
    """A measure of all rows that have a value, and of those of each task if there are several."""
    pairs = [(row["task"], value) for row, value in zip(rows, values, strict=True) if value is not None]
    tasks = sorted({task for task, _ in pairs})
    if pairs:
        found[name] = [[value for _, value in pairs]]
    for task in tasks if len(tasks) > 1 else ():
        found[f"{name}_{task}"] = [[value for of, value in pairs if of == task]]


def _by_task(rows: Sequence[Row], column: str) -> list[tuple[str, list[float]]]:
    tasks = sorted({row["task"] for row in rows})
    return [(task, [row[column] for row in rows if row["task"] == task and row[column] is not None]) for task in tasks]


def _last_target(sample: EvaluationSample) -> int:
    return max(image.index for image in sample.row.images["target"])


def _first_input(sample: EvaluationSample) -> int:
    """The place of the first picture that the user shows, -1 if there is none."""
    return min((image.index for image in sample.row.images["input"]), default=-1)


def _embeddings(rows: Sequence[Row], column: str) -> Float[Tensor, "samples tokens hidden"]:
    return torch.stack([_decode_embedding(row, column) for row in rows])


def _decode_embedding(row: Row, column: str) -> Float[Tensor, "tokens hidden"]:
    return torch.from_numpy(np.frombuffer(row[column], dtype=np.float32).copy()).reshape(row["num_tokens"], -1)
