"""Names of a vision decoder's tensors: the released checkpoint's and ours, both ways, as pure functions.

And one way, those of FLUX.1 [dev] as Black Forest Labs published it.

The released checkpoint keeps the transformer under `pipe.dit.` with DiffSynth-Studio's names and the conditioner under
`adapter.` (generation) or `embedding_merger.` (editing); ours are `transformer.` with diffusers' names and
`conditioner.`. DiffSynth stores query, key and value (in single blocks also the first layer of the MLP) as rows of one
matrix; diffusers stores them apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor

from nexusgen.errors import ModelError

_RELEASED_PREFIX, _MODULE_PREFIX = "pipe.dit.", "transformer."
_MODULE_CONDITIONER = "conditioner."
RELEASED_CONDITIONERS = {"generation": "adapter.", "editing": "embedding_merger."}

# Released name without its last part (weight or bias) -> ours. `{n}` is a block's number.
_SAME_TENSOR = {
    "x_embedder": "x_embedder",
    "context_embedder": "context_embedder",
    "final_norm_out.linear": "norm_out.linear",
    "final_proj_out": "proj_out",
    "time_embedder.timestep_embedder.0": "time_text_embed.timestep_embedder.linear_1",
    "time_embedder.timestep_embedder.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_embedder.timestep_embedder.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_embedder.timestep_embedder.2": "time_text_embed.guidance_embedder.linear_2",
    "pooled_text_embedder.0": "time_text_embed.text_embedder.linear_1",
    "pooled_text_embedder.2": "time_text_embed.text_embedder.linear_2",
    "blocks.{n}.norm1_a.linear": "transformer_blocks.{n}.norm1.linear",
    "blocks.{n}.norm1_b.linear": "transformer_blocks.{n}.norm1_context.linear",
    "blocks.{n}.attn.norm_q_a": "transformer_blocks.{n}.attn.norm_q",
    "blocks.{n}.attn.norm_k_a": "transformer_blocks.{n}.attn.norm_k",
    "blocks.{n}.attn.norm_q_b": "transformer_blocks.{n}.attn.norm_added_q",
    "blocks.{n}.attn.norm_k_b": "transformer_blocks.{n}.attn.norm_added_k",
    "blocks.{n}.attn.a_to_out": "transformer_blocks.{n}.attn.to_out.0",
    "blocks.{n}.attn.b_to_out": "transformer_blocks.{n}.attn.to_add_out",
    "blocks.{n}.ff_a.0": "transformer_blocks.{n}.ff.net.0.proj",
    "blocks.{n}.ff_a.2": "transformer_blocks.{n}.ff.net.2",
    "blocks.{n}.ff_b.0": "transformer_blocks.{n}.ff_context.net.0.proj",
    "blocks.{n}.ff_b.2": "transformer_blocks.{n}.ff_context.net.2",
    "single_blocks.{n}.norm.linear": "single_transformer_blocks.{n}.norm.linear",
    "single_blocks.{n}.norm_q_a": "single_transformer_blocks.{n}.attn.norm_q",
    "single_blocks.{n}.norm_k_a": "single_transformer_blocks.{n}.attn.norm_k",
    "single_blocks.{n}.proj_out": "single_transformer_blocks.{n}.proj_out",
}
# Released name -> ours, stacked along the rows in this order, with each part's share of the rows.
_STACKED: dict[str, tuple[tuple[str, int], ...]] = {
    "blocks.{n}.attn.a_to_qkv": tuple((f"transformer_blocks.{{n}}.attn.to_{part}", 1) for part in "qkv"),
    "blocks.{n}.attn.b_to_qkv": tuple((f"transformer_blocks.{{n}}.attn.add_{part}_proj", 1) for part in "qkv"),
    "single_blocks.{n}.to_qkv_mlp": (
        *((f"single_transformer_blocks.{{n}}.attn.to_{part}", 1) for part in "qkv"),
        ("single_transformer_blocks.{n}.proj_mlp", 4),
    ),
}
# Black Forest Labs' name -> released name. Source: github.com/black-forest-labs/flux, `src/flux/model.py`; diffusers'
# own converter has FLUX.1's width written into it and copies every tensor.
_ORIGINAL = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_embedder.timestep_embedder.0",
    "time_in.out_layer": "time_embedder.timestep_embedder.2",
    "guidance_in.in_layer": "guidance_embedder.timestep_embedder.0",
    "guidance_in.out_layer": "guidance_embedder.timestep_embedder.2",
    "vector_in.in_layer": "pooled_text_embedder.0",
    "vector_in.out_layer": "pooled_text_embedder.2",
    "double_blocks.{n}.img_mod.lin": "blocks.{n}.norm1_a.linear",
    "double_blocks.{n}.txt_mod.lin": "blocks.{n}.norm1_b.linear",
    "double_blocks.{n}.img_attn.qkv": "blocks.{n}.attn.a_to_qkv",
    "double_blocks.{n}.txt_attn.qkv": "blocks.{n}.attn.b_to_qkv",
    "double_blocks.{n}.img_attn.norm.query_norm": "blocks.{n}.attn.norm_q_a",
    "double_blocks.{n}.img_attn.norm.key_norm": "blocks.{n}.attn.norm_k_a",
    "double_blocks.{n}.txt_attn.norm.query_norm": "blocks.{n}.attn.norm_q_b",
    "double_blocks.{n}.txt_attn.norm.key_norm": "blocks.{n}.attn.norm_k_b",
    "double_blocks.{n}.img_attn.proj": "blocks.{n}.attn.a_to_out",
    "double_blocks.{n}.txt_attn.proj": "blocks.{n}.attn.b_to_out",
    "double_blocks.{n}.img_mlp.0": "blocks.{n}.ff_a.0",
    "double_blocks.{n}.img_mlp.2": "blocks.{n}.ff_a.2",
    "double_blocks.{n}.txt_mlp.0": "blocks.{n}.ff_b.0",
    "double_blocks.{n}.txt_mlp.2": "blocks.{n}.ff_b.2",
    "single_blocks.{n}.modulation.lin": "single_blocks.{n}.norm.linear",
    "single_blocks.{n}.linear1": "single_blocks.{n}.to_qkv_mlp",
    "single_blocks.{n}.linear2": "single_blocks.{n}.proj_out",
    "single_blocks.{n}.norm.query_norm": "single_blocks.{n}.norm_q_a",
    "single_blocks.{n}.norm.key_norm": "single_blocks.{n}.norm_k_a",
    "final_layer.linear": "final_proj_out",
    "final_layer.adaLN_modulation.1": "final_norm_out.linear",
}
_ORIGINAL_BACK = {released: original for original, released in _ORIGINAL.items()}
_SAME_TENSOR_BACK = {ours: released for released, ours in _SAME_TENSOR.items()}
_STACKED_BACK = {parts[0][0]: released for released, parts in _STACKED.items()}
_STACKED_REST = {part for parts in _STACKED.values() for part, _ in parts[1:]}

# `blocks.7.norm1_a.linear` -> (`blocks.{n}.norm1_a.linear`, `7`); only block lists carry a number first.
_BLOCK_NUMBER = re.compile(r"^((?:single_|double_)?(?:transformer_)?blocks)\.(\d+)\.")


def from_released(released: Mapping[str, Shaped[Tensor, ...]]) -> dict[str, Shaped[Tensor, ...]]:
    """Rename a released decoder to `VisionDecoder`'s names; stacked matrices become views of their rows.

    Raises: ModelError naming every tensor that has no place in the decoder.
    """
    ours: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in released.items():
        prefix = next((p for p in RELEASED_CONDITIONERS.values() if name.startswith(p)), "")
        if prefix:
            ours[_MODULE_CONDITIONER + name.removeprefix(prefix)] = tensor
            continue
        pattern, number, leaf = _split(name.removeprefix(_RELEASED_PREFIX))
        if name.startswith(_RELEASED_PREFIX) and pattern in _SAME_TENSOR:
            ours[_module_name(_SAME_TENSOR[pattern], number, leaf)] = tensor
        elif name.startswith(_RELEASED_PREFIX) and pattern in _STACKED:
            shares = [share for _, share in _STACKED[pattern]]
            rows = tensor.shape[0] // sum(shares)
            pieces = tensor.split([rows * share for share in shares])
            for (part, _), piece in zip(_STACKED[pattern], pieces, strict=True):
                ours[_module_name(part, number, leaf)] = piece
        else:
            unknown.append(name)
    if unknown:
        raise ModelError(f"not tensors of a released decoder: {', '.join(unknown[:12])}")
    return ours


def original_to_released(original: Mapping[str, Shaped[Tensor, ...]]) -> dict[str, Shaped[Tensor, ...]]:
    """Rename Black Forest Labs' transformer (`flux1-dev.safetensors`) to the released names.

    Its last modulation stores shift before scale; here scale comes first. Raises: ModelError as `from_released`.
    """
    released: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in original.items():
        pattern, number, leaf = _split(name)
        if pattern not in _ORIGINAL:
            unknown.append(name)
            continue
        if pattern == "final_layer.adaLN_modulation.1":
            shift, scale = tensor.chunk(2)
            tensor = torch.cat([scale, shift])
        released[_released_name(_ORIGINAL[pattern], number, "weight" if leaf == "scale" else leaf)] = tensor
    if unknown:
        raise ModelError(f"not tensors of FLUX.1's transformer: {', '.join(unknown[:12])}")
    return released


def original_name(released: str) -> str:
    """Black Forest Labs' name of a released tensor of the transformer."""
    pattern, number, leaf = _split(released.removeprefix(_RELEASED_PREFIX))
    original = _ORIGINAL_BACK[pattern].format(n=number)
    return f"{original}.{'scale' if 'norm.' in original else leaf}"


