"""Training stages: what each reads, which weights it trains, and its loss for a batch. No Ray here.

A stage turns an embedded row into a prepared sample (once, it is kept), prepared samples into a batch, and a batch into
named loss parts, each a sum over a count, so that a step is normalised by its counts over all ranks.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int, Shaped
from PIL import Image
from torch import Tensor, nn

from nexusgen.errors import InputError, ModelError
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
from nexusgen.model.autoregressive import (
    AutoregressiveModel,
    ConversationBatch,
    collate_conversations,
    target_positions,
)
from nexusgen.model.decoder import ConditionerKind, VisionDecoder
from nexusgen.model.weights import DRAWING_PARTS, VISION_TOWER, State, load_hollow
from nexusgen.prompts import IGNORED_LABEL, Conversation, encode_conversation
from nexusgen.sampling import decode_embeddings
from nexusgen.schema import EmbedMode, Message, Task
from pipelines.lora import LoraConfig, add_adapters, start_adapters
from pipelines.parallel import fill_module

StageName = Literal["ar", "generation_decoder", "editing_decoder"]
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
    """One training stage on the model at `folder`; those weights of `module` are trained that require a gradient.

    The module is on meta until `fill` gives it its memory and weights, so that it can be laid over ranks before.
    """

    name: ClassVar[StageName]
    roles: ClassVar[Mapping[EmbedMode, tuple[str, ...]]]  # what it reads, by embed mode
    encoders: ClassVar[Mapping[EmbedMode, str]]  # part of the model whose fingerprint the data of a mode must carry
    parts: ClassVar[tuple[str, ...]]  # of the model folder
    tasks: ClassVar[tuple[Task, ...]]  # samples of other tasks are left out
    weights: ClassVar[Mapping[str, float]]  # of the loss parts

    module: nn.Module
    _start: State  # the module's first tensors, mapped from files; empty once it is filled

    @classmethod
    def missing_parts(cls, present: Collection[str]) -> list[str]:
        """The parts that a training of this stage needs and a model that holds the parts `present` lacks."""
        return [part for part in cls.parts if part not in present]

    @classmethod
    @abstractmethod
    def lengths(cls, columns: Mapping[str, pa.ChunkedArray]) -> Int[np.ndarray, " rows"]:
        """Tokens of each row, by which batches are formed; 0 where a row lacks what the stage needs."""

    @abstractmethod
    def prepare(self, row: EmbeddedRow) -> PreparedT:
        """What training needs of one row. Raises: InputError if the row lacks it."""

    @abstractmethod
    def collate(self, samples: Sequence[PreparedT]) -> BatchT:
        """A batch of prepared samples, in their order."""

    @abstractmethod
    def counts(self, batch: BatchT) -> dict[str, int]:
        """The counts of `loss`, known before its forward."""

    @abstractmethod
    def loss(self, batch: BatchT, random: StepRandom) -> dict[str, LossPart]:
        """Every part of `weights`, as sum and count over the batch."""

    def fill(self, device: torch.device, *, skip_trained: bool = False) -> None:
        """Put the stage on a device, the module with its first weights; `skip_trained` leaves out what is trained.

        Raises: ModelError as `fill_module`.
        """
        fill_module(self.module, self._start, device, skip_trained=skip_trained)
        self._start = {}

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

    The vision tower is frozen, and absent here: images come as stored embeddings. With LoRA the language model is
    frozen, too, and learns through adapters.
    """

    name = "ar"
    roles: ClassVar = {"vision": ("input", "target")}
    encoders: ClassVar = {"vision": "vision", "images": "vision"}
    parts = ("autoregressive",)
    tasks = ("generation", "editing", "understanding")
    weights = AUTOREGRESSIVE_WEIGHTS

    def __init__(self, folder: Path, lora: LoraConfig | None = None, frozen_dtype: torch.dtype = torch.float32) -> None:
        model, state = load_hollow(folder, "autoregressive")
        assert model.autoregressive is not None
        assert model.tokenizer is not None
        self.module: AutoregressiveModel = model.autoregressive
        self._num_target_tokens = model.manifest.geometry.num_target_tokens
        self.module.qwen.model.visual = nn.Identity()
        self._start = {name: tensor for name, tensor in state.items() if not name.startswith(VISION_TOWER)}
        if lora is not None:
            add_adapters(self.module, lora, frozen_dtype)
            self._start = start_adapters(self.module, self._start)
        self._tokenizer = model.tokenizer
        self._nothing = torch.zeros(0, self.module.hidden_size)

    @classmethod
    def lengths(cls, columns: Mapping[str, pa.ChunkedArray]) -> Int[np.ndarray, " rows"]:
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

    def counts(self, batch: ConversationBatch) -> dict[str, int]:
        predicted = batch.labels[:, 1:]  # nothing comes before the first token
        is_text = (predicted != IGNORED_LABEL) & ~target_positions(predicted, self.module.image_token_id)
        targets = batch.target_embeddings
        return {"ce": int(is_text.sum()), "mse": targets.numel(), "cosine": len(targets)}

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
        if len(images) <= 1:
            return images[0].values if images else self._nothing
        return torch.cat([image.values for image in sorted(images, key=lambda image: image.index)])


