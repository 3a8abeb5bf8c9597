"""Training stages: what each reads, which weights it trains, and its loss for a batch. No Ray here.

A stage turns an embedded row into a prepared sample (once, it is kept), prepared samples into a batch, and a batch into
named loss parts, each a sum over a count, so that a step is normalised by its counts over all ranks.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int, Shaped
from PIL import Image
from torch import Tensor, nn

from nexusgen.errors import InputError
from nexusgen.flow_matching import (
    FLOW_WEIGHTS,
    LevelDensity,
    Levels,
    flow_loss,
    interpolate,
    sample_levels,
    training_table,
    velocity_target,
)
from nexusgen.images import from_pixels
from nexusgen.losses import AUTOREGRESSIVE_WEIGHTS, LossPart, autoregressive_losses
from nexusgen.model.autoencoder import decode_latents
from nexusgen.model.autoregressive import AutoregressiveModel, ConversationBatch, collate_conversations
from nexusgen.model.decoder import VisionDecoder
from nexusgen.model.weights import Model, load_model
from nexusgen.prompts import Conversation, encode_conversation
from nexusgen.sampling import decode_embeddings
from nexusgen.schema import EmbedMode, Message, Task

StageName = Literal["ar", "generation_decoder"]
PreparedT = TypeVar("PreparedT")
BatchT = TypeVar("BatchT")


@dataclass(frozen=True)
class StoredImage:
    """One embedding or latent as stored: which of the sample's images it is, its grid (h, w) and its numbers."""

    index: int
    grid: tuple[int, int]
    values: Shaped[Tensor, "..."]


@dataclass(frozen=True)
class EmbeddedRow:
    """One row of embedded data, with what the stage's roles hold for it."""

    key: str
    task: Task
    messages: tuple[Message, ...]
    images: Mapping[str, tuple[StoredImage, ...]]


