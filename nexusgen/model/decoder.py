"""Vision decoder: a conditioner and diffusers' FLUX transformer, from image embeddings to the velocity of latents.

Folder layout: `conditioner.json` (DecoderConfig), `conditioner.safetensors`, `transformer/` as diffusers saves it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks import apply_layerwise_casting
from diffusers.models.embeddings import CombinedTimestepGuidanceTextProjEmbeddings
from huggingface_hub import save_torch_state_dict
from jaxtyping import Float, Shaped
from pydantic import ValidationError, model_validator
from torch import Tensor, nn

from nexusgen import defaults
from nexusgen.config import Config
from nexusgen.errors import ModelError, ShapeError
from nexusgen.flow_matching import VelocityFunction, guide
from nexusgen.model.conditioners import EditingConditioner, GenerationConditioner, MergerConfig
from nexusgen.model.manifest import Numerics
from nexusgen.model.tensors import iterate_file, iterate_tensors, load_strictly, save_tensors
from nexusgen.positions import TokenPositions, flux_image_ids, flux_token_ids

ConditionerKind = Literal["generation", "editing"]
# How the linear layers of the transformer's blocks are stored: a byte for each number, brought to the decoder's dtype
# while a layer computes. Everything else keeps the dtype.
Quantisation = Literal["fp8"]
QUANTISED_DTYPES: Mapping[Quantisation, torch.dtype] = {"fp8": torch.float8_e4m3fn}
_QUANTISED = re.compile(r"^transformer\.(single_)?transformer_blocks\.\d+\.(?!attn\.norm_)")

_TOKENS_PER_SIDE = defaults.TARGET_SIZE // (defaults.PATCH_SIZE * defaults.MERGE_SIZE)
_SINUSOID_SIZE = 256  # FLUX.1 [dev], fixed in diffusers' class
# This frequency lies almost in the middle between two fp32 numbers (0.479 of the way up). The machine that recorded the
# reference's predictions took the upper one: with it all of them agree to 1e-6, without it some differ by 6e-6.
_ROUNDED_UP = 12
TRANSFORMER_STEM = "diffusion_pytorch_model"


class DecoderConfig(Config):
    """What a decoder folder's `conditioner.json` says; the defaults are the released generation decoder's."""

    conditioner: ConditionerKind = "generation"
    embedding_dim: int = 3584  # hidden size of Qwen2.5-VL-7B
    context_dim: int = 4096  # `joint_attention_dim` of FLUX.1 [dev]
    token_grid: tuple[int, int] = (_TOKENS_PER_SIDE, _TOKENS_PER_SIDE)  # (height, width) of the image's embeddings
    token_positions: TokenPositions = "zeros"
    guidance_scale: float = defaults.GUIDANCE_SCALE
    merger: MergerConfig | None = None  # of an editing conditioner, which must have one

    @model_validator(mode="after")
    def _check(self) -> DecoderConfig:
        if (self.merger is not None) != (self.conditioner == "editing"):
            raise ValueError(
                f"conditioner is {self.conditioner}: merger belongs to an editing conditioner, and only there"
            )
        return self


# Source: the transformer's config.json on FLUX.1 [dev]'s model page.
RELEASED_TRANSFORMER: Mapping[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}


def released_decoder_config(conditioner: ConditionerKind = "generation") -> tuple[DecoderConfig, dict[str, Any]]:
    """Sizes of a released decoder: its own config and that of its FLUX.1 [dev] transformer."""
    positions: TokenPositions = "zeros" if conditioner == "generation" else "grid"
    merger = MergerConfig() if conditioner == "editing" else None
    return DecoderConfig(conditioner=conditioner, token_positions=positions, merger=merger), dict(RELEASED_TRANSFORMER)


class ModulationEmbedding(nn.Module):
    """Timestep, guidance and pooled prompt as the vector that modulates every block; stands in for diffusers' module.

    diffusers rounds the timestep to the model's dtype before it is embedded; the released model embeds it in fp32 (in
    bf16, 613.25 would become 612 and the prediction be off by up to 17 %). The transformer hands `pooled_projections`
    through as they are, so `embed` makes the vector beforehand and `forward` only passes it on. Parameters and their
    names are those of the module it replaces.
    """

    def __init__(self, plain: CombinedTimestepGuidanceTextProjEmbeddings) -> None:
        super().__init__()
        self.timestep_embedder = plain.timestep_embedder
        self.guidance_embedder = plain.guidance_embedder
        self.text_embedder = plain.text_embedder

    def embed(
        self,
        timestep: Float[Tensor, " batch"],
        guidance_scale: float,
        pooled: Float[Tensor, "rows pooled"],
        numerics: Numerics = "reference",
    ) -> Float[Tensor, "batch inner"]:
        """`timestep` in 0..1000; `pooled` is one row for all samples, or one each."""
        dtype = self.timestep_embedder.linear_1.weight.dtype
        # In bf16 a guidance of 3.5 * 1000 becomes 3504.
        guidance_dtype = dtype if numerics == "reference" else torch.float32
        guidance = torch.tensor([guidance_scale], dtype=guidance_dtype, device=timestep.device) * 1000
        time = self.timestep_embedder(sinusoid(timestep).to(dtype))
        constant = self.guidance_embedder(sinusoid(guidance).to(dtype)) + self.text_embedder(pooled.to(dtype))
        modulation: Tensor = time + constant
        return modulation

    def forward(self, _timestep: Tensor, modulation: Float[Tensor, "batch inner"]) -> Float[Tensor, "batch inner"]:
        return modulation


def sinusoid(values: Float[Tensor, " values"]) -> Float[Tensor, "values 256"]:
    """Cosines, then sines of a number (a timestep, or guidance times 1000) at 128 frequencies, in fp32.

    diffusers' `get_timestep_embedding`, made independent of the machine: the exponential of fp32 differs between
    processors in the last bit of a few frequencies, which, times 3500, moves predictions by 5e-6. Here it is taken in
    fp64 and rounded.
    """
    half = _SINUSOID_SIZE // 2
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32) / half
    frequencies = exponents.double().exp().float()
    frequencies[_ROUNDED_UP].nextafter_(torch.tensor(1.0))
    angles = values.float()[:, None] * frequencies.to(values.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def make_conditioner(config: DecoderConfig) -> GenerationConditioner | EditingConditioner:
    """A conditioner of the config's kind and sizes, with torch's own random weights."""
    if config.merger is None:
        return GenerationConditioner(config.embedding_dim, config.context_dim)
    return EditingConditioner(config.embedding_dim, config.context_dim, config.merger)


class VisionDecoder(nn.Module):
    """Predicts the velocity of noisy latents under image embeddings. `transformer` is diffusers' own class."""

    def __init__(
        self, config: DecoderConfig, transformer: FluxTransformer2DModel, numerics: Numerics = "reference"
    ) -> None:
        """Raises: ModelError if the transformer doesn't fit the config."""
        super().__init__()
        if transformer.config.joint_attention_dim != config.context_dim:
            raise ModelError(
                f"the conditioner makes context of {config.context_dim} numbers, the transformer takes "
                f"{transformer.config.joint_attention_dim}; context_dim and joint_attention_dim must be equal"
            )
        if not transformer.config.guidance_embeds:
            raise ModelError("the transformer has no guidance embedding (guidance_embeds); FLUX.1 [dev]'s is needed")
        transformer.time_text_embed = ModulationEmbedding(transformer.time_text_embed)
        self.config = config
        self.numerics = numerics
        self.conditioner = make_conditioner(config)
        self.transformer = transformer

    @classmethod
    def from_config(cls, config: DecoderConfig, transformer: Mapping[str, Any]) -> VisionDecoder:
        """A decoder with random weights; `transformer` holds FluxTransformer2DModel's sizes. May be on meta."""
        return cls(config, FluxTransformer2DModel(**transformer))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights. Inputs are brought to it; under autocast it stays that of the master weights."""
        return cast(torch.dtype, self.transformer.x_embedder.weight.dtype)

    @property
    def reference_grid(self) -> tuple[int, int]:
        """Token grid of the picture that is edited. Raises: ModelError if this is a generation decoder."""
        if self.config.merger is None:
            raise ModelError("a generation decoder takes no reference image; use the editing decoder")
        return self.config.merger.reference_grid

    def forward(
        self,
        latents: Float[Tensor, "batch channels height width"],
        timestep: Float[Tensor, " batch"],
        embeddings: Float[Tensor, "batch tokens embedding"],
        pooled: Float[Tensor, "rows pooled"],
        reference: Float[Tensor, "batch reference_tokens embedding"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """Velocity of latents at `timestep` (0..1000, one per sample) under image embeddings.

        `pooled` stands for CLIP's embedding of the prompt: one row, because the prompt is always empty. `reference`
        holds the embeddings of the picture that is edited; an editing decoder can do without.
        """
        context = self.context(embeddings, reference)
        return self.velocity(latents, timestep, context, pooled, self.token_ids(latents, reference is not None))

    def context(
        self,
        embeddings: Float[Tensor, "batch tokens embedding"],
        reference: Float[Tensor, "batch reference_tokens embedding"] | None = None,
    ) -> Float[Tensor, "batch all_tokens context"]:
        """What the transformer attends to; sampling computes it once.

        Raises: ShapeError on another size or count; ModelError for a reference that a generation decoder can't use.
        """
        config = self.config
        self._check_tokens("image embeddings", embeddings, config.token_grid)
        embeddings = embeddings.to(self.dtype)
        if isinstance(self.conditioner, GenerationConditioner):
            if reference is not None:
                self._check_tokens("reference embeddings", reference, self.reference_grid)
            context: Tensor = self.conditioner(embeddings)
            return context
        if reference is not None:
            self._check_tokens("reference embeddings", reference, self.reference_grid)
            reference = reference.to(self.dtype)
        frequency_dtype = self.dtype if self.numerics == "reference" else torch.float32
        merged: Tensor = self.conditioner(
            embeddings, config.token_grid, reference, self.reference_grid, frequency_dtype=frequency_dtype
        )
        return merged

    def _check_tokens(self, name: str, embeddings: Shaped[Tensor, "..."], grid: tuple[int, int]) -> None:
        rows, columns = grid
        if embeddings.shape[1:] != (rows * columns, self.config.embedding_dim):
            raise ShapeError(
                f"{name} of shape {tuple(embeddings.shape)}; this decoder takes {rows}x{columns} tokens of "
                f"{self.config.embedding_dim} numbers"
            )

    def token_ids(
        self, latents: Float[Tensor, "batch channels height width"], has_reference: bool = False
    ) -> Float[Tensor, "tokens 3"]:
        """Rope ids of the context's tokens, for latents of this size."""
        height, width = latents.shape[-2:]
        config = self.config
        ids = flux_token_ids(config.token_grid, (height, width), config.token_positions)
        if not has_reference:
            return ids
        of_reference = flux_token_ids(self.reference_grid, (height, width), config.token_positions, image_index=1)
        return torch.cat([ids, of_reference])

    def velocity(
        self,
        latents: Float[Tensor, "batch channels height width"],
        timestep: Float[Tensor, " batch"],
        context: Float[Tensor, "batch tokens context"],
        pooled: Float[Tensor, "rows pooled"],
        token_ids: Float[Tensor, "tokens 3"],
    ) -> Float[Tensor, "batch channels height width"]:
        """Velocity under a context that is already computed, in the dtype of the weights."""
        height, width = latents.shape[-2:]
        embed = self.transformer.time_text_embed.embed
        modulation = embed(timestep, self.config.guidance_scale, pooled, self.numerics)
        if self.numerics == "reference":
            token_ids = token_ids.to(self.dtype).float()
        tokens = self.transformer(
            hidden_states=pack_latents(latents.to(self.dtype)),
            encoder_hidden_states=context.to(self.dtype),
            pooled_projections=modulation,
            timestep=timestep,
            img_ids=flux_image_ids((height, width)).to(latents.device),
            txt_ids=token_ids.to(latents.device),
            return_dict=False,
        )[0]
        return unpack_latents(tokens, (height, width))

    def velocity_function(
        self,
        context: Float[Tensor, "batch tokens context"],
        pooled: Float[Tensor, "rows pooled"],
        negative_context: Float[Tensor, "1 negative_tokens context"] | None = None,
        true_cfg_scale: float = 1.0,
        has_reference: bool = False,
    ) -> VelocityFunction:
        """The velocity under one context, for `euler_sample`; two passes where `true_cfg_scale` isn't 1.

        Raises: ModelError if two-pass guidance is asked for without a negative context.
        """
        check_guidance(true_cfg_scale, negative_context)
        conditional = self.conditional(context, pooled, has_reference)
        if true_cfg_scale == 1.0 or negative_context is None:
            return conditional
        return guide(conditional, self.unconditional(negative_context, pooled), true_cfg_scale)

    def conditional(
        self,
        context: Float[Tensor, "batch tokens context"],
        pooled: Float[Tensor, "rows pooled"],
        has_reference: bool = False,
    ) -> VelocityFunction:
        """The velocity under one context, in one pass."""

        def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
            return self.velocity(latents, timestep, context, pooled, self.token_ids(latents, has_reference))

        return velocity

    def unconditional(
        self, negative_context: Float[Tensor, "1 negative_tokens context"], pooled: Float[Tensor, "rows pooled"]
    ) -> VelocityFunction:
        """The velocity under the text embedding of the empty prompt, whose rope ids are all zero, in one pass."""

        def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
            repeated = negative_context.expand(len(latents), -1, -1)
            return self.velocity(latents, timestep, repeated, pooled, torch.zeros(negative_context.shape[1], 3))

        return velocity


