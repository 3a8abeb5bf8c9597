"""FLUX.1 [dev] as it is published: its transformer and autoencoder, in Black Forest Labs' layout or diffusers'.

Black Forest Labs' layout is `flux1-dev.safetensors` and `ae.safetensors`; diffusers' is `transformer/` and `vae/`. A
folder may mix them, as FLUX.1-dev's own does. Tensors are mapped from their files, not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from jaxtyping import Shaped
from torch import Tensor

from nexusgen.errors import ModelError
from nexusgen.model.decoder import RELEASED_TRANSFORMER, TRANSFORMER_STEM
from nexusgen.model.decoder_keys import from_released, original_name, original_to_released, to_released
from nexusgen.model.tensors import check_tensors, iterate_file, iterate_tensors

State = dict[str, Shaped[Tensor, "..."]]

TRANSFORMER_FILE, AUTOENCODER_FILE = "flux1-dev.safetensors", "ae.safetensors"
_PREFIX = "transformer."

# What shapes don't tell of FLUX.1's autoencoder. Source: vae/config.json on FLUX.1 [dev]'s model page.
_AUTOENCODER: Mapping[str, Any] = {
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def check_folder(flux: Path) -> None:
    """Raises: ModelError if a folder holds nothing of FLUX.1."""
    if not any((flux / name).exists() for name in ("transformer", "vae", TRANSFORMER_FILE, AUTOENCODER_FILE)):
        raise ModelError(
            f"{flux} is no FLUX.1-dev folder: it has none of transformer/, vae/, {TRANSFORMER_FILE}, {AUTOENCODER_FILE}"
        )


def read_transformer(flux: Path) -> tuple[dict[str, Any], State] | None:
    """Sizes and tensors (diffusers' names) of a FLUX.1 folder's transformer; None if it has none.

    Raises: ModelError naming the tensors that are missing, left over or misshapen.
    """
    if (flux / "transformer").is_dir():
        folder = flux / "transformer"
        sizes = _read_config(FluxTransformer2DModel, folder)
        state = dict(iterate_tensors(folder, TRANSFORMER_STEM))
        with torch.device("meta"):
            check_tensors(FluxTransformer2DModel.from_config(sizes).state_dict(), state, str(folder))
        return sizes, state
    path = flux / TRANSFORMER_FILE
    if not path.is_file():
        return None
    original = dict(iterate_file(path))
    released = original_to_released(original)
    sizes = transformer_sizes(released, str(path))
    with torch.device("meta"):
        expected = FluxTransformer2DModel(**sizes).state_dict()
    released_expected = to_released({_PREFIX + name: tensor for name, tensor in expected.items()})
    check_tensors({original_name(name): t for name, t in released_expected.items()}, original, str(path))
    return sizes, {name.removeprefix(_PREFIX): tensor for name, tensor in from_released(released).items()}


def transformer_config(flux: Path) -> dict[str, Any] | None:
    """What a FLUX.1 folder says of its transformer's sizes; None in Black Forest Labs' layout, which has no config."""
    return _read_config(FluxTransformer2DModel, flux / "transformer") if (flux / "transformer").is_dir() else None


def transformer_sizes(
    released: Mapping[str, Shaped[Tensor, "..."]], where: str, axes_dims_rope: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """FluxTransformer2DModel's sizes, read off tensors with the released names.

    The rope axes leave no trace in any shape: unless given they are FLUX.1's shares of a head (`default_axes`).
    Raises: ModelError naming a tensor that is missing, or axes that don't add up to the head's size.
    """
    width, in_channels = tensor_shape(released, "pipe.dit.x_embedder.weight", where)
    head_size = tensor_shape(released, "pipe.dit.blocks.0.attn.norm_q_a.weight", where)[-1]
    axes = axes_dims_rope if axes_dims_rope is not None else default_axes(head_size)
    if sum(axes) != head_size:
        raise ModelError(f"{where}: rope axes {axes} must add up to the size of an attention head, {head_size}")
    return {
        "patch_size": 1,
        "in_channels": in_channels,
        "num_layers": _num_blocks(released, r"pipe\.dit\.blocks\.(\d+)\."),
        "num_single_layers": _num_blocks(released, r"pipe\.dit\.single_blocks\.(\d+)\."),
        "attention_head_dim": head_size,
        "num_attention_heads": width // head_size,
        "joint_attention_dim": tensor_shape(released, "pipe.dit.context_embedder.weight", where)[1],
        "pooled_projection_dim": tensor_shape(released, "pipe.dit.pooled_text_embedder.0.weight", where)[1],
        "guidance_embeds": "pipe.dit.guidance_embedder.timestep_embedder.0.weight" in released,
        "axes_dims_rope": tuple(axes),
    }


def default_axes(head_size: int) -> tuple[int, int, int]:
    """FLUX.1's shares of an attention head's rotary numbers: 7/16 for rows and for columns, even; the rest is first.

    FLUX.1 [dev]'s own 128 give (16, 56, 56).
    """
    _, rows, _ = RELEASED_TRANSFORMER["axes_dims_rope"]
    side = head_size * rows // RELEASED_TRANSFORMER["attention_head_dim"] // 2 * 2
    return head_size - 2 * side, side, side


def tensor_shape(state: Mapping[str, Shaped[Tensor, "..."]], name: str, where: str) -> tuple[int, ...]:
    """Raises: ModelError if the tensor is missing."""
    if name not in state:
        raise ModelError(f"{where}: the weights don't fit the model: missing {name}")
    return tuple(state[name].shape)


def read_autoencoder(flux: Path) -> tuple[AutoencoderKL, State] | None:
    """A FLUX.1 folder's autoencoder on meta, and its tensors with diffusers' names; None if it has none.

    Raises: ModelError naming the tensors that are missing, left over or misshapen.
    """
    if (flux / "vae").is_dir():
        where = flux / "vae"
        config = _read_config(AutoencoderKL, where)
        state = dict(iterate_tensors(where, TRANSFORMER_STEM))
    elif (flux / AUTOENCODER_FILE).is_file():
        where = flux / AUTOENCODER_FILE
        original = dict(iterate_file(where))
        config = _autoencoder_config(original, str(where))
        state = convert_ldm_vae_checkpoint(dict(original), config)
        used = {tensor.data_ptr() for tensor in state.values()}  # the converter passes over what it doesn't know
        unknown = [name for name, tensor in original.items() if tensor.data_ptr() not in used]
        if unknown:
            raise ModelError(f"{where}: not tensors of FLUX.1's autoencoder: {', '.join(unknown[:12])}")
    else:
        return None
    with torch.device("meta"):
        autoencoder = AutoencoderKL.from_config(config)
    check_tensors(autoencoder.state_dict(), state, str(where))
    return autoencoder, state


def _autoencoder_config(original: Mapping[str, Shaped[Tensor, "..."]], where: str) -> dict[str, Any]:
    num_levels = _num_blocks(original, r"encoder\.down\.(\d+)\.")
    channels = [tensor_shape(original, f"encoder.down.{i}.block.0.conv1.weight", where)[0] for i in range(num_levels)]
    return {
        "down_block_types": ("DownEncoderBlock2D",) * num_levels,
        "up_block_types": ("UpDecoderBlock2D",) * num_levels,
        "block_out_channels": tuple(channels),
        "layers_per_block": _num_blocks(original, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": tensor_shape(original, "decoder.conv_in.weight", where)[1],
        **_AUTOENCODER,
    }


def _num_blocks(state: Mapping[str, Shaped[Tensor, "..."]], pattern: str) -> int:
    numbers = [int(found[1]) for name in state if (found := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


def _read_config(cls: Any, folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = cls.load_config(folder, local_files_only=True)
    except OSError as error:
        raise ModelError(f"{folder}: no config.json that diffusers can open: {error}") from None
    return config
