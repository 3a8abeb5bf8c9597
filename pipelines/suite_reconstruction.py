"""The suite of reconstruction: a picture becomes embeddings of the vision tower, and a decoder draws it from these.

What a decoder loses here, no prediction can give back. The autoencoder's own loss is a bound from above, another
picture of the same data one from below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from nexusgen.embedding_error import position_errors
from nexusgen.errors import InputError
from nexusgen.images import crop_image, from_pixels, to_pixels
from nexusgen.model.autoencoder import decode_latents, encode_latents
from nexusgen.model.decoder import ConditionerKind
from nexusgen.model.manifest import Manifest
from nexusgen.model.weights import Model
from nexusgen.picture_quality import psnr, ssim
from nexusgen.sampling import decode_embeddings, encode_references
from pipelines.evaluation_samples import SamplesSuite, drawn_image, look
from pipelines.plots import draw_histogram
from pipelines.sheets import draw_sheet, sample_cell
from pipelines.suites import ITEM_COLUMNS, Measures, Row, SuiteResult, Unit, cut, nested_scores, require_parts, to_png

METRICS = ("psnr", "ssim", "vision_cosine", "vision_mse")
_LABELS = {
    "psnr": ("PSNR", "dB"),
    "ssim": ("SSIM", "structural similarity"),
    "vision_cosine": ("vision cosine", "cosine to the original in the vision tower's space"),
}


class ReconstructionSuite(SamplesSuite):
    """How near pictures come back; the kinds of items are ways of making them.

    | kind | the picture is drawn from |
    |---|---|
    | generation | its embeddings, by the generation decoder |
    | editing | its embeddings and, as reference, its embeddings at reference size, by the editing decoder |
    | autoencoder | its latents: the decoders learn to draw those, so they get no nearer |
    | another | the next picture of the data in its stead |

    Embeddings are of the picture scaled and cropped to a square, latents and pixels of the same crop at the model's
    picture size. `vision_cosine` and `vision_mse` compare the vision tower's embeddings of both, token by token.
    """

    name: ClassVar[str] = "reconstruction"
    schema: ClassVar[pa.Schema] = pa.schema(
        [
            *ITEM_COLUMNS,
            *((name, pa.string()) for name in ("key", "shard", "task", "lang", "prompt")),
            ("seed", pa.int64()),
            ("score", pa.float64()),  # vision_cosine
            *((name, pa.float64()) for name in METRICS),
            *((name, pa.binary()) for name in ("target_png", "png")),
        ]
    )

    decoders: tuple[ConditionerKind, ...]  # those that the model has

    def check(self, manifest: Manifest) -> None:
        """Raises: ModelError if the model lacks a part; as the samples' `check`; InputError for fewer than 2."""
        require_parts(manifest, ("autoregressive", "vae", *(f"{kind}_decoder" for kind in self.decoders)))
        self.samples.check(manifest)
        if self.samples.count() < 2:
            raise InputError(f"{self.path}: fewer than 2 samples have an image in an answer of the assistant")

    def units(self) -> list[Unit]:
        """Batches of each kind; the slowest first."""
        kinds = [*reversed(self.decoders), "autoencoder", "another"]
        return [unit for kind in kinds for unit in cut(kind, self.samples.count(), self.batch_size)]

    def worker(self, model: Model) -> Callable[[Unit], list[Row]]:
        """A function that draws a unit's pictures anew."""

        def work(unit: Unit) -> list[Row]:
            samples = self.samples.read(model, unit.first, unit.last)
            originals = self._originals(model, unit.first, unit.last)
            wanted = [crop_image(image, model.manifest.image_size) for image in originals]
            seeds = [self.seed + place for place in range(unit.first, unit.last)]
            embeddings = look(model, originals)
            if unit.kind == "another":
                after = unit.last % self.samples.count()
                made = [*wanted[1:], crop_image(self._originals(model, after, after + 1)[0], model.manifest.image_size)]
            else:
                made = self._draw(model, unit.kind, wanted, embeddings, seeds)
            errors = position_errors(look(model, made), embeddings)
            rows = []
            for place, sample in enumerate(samples):
                pixels = [np.asarray(image.convert("RGB")) for image in (made[place], wanted[place])]
                cosine = float(errors.cosine[place].mean())
                rows.append(
                    {
                        **sample.columns,
                        "seed": seeds[place] if unit.kind in self.decoders else None,
                        "score": cosine,
                        "psnr": psnr(*pixels),
                        "ssim": ssim(*pixels),
                        "vision_cosine": cosine,
                        "vision_mse": float(errors.mse[place].mean()),
                        "target_png": to_png(wanted[place]),
                        "png": to_png(made[place]),
                    }
                )
            return rows

        return work

    def measures(self, rows: Sequence[Row]) -> Measures:
        """Each metric of each kind."""
        kinds = dict.fromkeys(row["kind"] for row in rows)
        return {
            f"{kind}/{metric}": [[row[metric] for row in rows if row["kind"] == kind]]
            for kind in kinds
            for metric in METRICS
        }

    def summarise(self, rows: Sequence[Row]) -> SuiteResult:
        """Scores as in `measures`, histograms of them, and sheets of originals beside what was made of them."""
        kinds = [kind for kind in ("generation", "editing", "autoencoder", "another") if _of_kind(rows, kind)]
        plots = [
            draw_histogram(title, label, {kind: [row[metric] for row in _of_kind(rows, kind)] for kind in kinds})
            for metric, (title, label) in _LABELS.items()
        ]
        sheets: dict[str, Image.Image] = {}
        for kind in self.decoders:
            chosen = _of_kind(rows, kind)[: self.num_pictures]
            cells = [sample_cell(row, ("target_png", "png"), None, f"{row['psnr']:.1f} dB: ") for row in chosen]
            if cells:
                sheets[kind] = draw_sheet(cells, 6, f"unpicked: original | by the {kind} decoder from its embeddings")
        count = len(_of_kind(rows, "another"))
        return SuiteResult({"n": count, **nested_scores(self.measures(rows))}, sheets, tuple(plots))

    def _originals(self, model: Model, first: int, last: int) -> list[Image.Image]:
        """The pictures to come back. Raises: InputError if the shards that hold them are gone."""
        samples = self.samples.read(model, first, last)
        found = []
        for sample, pictures in zip(samples, self.samples.pictures(samples), strict=True):
            index = drawn_image(sample).index
            if index not in pictures:
                raise InputError(
                    f"sample {sample.key} isn't in {sample.shard or 'the demo world'} any more, and reconstruction "
                    "needs its picture: put the tar back, or embed the data again from where it is now"
                )
            found.append(pictures[index].convert("RGB"))
        return found

    def _draw(
        self,
        model: Model,
        kind: str,
        wanted: Sequence[Image.Image],
        embeddings: Float[Tensor, "images tokens hidden"],
        seeds: Sequence[int],
    ) -> list[Image.Image]:
        if kind == "autoencoder":
            autoencoder = model.autoencoder
            assert autoencoder is not None
            return from_pixels(decode_latents(autoencoder, encode_latents(autoencoder, to_pixels(wanted))))
        if kind == "editing":
            reference = encode_references(model, wanted)
            return decode_embeddings(model, embeddings, seeds, self.steps, decoder="editing", reference=reference)
        return decode_embeddings(model, embeddings, seeds, self.steps)


def _of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]
