"""The sizes that a plan multiplies: bytes of an embedded image, and arithmetic of a sample, by what it goes through.

The released model's are constants, checked against its own modules by a test; any other model's come from its folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nexusgen import defaults
from nexusgen.schema import StoredDtype, Task
from pipelines.flops import ModelWork
from pipelines.lora import LoraConfig

if TYPE_CHECKING:
    from nexusgen.model.autoregressive import AutoregressiveModel

BF16_BYTES, FP32_BYTES = 2, 4
STATE_NUMBERS = 3  # in a checkpoint for each trained parameter: weight and both of AdamW's moments, fp32


@dataclass(frozen=True)
class ModelSizes:
    """What a plan needs to know of a model."""

    hidden: int  # numbers of an embedding
    target_tokens: int
    reference_tokens: int
    max_input_tokens: int  # of a user's picture
    patches_per_token: int
    latents: tuple[int, int, int]  # channels, height, width
    latent_tokens: int  # of the decoder's transformer
    image_pixels: int  # of a picture that the decoder draws
    steps: int  # of drawing one
    passes: int  # of a step: 2 with guidance by two passes
    tower_parameters: int
    autoencoder_flops: float  # of encoding a picture of the decoder's size
    autoregressive: ModelWork
    decoder: ModelWork
    editing_decoder: ModelWork
    parameters: Mapping[str, int]  # trained ones by stage, without LoRA
    adapted: Mapping[str, int]  # of the language model's linear layers, by name: numbers in and out, of all layers
    head: int  # parameters of the vision head
    queries: int  # of the query embeddings, which multiply no token
    model_bytes: int  # of a published folder

    @property
    def latent_numbers(self) -> int:
        return math.prod(self.latents)

    def trained_parameters(self, stage: str, lora: LoraConfig | None) -> int:
        """What a stage trains; with LoRA the adapters, and in full the vision head and the query embeddings."""
        if lora is None:
            return self.parameters[stage]
        return self.adapter_parameters(lora) + self.head + self.queries

    def adapter_parameters(self, lora: LoraConfig) -> int:
        """Of a layer of `in` and `out` numbers: rank x (in + out)."""
        return lora.rank * sum(self.adapted[target] for target in lora.targets)

    def work(self, stage: str, lora: LoraConfig | None) -> ModelWork:
        """The arithmetic of a stage. With LoRA all but the head is frozen, and adapters come to it."""
        works = {
            "ar": self.autoregressive,
            "generation_decoder": self.decoder,
            "editing_decoder": self.editing_decoder,
        }
        work = works[stage]
        if lora is None:
            return work
        return replace(work, trained=self.adapter_parameters(lora) + self.head, frozen=work.trained - self.head)

    def tower_flops(self, tokens: float) -> float:
        """Of the vision tower over a picture of so many tokens: 2 for each parameter and patch (attention left out)."""
        return 2.0 * self.tower_parameters * tokens * self.patches_per_token

    def array_bytes(self, tokens: float, dtype: StoredDtype) -> float:
        """Of stored embeddings; int8 has a float32 for each token beside its numbers."""
        return tokens * (self.hidden + FP32_BYTES if dtype == "int8" else self.hidden * BF16_BYTES)


# Qwen2.5-VL-7B and FLUX.1 [dev] with Nexus-Gen's additions; parameters as their modules hold them.
RELEASED = ModelSizes(
    hidden=defaults.HIDDEN_SIZE,
    target_tokens=(defaults.TARGET_SIZE // (defaults.PATCH_SIZE * defaults.MERGE_SIZE)) ** 2,
    reference_tokens=(defaults.REFERENCE_SIZE // (defaults.PATCH_SIZE * defaults.MERGE_SIZE)) ** 2,
    max_input_tokens=defaults.MAX_INPUT_PIXELS // (defaults.PATCH_SIZE * defaults.MERGE_SIZE) ** 2,
    patches_per_token=defaults.MERGE_SIZE**2,
    latents=(16, 64, 64),
    latent_tokens=32 * 32,
    image_pixels=512 * 512,
    steps=defaults.NUM_INFERENCE_STEPS,
    passes=2,
    tower_parameters=676_550_144,
    autoencoder_flops=1.118e12,
    autoregressive=ModelWork(trained=7_083_464_192, frozen=0, num_layers=28, hidden=3584),
    decoder=ModelWork(trained=6_500_971_840, frozen=0, num_layers=57, hidden=3072),
    editing_decoder=ModelWork(trained=6_828_421_440, frozen=0, num_layers=57, hidden=3072),
    parameters={
        "ar": 7_628_751_872,
        "generation_decoder": 11_932_890_176,
        "editing_decoder": 12_260_339_776,
    },
    adapted={
        "q_proj": 200_704,
        "k_proj": 114_688,
        "v_proj": 114_688,
        "o_proj": 200_704,
        "gate_proj": 630_784,
        "up_proj": 630_784,
        "down_proj": 630_784,
    },
    head=12_845_056,
    queries=290_304,
    model_bytes=BF16_BYTES * (8_305_302_016 + 11_932_890_176 + 12_260_339_776 + 83_819_683),
)


@dataclass(frozen=True)
class Shares:
    """Of the samples, by task; they add up to 1."""

    understanding: float
    generation: float
    editing: float

    @classmethod
    def of(cls, weights: Mapping[Task, float]) -> Shares:
        """From numbers in any unit."""
        total = sum(weights.values())
        return cls(*(weights.get(task, 0.0) / total for task in ("understanding", "generation", "editing")))

    @property
    def drawn(self) -> float:
        """Samples whose assistant draws: a picture each."""
        return self.generation + self.editing

    @property
    def shown(self) -> float:
        """Samples whose user shows a picture."""
        return self.understanding + self.editing


def sizes_of(folder: Path) -> ModelSizes:
    """The sizes of a model folder, from its configurations alone. Raises: ModelError if it lacks a part."""
    import torch
    from torch import nn

    from nexusgen.model.autoencoder import latent_shape, load_autoencoder
    from nexusgen.model.autoregressive import AutoregressiveModel
    from nexusgen.model.decoder import VisionDecoder
    from nexusgen.model.manifest import read_manifest
    from nexusgen.model.weights import hollow_part
    from pipelines.flops import work_of

    manifest = read_manifest(folder)
    geometry = manifest.geometry
    model = hollow_part(folder, manifest, "autoregressive")
    assert isinstance(model, AutoregressiveModel)
    tower_parameters = _count(model.qwen.model.visual)
    hidden = model.hidden_size
    model.qwen.model.visual = nn.Identity()
    decoder = hollow_part(folder, manifest, "generation_decoder")
    assert isinstance(decoder, VisionDecoder)
    autoencoder = load_autoencoder(folder / "vae", torch.float32, "cpu")
    channels, height, width = latent_shape(autoencoder, manifest.image_size)
    reference_tokens = math.prod(geometry.reference_grid)
    # An encoder by patches multiplies each with its own matrix; FLUX's, with its convolutions, is known at 512x512.
    pixels = math.prod(manifest.image_size)
    is_flux = type(autoencoder).__name__ == "AutoencoderKL"
    by_patches = 2.0 * _count(autoencoder) * height * width / 4
    scale = pixels / RELEASED.image_pixels
    # A decoder for edits starts from the other's transformer; its merger goes through embeddings alone.
    parameters = {"ar": _count(model), "generation_decoder": _count(decoder), "editing_decoder": _count(decoder)}
    return ModelSizes(
        hidden=hidden,
        target_tokens=geometry.num_target_tokens,
        reference_tokens=reference_tokens,
        max_input_tokens=min(geometry.max_input_pixels, 4 * pixels) // geometry.factor**2,
        patches_per_token=geometry.merge_size**2,
        latents=(channels, height, width),
        latent_tokens=height * width // 4,
        image_pixels=pixels,
        steps=manifest.num_inference_steps,
        passes=1 if manifest.true_cfg_scale == 1.0 else 2,
        tower_parameters=tower_parameters,
        autoencoder_flops=RELEASED.autoencoder_flops * scale if is_flux else by_patches,
        autoregressive=work_of(model),
        decoder=work_of(decoder),
        editing_decoder=work_of(decoder),
        parameters=parameters,
        adapted=adapted_of(model),
        head=_count(model.vision_head),
        queries=_count(model.image_prefill_embeds),
        model_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    )


def adapted_of(model: AutoregressiveModel) -> dict[str, int]:
    """Numbers in and out of the language model's linear layers, by name."""
    from torch import nn

    found: dict[str, int] = {}
    for name, part in model.qwen.model.language_model.named_modules():
        if isinstance(part, nn.Linear):
            kind = name.rpartition(".")[2]
            found[kind] = found.get(kind, 0) + part.in_features + part.out_features
    return found


def _count(module: object) -> int:
    return sum(parameter.numel() for parameter in module.parameters())  # type: ignore[attr-defined]
