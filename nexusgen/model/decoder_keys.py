"""Names of a vision decoder's tensors: the released checkpoint's and ours, both ways, as pure functions.

The released checkpoint keeps the transformer under `pipe.dit.` with DiffSynth-Studio's names and the conditioner under
`adapter.` (generation) or `embedding_merger.` (editing); ours are `transformer.` with diffusers' names and
`conditioner.`. DiffSynth stores query, key and value (in single blocks also the first layer of the MLP) as rows of one
matrix; diffusers stores them apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

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
_SAME_TENSOR_BACK = {ours: released for released, ours in _SAME_TENSOR.items()}
_STACKED_BACK = {parts[0][0]: released for released, parts in _STACKED.items()}
_STACKED_REST = {part for parts in _STACKED.values() for part, _ in parts[1:]}

# `blocks.7.norm1_a.linear` -> (`blocks.{n}.norm1_a.linear`, `7`); only block lists carry a number first.
_BLOCK_NUMBER = re.compile(r"^((?:single_)?(?:transformer_)?blocks)\.(\d+)\.")


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


def to_released(
    ours: Mapping[str, Shaped[Tensor, ...]], conditioner: str = "generation"
) -> dict[str, Shaped[Tensor, ...]]:
    """The inverse of `from_released`: the released names of a decoder's kind, stacked matrices joined.

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
            released[_released_name(stacked, number, leaf)] = torch.cat([ours[part] for part in parts])
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