def to_released(
    ours: Mapping[str, Shaped[Tensor, ...]],
    conditioner: str = "generation",
    join: Callable[[list[Shaped[Tensor, ...]]], Shaped[Tensor, ...]] = torch.cat,
) -> dict[str, Shaped[Tensor, ...]]:
    """The inverse of `from_released`: the released names of a decoder's kind, stacked matrices made by `join`.

    Raises: ModelError naming a tensor without a released name, or a stacked matrix with a part missing.
    """
    released: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        if name.startswith(_MODULE_CONDITIONER):
            released[RELEASED_CONDITIONERS[conditioner] + name.removeprefix(_MODULE_CONDITIONER)] = tensor
            continue
        pattern, number, leaf = _split(name.removeprefix(_MODULE_PREFIX))
        if pattern in _SAME_TENSOR_BACK:
            released[_released_name(_SAME_TENSOR_BACK[pattern], number, leaf)] = tensor
        elif pattern in _STACKED_BACK:
            stacked = _STACKED_BACK[pattern]
            parts = [_module_name(part, number, leaf) for part, _ in _STACKED[stacked]]
            missing = [part for part in parts if part not in ours]
            if missing:
                raise ModelError(f"{name} can't be exported without {', '.join(missing)}")
            released[_released_name(stacked, number, leaf)] = join([ours[part] for part in parts])
        elif pattern not in _STACKED_REST:
            raise ModelError(f"{name} has no name in the released layout")
    return released


def _split(name: str) -> tuple[str, str, str]:
    """`blocks.7.ff_a.0.bias` -> (`blocks.{n}.ff_a.0`, `7`, `bias`)."""
    stem, _, leaf = name.rpartition(".")
    found = _BLOCK_NUMBER.match(stem)
    if found is None:
        return stem, "", leaf
    return f"{found[1]}.{{n}}.{stem[found.end() :]}", found[2], leaf


def _module_name(pattern: str, number: str, leaf: str) -> str:
    return f"{_MODULE_PREFIX}{pattern.format(n=number)}.{leaf}"


def _released_name(pattern: str, number: str, leaf: str) -> str:
    return f"{_RELEASED_PREFIX}{pattern.format(n=number)}.{leaf}"