def check_guidance(true_cfg_scale: float, negative_context: Float[Tensor, "1 negative_tokens context"] | None) -> None:
    """Raises: ModelError if two-pass guidance is asked for without a negative context."""
    if true_cfg_scale != 1.0 and negative_context is None:
        raise ModelError(f"true_cfg_scale {true_cfg_scale} needs the model's negative context, which it doesn't have")


def pack_latents(latents: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens packed"]:
    """2x2 patches of latents as tokens in raster order; a token's numbers are ordered (channel, row, column)."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack_latents(
    tokens: Float[Tensor, "batch tokens packed"], latent_hw: tuple[int, int]
) -> Float[Tensor, "batch channels height width"]:
    """The inverse of `pack_latents`; `latent_hw` in latent pixels."""
    height, width = latent_hw
    grid = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return nn.functional.pixel_shuffle(grid, 2)


def initialise_for_training(decoder: VisionDecoder, seed: int) -> None:
    """Fill a decoder that is to be trained from scratch.

    Linear layers are Xavier-uniform with zero biases; every block's modulation, the final one and the output projection
    are zero, so that blocks start as the identity and the first prediction is zero. Source: DiT (arXiv 2212.09748,
    section 3.2, adaLN-Zero). diffusers' default initialisation learns visibly slower.
    """
    transformer = decoder.transformer
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    modulations = [
        norm.linear for block in blocks for name, norm in block.named_children() if _is_modulation(name, norm)
    ]
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for module in decoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for linear in (*modulations, transformer.norm_out.linear, transformer.proj_out):
            nn.init.zeros_(linear.weight)


def _is_modulation(name: str, module: nn.Module) -> bool:
    return name.startswith("norm") and hasattr(module, "linear")


def save_decoder(decoder: VisionDecoder, folder: Path, dtype: torch.dtype) -> None:
    """Write the decoder's folder, floating tensors in `dtype`; plain diffusers can open `transformer/`."""
    transformer_folder = folder / "transformer"
    transformer_folder.mkdir(parents=True, exist_ok=True)
    write_decoder_config(decoder.config, folder)
    save_tensors(decoder.conditioner.state_dict(), folder / "conditioner.safetensors", dtype)
    decoder.transformer.to_json_file(transformer_folder / "config.json")
    state = {name: tensor.detach().to("cpu", dtype) for name, tensor in decoder.transformer.state_dict().items()}
    save_torch_state_dict(state, transformer_folder, filename_pattern=TRANSFORMER_STEM + "{suffix}.safetensors")


def hollow_decoder(folder: Path, numerics: Numerics = "reference") -> VisionDecoder:
    """The decoder of a folder without its weights, on meta. Raises: ModelError if it isn't a decoder's folder."""
    config = read_decoder_config(folder)
    try:
        sizes = FluxTransformer2DModel.load_config(folder / "transformer", local_files_only=True)
    except OSError as error:
        raise ModelError(f"{folder}: no transformer that diffusers can open: {error}") from None
    with torch.device("meta"):
        return VisionDecoder(config, FluxTransformer2DModel.from_config(sizes), numerics).eval()


def decoder_tensors(folder: Path) -> dict[str, Shaped[Tensor, "..."]]:
    """A decoder folder's tensors, mapped from their files, under `VisionDecoder`'s names. Raises: ModelError."""
    state = {f"conditioner.{name}": tensor for name, tensor in iterate_file(folder / "conditioner.safetensors")}
    return state | {f"transformer.{name}": t for name, t in iterate_tensors(folder / "transformer", TRANSFORMER_STEM)}


def load_decoder(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    numerics: Numerics = "reference",
    quantise: Quantisation | None = None,
) -> VisionDecoder:
    """Load a decoder's folder for inference; with `quantise`, most of its transformer takes a byte for each number.

    Raises: ModelError if it isn't a decoder's folder or its tensors don't fit exactly.
    """
    decoder, state = hollow_decoder(folder, numerics), decoder_tensors(folder)
    small = QUANTISED_DTYPES[quantise] if quantise is not None else dtype
    placed = {
        # By way of the dtype that it computes in, so that it doesn't matter which one the file has.
        name: tensor.to(device, dtype).to(small if is_quantised(name) else dtype)
        for name, tensor in state.items()
    }
    load_strictly(decoder, placed, str(folder))
    if quantise is not None:
        for blocks in (decoder.transformer.transformer_blocks, decoder.transformer.single_transformer_blocks):
            apply_layerwise_casting(blocks, small, dtype, skip_modules_pattern=(r"\.norm_",))
    return decoder.eval()


def is_quantised(name: str) -> bool:
    """Whether quantisation makes a tensor of `VisionDecoder` small: those of linear layers in blocks."""
    return _QUANTISED.match(name) is not None


def read_decoder_config(folder: Path) -> DecoderConfig:
    """Raises: ModelError if the folder has no readable `conditioner.json`."""
    path = folder / "conditioner.json"
    try:
        return DecoderConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise ModelError(f"{folder} is not a decoder's folder: {path.name} can't be read: {error}") from None


def write_decoder_config(config: DecoderConfig, folder: Path) -> None:
    """Write a decoder folder's `conditioner.json`."""
    text = config.model_dump_json(indent=2, exclude_none=True) + "\n"
    (folder / "conditioner.json").write_text(text, encoding="utf-8")