@dataclass(frozen=True)
class PreparedPicture:
    """What a decoder draws from, the latents that it is to draw, and what it keeps to, if it edits."""

    key: str
    embeddings: Float[Tensor, "tokens embedding"]
    latents: Float[Tensor, "channels height width"]
    reference: Float[Tensor, "reference_tokens embedding"] | None = None


@dataclass(frozen=True)
class PictureBatch:
    """Pictures of one size, all with a reference or none."""

    keys: tuple[str, ...]
    embeddings: Float[Tensor, "batch tokens embedding"]
    latents: Float[Tensor, "batch channels height width"]
    reference: Float[Tensor, "batch reference_tokens embedding"] | None = None

    def to(self, device: torch.device | str) -> PictureBatch:
        reference = self.reference.to(device) if self.reference is not None else None
        return PictureBatch(self.keys, self.embeddings.to(device), self.latents.to(device), reference)


@dataclass(frozen=True)
class Draws:
    """What chance decides for the samples of a batch: noise levels, noise, and who is drawn without its image."""

    levels: Levels
    noise: Float[Tensor, "batch *latent"]
    is_dropped: Bool[Tensor, " batch"]


class DecoderStage(Stage[PreparedPicture, PictureBatch]):
    """Phase 2: a decoder learns to turn embeddings of an image into its latents. Flow matching, one level per sample.

    In training a share `conditioning_dropout` of the samples is drawn under the model's negative context in place of
    the image's embeddings, exactly as the unconditional pass of two-pass guidance is at inference, so that guidance
    finds a decoder that knows that pass (classifier-free guidance, arXiv 2207.12598, section 3.2). Which samples is
    drawn from each one's own random numbers.
    """

    kind: ClassVar[ConditionerKind]
    embeddings_role: ClassVar[str]
    weights = FLOW_WEIGHTS

    def __init__(self, folder: Path, levels: LevelDensity, conditioning_dropout: float = 0.0) -> None:
        """Raises: ModelError if the folder lacks a part, or the negative context that dropout needs."""
        self._model, self._start = load_hollow(folder, self.name, ("vae",))
        assert self._model.scheduler is not None
        if conditioning_dropout and self._model.negative_context is None:
            raise ModelError(
                f"conditioning_dropout={conditioning_dropout:g}: {folder / 'prompt_constants.safetensors'} holds no "
                "negative_context to draw the dropped samples under; import the model again with --flux and a "
                "FLUX.1-dev folder that holds the text encoders, or set conditioning_dropout=0"
            )
        self.module: VisionDecoder = getattr(self._model, self.name)
        self._levels = levels
        self._table = training_table(self._model.scheduler)
        self._conditioning_dropout = conditioning_dropout

    def fill(self, device: torch.device, *, skip_trained: bool = False) -> None:
        super().fill(device, skip_trained=skip_trained)
        model = self._model
        assert model.autoencoder is not None
        model.device, model.autoencoder = device, model.autoencoder.to(device)
        for name in ("pooled_prompt", "negative_context"):
            constant = getattr(model, name)
            setattr(model, name, constant.to(device) if constant is not None else None)

    @classmethod
    def lengths(cls, columns: Mapping[str, pa.ChunkedArray]) -> Int[np.ndarray, " rows"]:
        """Tokens that the transformer attends to: one for each 2x2 patch of latents, and those of the embeddings."""
        roles = [role for names in cls.roles.values() for role in names]
        of_roles = np.array(
            [
                [_num_tokens(grids[-2:]) // (4 if role == "latents" else 1) if grids else 0 for grids in column]
                for role, column in ((role, columns[f"{role}_grid"].to_pylist()) for role in roles)
            ],
            dtype=np.int64,
        )
        return np.where((of_roles > 0).all(axis=0), of_roles.sum(axis=0), 0)

    def prepare(self, row: EmbeddedRow) -> PreparedPicture:
        """The last image of the sample that has both embeddings and latents: the assistant's."""
        latents = {image.index: image for image in row.images["latents"]}
        both = [image for image in row.images[self.embeddings_role] if image.index in latents]
        if not both:
            mode = next(mode for mode, roles in self.roles.items() if self.embeddings_role in roles)
            raise InputError(
                f"sample {row.key}: no image has both {self.embeddings_role} embeddings and latents: "
                f"embed it again in the modes {mode} and latents"
            )
        return PreparedPicture(row.key, both[-1].values, latents[both[-1].index].values, self._reference(row))

    def _reference(self, row: EmbeddedRow) -> Float[Tensor, "reference_tokens embedding"] | None:
        del row
        return None

    def collate(self, samples: Sequence[PreparedPicture]) -> PictureBatch:
        references = [sample.reference for sample in samples if sample.reference is not None]
        return PictureBatch(
            tuple(sample.key for sample in samples),
            torch.stack([sample.embeddings for sample in samples]).float(),
            torch.stack([sample.latents for sample in samples]).float(),
            torch.stack(references).float() if references else None,
        )

    def counts(self, batch: PictureBatch) -> dict[str, int]:
        return {"flow": batch.latents.numel()}

    def loss(self, batch: PictureBatch, random: StepRandom) -> dict[str, LossPart]:
        draws = self._draw(batch, random)
        noisy = interpolate(batch.latents, draws.noise, draws.levels.sigmas)
        prediction = self._predict(batch, noisy, draws)
        return flow_loss(prediction, velocity_target(batch.latents, draws.noise), draws.levels.weights)

    def pictures(self, samples: Sequence[PreparedPicture]) -> list[tuple[Image.Image, Image.Image]]:
        batch = self.collate(samples).to(self._model.device)
        vae = self._model.autoencoder
        assert vae is not None
        targets = from_pixels(decode_latents(vae, batch.latents))
        made = decode_embeddings(
            self._model,
            batch.embeddings,
            seeds=range(len(samples)),
            size=(targets[0].height, targets[0].width),
            decoder=self.kind,
            reference=batch.reference,
        )
        return list(zip(targets, made, strict=True))

    def _predict(
        self, batch: PictureBatch, noisy: Float[Tensor, "batch *latent"], draws: Draws
    ) -> Float[Tensor, "batch *latent"]:
        """Velocities, of dropped samples under the negative context.

        With dropout both passes are always made, if need be of the first sample as a stand-in whose velocity isn't
        used: ranks that share the weights of a sharded decoder must meet in each.
        """
        timesteps, pooled = draws.levels.timesteps.to(noisy.device), self._model.pooled_prompt
        assert pooled is not None
        if not self._is_dropping:
            return self.module(noisy, timesteps, batch.embeddings, pooled, batch.reference)
        negative = self._model.negative_context
        assert negative is not None
        kept, dropped = (torch.nonzero(mask)[:, 0] for mask in (~draws.is_dropped, draws.is_dropped))
        stand_in = torch.zeros(1, dtype=torch.int64)
        rows = kept if len(kept) else stand_in
        reference = batch.reference[rows] if batch.reference is not None else None
        conditional = self.module(noisy[rows], timesteps[rows], batch.embeddings[rows], pooled, reference)
        rows = dropped if len(dropped) else stand_in
        unconditional = self.module.velocity(
            noisy[rows],
            timesteps[rows],
            negative.expand(len(rows), -1, -1),
            pooled,
            torch.zeros(negative.shape[1], 3),  # rope ids, as in `VisionDecoder.velocity_function`
        )
        places = torch.empty(len(noisy), dtype=torch.int64)
        places[kept] = torch.arange(len(kept))
        places[dropped] = len(conditional) + torch.arange(len(dropped))
        return torch.cat([conditional, unconditional])[places]

    @property
    def _is_dropping(self) -> bool:
        """Held-out samples always keep their image."""
        return self._conditioning_dropout > 0 and self.module.training

    def _draw(self, batch: PictureBatch, random: StepRandom) -> Draws:
        """A noise level, noise, and whether its image is dropped, for each sample from its own generator."""
        levels, noise, chances = [], [], []
        for key in batch.keys:
            generator = random.generator(key)
            levels.append(sample_levels(self._table, 1, generator, self._levels))
            noise.append(torch.randn(batch.latents.shape[1:], generator=generator))
            chances.append(torch.rand(1, generator=generator))  # last: levels and noise don't depend on dropout
        joined = Levels(
            torch.cat([level.sigmas for level in levels]),
            torch.cat([level.timesteps for level in levels]),
            torch.cat([level.weights for level in levels]),
        )
        stacked = torch.stack(noise).to(batch.latents.device)
        return Draws(joined, stacked, torch.cat(chances) < self._conditioning_dropout)


class GenerationDecoderStage(DecoderStage):
    """Phase 2 of generation: the decoder learns to turn an image's own embeddings back into its latents.

    Source: Nexus-Gen, arXiv 2504.21356, section 3.3.
    """

    name = "generation_decoder"
    kind = "generation"
    embeddings_role = "crop"
    roles: ClassVar = {"vision": ("crop",), "latents": ("latents",)}
    encoders: ClassVar = {"vision": "vision", "latents": "vae"}
    parts = ("generation_decoder", "vae")
    tasks = ("generation", "editing")


class EditingDecoderStage(DecoderStage):
    """Phase 2 of editing: the decoder learns to draw an edited image from what the trained autoregressive model
    predicts for it, beside the embeddings of the image that was edited, its reference.

    The last image that the assistant draws is learned, and the first that the user shows is its reference, as in the
    released preparation of this data, which knows no more than one of each. At inference, too, there is one. Samples
    without a reference, of task generation, are left out.

    A model without an editing decoder gets one to start from, see `start_editing_decoder`.
    Source: Nexus-Gen, arXiv 2504.21356, section 3.3, and its `train/decoder/editing_trainer.py`.
    """

    name = "editing_decoder"
    kind = "editing"
    embeddings_role = "predicted"
    roles: ClassVar = {"predicted": ("predicted", "reference"), "latents": ("latents",)}
    encoders: ClassVar = {"predicted": "autoregressive", "latents": "vae"}
    parts = ("editing_decoder", "vae")
    tasks = ("editing",)

    @classmethod
    def missing_parts(cls, present: Collection[str]) -> list[str]:
        missing = super().missing_parts(present)
        can_start = all(part in present for part in DRAWING_PARTS)
        return [part for part in missing if part != "editing_decoder" or not can_start]

    def _reference(self, row: EmbeddedRow) -> Float[Tensor, "reference_tokens embedding"]:
        if not row.images["reference"]:
            raise InputError(
                f"sample {row.key}: no image of the user has reference embeddings: embed it again in mode predicted"
            )
        return min(row.images["reference"], key=lambda image: image.index).values


def _num_tokens(grid: Sequence[int]) -> int:
    height, width = grid
    return height * width


AnyStage = AutoregressiveStage | GenerationDecoderStage | EditingDecoderStage
STAGES: Mapping[StageName, type[AnyStage]] = {
    "ar": AutoregressiveStage,
    "generation_decoder": GenerationDecoderStage,
    "editing_decoder": EditingDecoderStage,
}


def hollow_stage(
    name: StageName,
    folder: Path,
    levels: LevelDensity,
    conditioning_dropout: float = 0.0,
    lora: LoraConfig | None = None,
    frozen_dtype: torch.dtype = torch.float32,
) -> AnyStage:
    """The stage on a model folder, its module without weights until `fill`; levels and dropout, in [0, 1), are a
    decoder stage's.

    `lora` is stage ar's: its adapters, on a frozen language model whose matrices are kept in `frozen_dtype`.

    Raises: ModelError if the folder lacks a part, or a constant, that the stage needs, or tensors don't fit.
    """
    if name == "ar":
        return AutoregressiveStage(folder, lora, frozen_dtype)
    if name == "generation_decoder":
        return GenerationDecoderStage(folder, levels, conditioning_dropout)
    return EditingDecoderStage(folder, levels, conditioning_dropout)


def build_stage(
    name: StageName,
    folder: Path,
    levels: LevelDensity,
    conditioning_dropout: float = 0.0,
    lora: LoraConfig | None = None,
    frozen_dtype: torch.dtype = torch.float32,
) -> AnyStage:
    """The stage as `hollow_stage` makes it, whole and on the CPU. Raises: the same."""
    stage = hollow_stage(name, folder, levels, conditioning_dropout, lora, frozen_dtype)
    stage.fill(torch.device("cpu"))
    return stage
