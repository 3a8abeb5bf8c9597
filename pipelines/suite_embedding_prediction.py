"""The suite of embedding prediction: how far predicted embeddings are from the true ones, by position in the image.

Teacher-forced: one pass over the sample's own conversation, as in training. Free-running: the reply at inference, which
the model begins by itself. With prefilled autoregression no prediction is an input of another, so that the two differ
by the text before the image alone, and neither grows with the position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from nexusgen.embedding_error import PositionErrors, position_errors
from nexusgen.errors import InputError
from nexusgen.model.manifest import Manifest
from nexusgen.model.weights import Model
from nexusgen.sampling import decode_embeddings, predict_images
from nexusgen.statistics import mean_interval
from pipelines.evaluation_samples import (
    EvaluationSample,
    SamplesSuite,
    conversation_batch,
    drawing_prompt,
    drawn_image,
)
from pipelines.plots import Curve, draw_curves
from pipelines.sheets import draw_sheet, sample_cell
from pipelines.suites import ITEM_COLUMNS, Measures, Row, SuiteResult, Unit, cut, nested_scores, require_parts, to_png

MODES = ("teacher_forced", "free_running", "mean_embedding")
ERRORS = ("mse", "cosine")
_NUMBERS = pa.list_(pa.float32())


class EmbeddingPredictionSuite(SamplesSuite):
    """Errors by position, of each sample's first image in its last answer with one.

    `mean_embedding` is always predicting, at each position, the mean of all the suite's targets there: the best
    constant on these very samples.
    """

    name: ClassVar[str] = "embedding_prediction"
    schema: ClassVar[pa.Schema] = pa.schema(
        [
            *ITEM_COLUMNS,
            *((name, pa.string()) for name in ("key", "shard", "task", "lang", "prompt")),
            ("score", pa.float64()),  # the mean cosine, free-running
            *((f"{mode}_{error}", _NUMBERS) for mode in MODES for error in ERRORS),  # by position, in raster order
            *((name, pa.binary()) for name in ("target_png", "teacher_forced_png", "png")),  # png: free-running
        ]
    )

    def check(self, manifest: Manifest) -> None:
        """Raises: ModelError if the model lacks a part; as the samples' `check`; InputError if there are none."""
        require_parts(manifest, ("autoregressive",))
        self.samples.check(manifest)
        if not self.samples.count():
            raise InputError(f"{self.path}: no sample has an image in an answer of the assistant")

    def units(self) -> list[Unit]:
        """Batches of samples."""
        return cut("prediction", self.samples.count(), self.batch_size)

    def worker(self, model: Model) -> Callable[[Unit], list[Row]]:
        """A function that predicts a unit's samples in both ways."""
        mean = self._mean_target(model)

        def work(unit: Unit) -> list[Row]:
            samples = self.samples.read(model, unit.first, unit.last)
            targets = torch.stack([drawn_image(sample).values.float() for sample in samples])
            predicted = {
                "teacher_forced": teacher_forced(model, samples),
                "free_running": predict_images(model, [drawing_prompt(model, sample) for sample in samples]).float(),
                "mean_embedding": mean.expand_as(targets),
            }
            errors = {mode: position_errors(predictions, targets) for mode, predictions in predicted.items()}
            rows = [_row(sample, errors, place) for place, sample in enumerate(samples)]
            num_drawn = max(0, min(len(rows), self.num_pictures - unit.first))
            if num_drawn and model.generation_decoder is not None:
                self._draw(model, rows[:num_drawn], samples[:num_drawn], predicted, self.seed + unit.first)
            return rows

        return work

    def measures(self, rows: Sequence[Row]) -> Measures:
        """Both errors of each way, over all positions, at the first and at the last one, and by task."""
        found: Measures = {}
        tasks = sorted({row["task"] for row in rows})
        for mode in MODES:
            for error in ERRORS:
                of = [row[f"{mode}_{error}"] for row in rows]
                found[f"{mode}/{error}"] = [[_mean(values) for values in of]]
                found[f"{mode}/{error}_first"] = [[values[0] for values in of]]
                found[f"{mode}/{error}_last"] = [[values[-1] for values in of]]
                if len(tasks) > 1:
                    for task in tasks:
                        of_task = [row[f"{mode}_{error}"] for row in rows if row["task"] == task]
                        found[f"{mode}/{error}_{task}"] = [[_mean(values) for values in of_task]]
        return found

    def summarise(self, rows: Sequence[Row]) -> SuiteResult:
        """Scores as in `measures`, curves over the positions, and a sheet of the first pictures."""
        scores: dict[str, Any] = {
            "n": len(rows),
            "num_positions": len(rows[0]["free_running_mse"]),
            **nested_scores(self.measures(rows)),
        }
        curves = [
            draw_curves(
                f"{label} by position",
                "position in the image, in raster order",
                [Curve(mode.replace("_", " "), _by_position(rows, f"{mode}_{error}")) for mode in MODES],
            )
            for error, label in (("mse", "MSE"), ("cosine", "cosine"))
        ]
        drawn = [row for row in rows if row["png"] is not None]
        title = "unpicked: target | predicted teacher-forced, decoded | predicted free-running, decoded"
        cells = [sample_cell(row, ("target_png", "teacher_forced_png", "png"), None) for row in drawn]
        return SuiteResult(scores, {"samples": draw_sheet(cells, 4, title)} if cells else {}, tuple(curves))

    def _mean_target(self, model: Model) -> Float[Tensor, "tokens hidden"]:
        """The mean of all targets, a batch at a time."""
        total, count = torch.zeros(()), self.samples.count()
        for first in range(0, count, self.batch_size):
            for sample in self.samples.read(model, first, min(first + self.batch_size, count)):
                total = total + drawn_image(sample).values.double()
        return (total / count).float()

    def _draw(
        self,
        model: Model,
        rows: Sequence[Row],
        samples: Sequence[EvaluationSample],
        predicted: dict[str, Float[Tensor, "samples tokens hidden"]],
        seed: int,
    ) -> None:
        """Decode both predictions with the same seeds, and fetch the original pictures."""
        seeds = [seed + index for index in range(len(rows))]
        for mode, name in (("teacher_forced", "teacher_forced_png"), ("free_running", "png")):
            for row, image in zip(
                rows, decode_embeddings(model, predicted[mode][: len(rows)], seeds, self.steps), strict=True
            ):
                row[name] = to_png(image)
        for row, sample, pictures in zip(rows, samples, self.samples.pictures(samples), strict=True):
            original = pictures.get(drawn_image(sample).index)
            row["target_png"] = to_png(original) if original is not None else None


@torch.inference_mode()
def teacher_forced(model: Model, samples: Sequence[EvaluationSample]) -> Float[Tensor, "samples tokens hidden"]:
    """What one pass over whole conversations predicts for the image of each that is measured."""
    autoregressive = model.autoregressive
    assert autoregressive is not None
    predictions = autoregressive.predict_targets(conversation_batch(model, samples))
    of_images = predictions.float().split(autoregressive.geometry.num_target_tokens)
    chosen, first = [], 0
    for sample in samples:
        indices = sorted(image.index for image in sample.row.images["target"])
        chosen.append(of_images[first + indices.index(drawn_image(sample).index)])
        first += len(indices)
    return torch.stack(chosen)


def _row(sample: EvaluationSample, errors: dict[str, PositionErrors], place: int) -> Row:
    columns = {f"{mode}_{error}": getattr(of, error)[place].tolist() for mode, of in errors.items() for error in ERRORS}
    pictures = dict.fromkeys(("target_png", "teacher_forced_png", "png"))
    return {**sample.columns, "score": _mean(columns["free_running_cosine"]), **columns, **pictures}


def _by_position(rows: Sequence[Row], column: str) -> list[Any]:
    return [mean_interval(values) for values in zip(*(row[column] for row in rows), strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
