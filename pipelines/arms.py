"""The arms of the experiments of `reproduce`: stage variants that differ from a published stage in one thing each.

None of them is a way to use this project: a model trained by one is measured and put aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from nexusgen.flow_matching import LevelDensity
from nexusgen.losses import AUTOREGRESSIVE_WEIGHTS, LossPart, autoregressive_losses
from nexusgen.model.autoregressive import AutoregressiveModel, AutoregressiveOutput, ConversationBatch, target_positions
from nexusgen.replies import ImageMode
from pipelines.stages import (
    AutoregressiveStage,
    EmbeddedRow,
    GenerationDecoderStage,
    PreparedPicture,
    StepRandom,
)


class PrefilledArm(AutoregressiveStage):
    """Stage ar as it is: query embeddings stand at the positions of an image that is to be predicted."""

    image_mode: ClassVar[ImageMode] = ImageMode.ONE_PASS  # how its model predicts an image
    steps_factor: ClassVar[float] = 1.0  # of the configured steps
    skips_spikes: ClassVar[bool] = True  # steps whose gradient is far larger than those before it

    def output(self, batch: ConversationBatch) -> AutoregressiveOutput:
        """The teacher-forced forward."""
        return self.module(batch)


class NaiveArm(PrefilledArm):
    """Plain autoregression over embeddings: what stands at a position of an image is the embedding of that position,
    so each is predicted from those before it. The true ones in training (teacher forcing), its own at inference.

    They enter as the embeddings of a user's images do, without a projection, as predictions live in the same space.
    Source: arXiv 2504.21356, section 3.2, where it is what prefilled autoregression is compared with.
    """

    image_mode = ImageMode.NAIVE

    def output(self, batch: ConversationBatch) -> AutoregressiveOutput:
        """The forward over the true embeddings of every image."""
        return self.module(batch, embed_true_images(self.module, batch))

    def loss(self, batch: ConversationBatch, random: StepRandom) -> dict[str, LossPart]:
        """As stage ar's."""
        del random
        output = self.output(batch)
        return autoregressive_losses(output.logits, output.labels, output.predictions, batch.target_embeddings)


class NaiveLongerArm(NaiveArm):
    """Half as many steps again. In the same steps plain autoregression learns less, so that a difference at inference
    has two causes; this one's teacher-forced error is no larger, which leaves errors that pile up."""

    steps_factor = 1.5


def embed_true_images(model: AutoregressiveModel, batch: ConversationBatch) -> Float[Tensor, "batch length hidden"]:
    """Token embeddings with the embeddings of all images spliced in, those that are to be predicted, too."""
    embeddings = model.embed_conversations(batch)
    is_target = target_positions(batch.labels, model.image_token_id)
    return embeddings.masked_scatter(is_target[..., None], batch.target_embeddings.to(embeddings.dtype))


class WithoutMseArm(PrefilledArm):
    """Stage ar without the squared error: only the directions of embeddings are learned.

    The gradient of a cosine shrinks as the predictions grow, which nothing holds back here. The guard against spikes
    measures a gradient by the ones before it: after a shrunken stretch it would skip every step to come.
    """

    skips_spikes = False
    weights: ClassVar[Mapping[str, float]] = {**AUTOREGRESSIVE_WEIGHTS, "mse": 0.0}


class WithoutCosineArm(PrefilledArm):
    """Stage ar without the cosine part."""

    weights: ClassVar[Mapping[str, float]] = {**AUTOREGRESSIVE_WEIGHTS, "cosine": 0.0}


AR_ARMS: Mapping[str, type[PrefilledArm]] = {
    "prefilled": PrefilledArm,
    "naive": NaiveArm,
    "naive-longer": NaiveLongerArm,
    "without-mse": WithoutMseArm,
    "without-cosine": WithoutCosineArm,
}


class PredictedInputsStage(GenerationDecoderStage):
    """The generation decoder's stage on the embeddings that a language model predicts for each picture, in place of
    the picture's own."""

    def __init__(
        self,
        folder: Path,
        levels: LevelDensity,
        conditioning_dropout: float,
        predictions: Mapping[str, Float[Tensor, "tokens hidden"]],
    ) -> None:
        """`predictions` are those of every sample that is used, by key."""
        super().__init__(folder, levels, conditioning_dropout)
        self._predictions = predictions

    def prepare(self, row: EmbeddedRow) -> PreparedPicture:
        """As the decoder's stage; the predicted picture is the sample's last."""
        prepared = super().prepare(row)
        return PreparedPicture(prepared.key, self._predictions[row.key], prepared.latents)
