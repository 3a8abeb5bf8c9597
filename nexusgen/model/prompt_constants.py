"""Constants of the empty prompt: what FLUX.1's text encoders, CLIP and T5, say about "".

The prompt of both decoders is always empty, so two tensors replace 10 GB of encoders at run time. They are computed
once, layer by layer, with the weights of one matrix or attention in memory at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, init_empty_weights
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from nexusgen.errors import ModelError
from nexusgen.model.tensors import check_tensors, iterate_tensors

_T5_TOKENS = 512  # length that T5's side of the prompt is padded to; FLUX.1 [dev]
_FOLDERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def missing_encoders(flux: Path) -> list[str]:
    """Which folders of the text encoders and their tokenizers a FLUX.1 folder lacks."""
    return [f"{name}/" for name in _FOLDERS if not (flux / name).is_dir()]


@torch.no_grad()
def compute_prompt_constants(flux: Path) -> dict[str, Float[Tensor, "..."]]:
    """`pooled_prompt` [1, pooled] of CLIP and `negative_context` [1, 512, context] of T5, for "", in fp32.

    As FLUX.1's pipeline does it: padded to full length, padding not masked. fp32, because bf16 would cost a percent.
    Source: diffusers, `FluxPipeline.encode_prompt`. Raises: ModelError if an encoder can't be opened or doesn't fit.
    """
    clip = _open_encoder(CLIPTextModel, flux / "text_encoder")
    pooled = clip(_empty_prompt(flux / "tokenizer", clip.config.max_position_embeddings)).pooler_output
    t5 = _open_encoder(T5EncoderModel, flux / "text_encoder_2")
    context = t5(_empty_prompt(flux / "tokenizer_2", _T5_TOKENS)).last_hidden_state
    return {"pooled_prompt": pooled.float(), "negative_context": context.float()}


def _empty_prompt(folder: Path, length: int) -> Int[Tensor, "1 length"]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no tokenizer that transformers can open: {error}") from None
    encoded: Any = tokenizer("", padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoded.input_ids


def _open_encoder(cls: Any, folder: Path) -> Any:
    """An encoder whose weights stay in their files but for those of the module that is running."""
    try:
        config = cls.config_class.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise ModelError(f"{folder}: no config.json of {cls.__name__}: {error}") from None
    with init_empty_weights(include_buffers=False):
        encoder = cls(config).eval()
    expected = dict(encoder.named_parameters())
    # Older files prefix CLIP's names and store a table of positions; T5's token embeddings have two names.
    weights = {name.removeprefix("text_model."): tensor for name, tensor in iterate_tensors(folder)}
    weights.pop("embeddings.position_ids", None)
    if "shared.weight" in weights:
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    check_tensors(expected, weights, str(folder))
    # T5Attention looks at a weight of a module inside it, so its weights must be there together.
    return cpu_offload(encoder, torch.device("cpu"), state_dict=weights, preload_module_classes=["T5Attention"])