class StepRandom:
    """Random numbers of a step, a pure function of (seed, step, sample key): the same on any rank, after a restart."""

    def __init__(self, seed: int, step: int) -> None:
        self._prefix = f"{seed}/{step}/"

    def generator(self, key: str) -> torch.Generator:
        digest = hashlib.blake2b((self._prefix + key).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Stage(ABC, Generic[PreparedT, BatchT]):
    """One training stage on the model at `folder`; `module` holds exactly the weights that are trained."""

    name: ClassVar[StageName]
    roles: ClassVar[Mapping[EmbedMode, tuple[str, ...]]]  # what it reads, by embed mode
    encoders: ClassVar[Mapping[EmbedMode, str]]  # part of the model whose fingerprint the data of a mode must carry
    parts: ClassVar[tuple[str, ...]]  # of the model folder
    tasks: ClassVar[tuple[Task, ...]]  # samples of other tasks are left out
    weights: ClassVar[Mapping[str, float]]  # of the loss parts

    module: nn.Module

    @staticmethod
    @abstractmethod
    def lengths(columns: Mapping[str, pa.ChunkedArray]) -> Int[np.ndarray, " rows"]:
        """Tokens of each row, by which batches are formed; 0 where a row lacks what the stage needs."""

    @abstractmethod
    def prepare(self, row: EmbeddedRow) -> PreparedT:
        """What training needs of one row. Raises: InputError if the row lacks it."""

    @abstractmethod
    def collate(self, samples: Sequence[PreparedT]) -> BatchT:
        """A batch of prepared samples, in their order."""

    @abstractmethod
    def loss(self, batch: BatchT, random: StepRandom) -> dict[str, LossPart]:
        """Every part of `weights`, as sum and count over the batch."""

    def baseline(self, train: Sequence[PreparedT], validation: Sequence[PreparedT]) -> dict[str, float]:
        """Losses of a prediction that needs no learning, to compare validation losses with."""
        del train, validation
        return {}

    def pictures(self, samples: Sequence[PreparedT]) -> list[tuple[Image.Image, Image.Image]]:
        """(target, prediction) pairs to look at; empty if the stage makes none."""
        del samples
        return []


@dataclass(frozen=True)
class PreparedConversation:
    """A tokenised conversation with the stored embeddings of its images, in order of appearance."""

    conversation: Conversation
    inputs: Float[Tensor, "inputs hidden"]
    targets: Float[Tensor, "targets hidden"]


class AutoregressiveStage(Stage[PreparedConversation, ConversationBatch]):
    """Phase 1: the language model, query embeddings and vision head learn to predict image embeddings.

    The vision tower is frozen, and absent here: images come as stored embeddings.
    """

    name = "ar"
    roles: ClassVar = {"vision": ("input", "target")}
    encoders: ClassVar = {"vision": "vision"}
    parts = ("autoregressive",)
    tasks = ("generation", "editing", "understanding")
    weights = AUTOREGRESSIVE_WEIGHTS

    def __init__(self, folder: Path) -> None:
        model = load_model(folder, parts=self.parts)
        assert model.autoregressive is not None
        assert model.tokenizer is not None
        self.module: AutoregressiveModel = model.autoregressive
        self._num_target_tokens = model.manifest.geometry.num_target_tokens
        self.module.qwen.model.visual = nn.Identity()
        self._tokenizer = model.tokenizer
        self._nothing = torch.zeros(0, self.module.hidden_size)

    @staticmethod
    def lengths(columns: Mapping[str, pa.ChunkedArray]) -> Int[np.ndarray, " rows"]:
        return columns["num_tokens"].to_numpy().astype(np.int64)

    def prepare(self, row: EmbeddedRow) -> PreparedConversation:
        images = sorted([*row.images["input"], *row.images["target"]], key=lambda image: image.index)
        conversation = encode_conversation(self._tokenizer, row.messages, [image.grid for image in images])
        return PreparedConversation(conversation, self._join(row.images["input"]), self._join(row.images["target"]))

    def collate(self, samples: Sequence[PreparedConversation]) -> ConversationBatch:
        return collate_conversations(
            [sample.conversation for sample in samples],
            torch.cat([sample.inputs for sample in samples]),
            torch.cat([sample.targets for sample in samples]),
            pad_token_id=int(self._tokenizer.convert_tokens_to_ids("<|endoftext|>")),
        )

    def loss(self, batch: ConversationBatch, random: StepRandom) -> dict[str, LossPart]:
        del random
        output = self.module(batch)
        return autoregressive_losses(output.logits, output.labels, output.predictions, batch.target_embeddings)

    def baseline(
        self, train: Sequence[PreparedConversation], validation: Sequence[PreparedConversation]
    ) -> dict[str, float]:
        """`mse_mean_embedding`: always predicting, at each place of the image, the mean of training targets there."""
        known, held_out = self._targets(train), self._targets(validation)
        if not len(known) or not len(held_out):
            return {}
        return {"mse_mean_embedding": float((held_out - known.mean(dim=0)).square().mean())}

    def _targets(self, samples: Sequence[PreparedConversation]) -> Float[Tensor, "images tokens hidden"]:
        targets = torch.cat([self._nothing, *[sample.targets.float() for sample in samples]])
        return targets.unflatten(0, (-1, self._num_target_tokens))

    def _join(self, images: Sequence[StoredImage]) -> Float[Tensor, "tokens hidden"]:
        if not images:
            return self._nothing
        return torch.cat([image.values for image in sorted(images, key=lambda image: image.index)])


@dataclass(frozen=True)
class PreparedPicture:
    """The stored embedding of an image and its latents."""

    key: str
    embeddings: Float[Tensor, "tokens embedding"]
    latents: Float[Tensor, "channels height width"]


@dataclass(frozen=True)
class PictureBatch:
    """Pictures of one size."""

    keys: tuple[str, ...]
    embeddings: Float[Tensor, "batch tokens embedding"]
    latents: Float[Tensor, "batch channels height width"]


class GenerationDecoderStage(Stage[PreparedPicture, PictureBatch]):
    """Phase 2: the generation decoder learns to turn an image's own embeddings back into its latents.

    Source: Nexus-Gen, arXiv 2504.21356, section 3.3; flow matching with one noise level per sample.
    """

    name = "generation_decoder"
    roles: ClassVar = {"vision": ("crop",), "latents": ("latents",)}
    encoders: ClassVar = {"vision": "vision", "latents": "vae"}
    parts = ("generation_decoder", "vae")
    tasks = ("generation", "editing")
    weights = FLOW_WEIGHTS

    def __init__(self, folder: Path, levels: LevelDensity) -> None:
        self._model: Model = load_model(folder, parts=self.parts)
        assert self._model.generation_decoder is not None
        assert self._model.scheduler is not None
        self.module: VisionDecoder = self._model.generation_decoder
        self._levels = levels
        self._table = training_table(self._model.scheduler)

    @staticmethod
    def lengths(columns: Mapping[str, pa.ChunkedArray]) -> Int[np.ndarray, " rows"]:
        grids = zip(columns["crop_grid"].to_pylist(), columns["latents_grid"].to_pylist(), strict=True)
        return np.array(
            [_num_tokens(crop[-2:]) + _num_tokens(latent[-2:]) // 4 if crop and latent else 0 for crop, latent in grids]
        )

    def prepare(self, row: EmbeddedRow) -> PreparedPicture:
        """The last image of the sample that has both: the assistant's."""
        latents = {image.index: image for image in row.images["latents"]}
        both = [image for image in row.images["crop"] if image.index in latents]
        if not both:
            raise InputError(
                f"sample {row.key}: no image has both a crop embedding and latents: "
                "embed it again in the modes vision and latents"
            )
        return PreparedPicture(row.key, both[-1].values, latents[both[-1].index].values)

    def collate(self, samples: Sequence[PreparedPicture]) -> PictureBatch:
        return PictureBatch(
            tuple(sample.key for sample in samples),
            torch.stack([sample.embeddings for sample in samples]).float(),
            torch.stack([sample.latents for sample in samples]).float(),
        )

    def loss(self, batch: PictureBatch, random: StepRandom) -> dict[str, LossPart]:
        levels, noise = self._draw(batch, random)
        noisy = interpolate(batch.latents, noise, levels.sigmas)
        assert self._model.pooled_prompt is not None
        prediction = self.module(noisy, levels.timesteps, batch.embeddings, self._model.pooled_prompt)
        return flow_loss(prediction, velocity_target(batch.latents, noise), levels.weights)

    def pictures(self, samples: Sequence[PreparedPicture]) -> list[tuple[Image.Image, Image.Image]]:
        batch = self.collate(samples)
        vae = self._model.autoencoder
        assert vae is not None
        targets = from_pixels(decode_latents(vae, batch.latents))
        height, width = targets[0].height, targets[0].width
        made = decode_embeddings(self._model, batch.embeddings, seeds=range(len(samples)), size=(height, width))
        return list(zip(targets, made, strict=True))

    def _draw(self, batch: PictureBatch, random: StepRandom) -> tuple[Levels, Float[Tensor, "batch *latent"]]:
        """A noise level and noise for each sample, from its own generator."""
        levels, noise = [], []
        for key in batch.keys:
            generator = random.generator(key)
            levels.append(sample_levels(self._table, 1, generator, self._levels))
            noise.append(torch.randn(batch.latents.shape[1:], generator=generator))
        joined = Levels(
            torch.cat([level.sigmas for level in levels]),
            torch.cat([level.timesteps for level in levels]),
            torch.cat([level.weights for level in levels]),
        )
        return joined, torch.stack(noise)


def _num_tokens(grid: Sequence[int]) -> int:
    height, width = grid
    return height * width


AnyStage = AutoregressiveStage | GenerationDecoderStage
STAGES: Mapping[StageName, type[AnyStage]] = {"ar": AutoregressiveStage, "generation_decoder": GenerationDecoderStage}


def build_stage(name: StageName, folder: Path, levels: LevelDensity) -> AnyStage:
    """The stage on a model folder. Raises: ModelError if the folder lacks a part that the stage needs."""
    if name == "ar":
        return AutoregressiveStage(folder)
    return GenerationDecoderStage(folder, levels)
