"""Arithmetic of a training: what a model's step needs, and which share of it that a device can do is put to use.

The share is the model FLOPs utilisation of Chowdhery et al., "PaLM", arXiv 2204.02311, section 4.1 and appendix B: only
what the model needs counts. Activations that are computed again, and padding, are overhead and make it smaller.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from nexusgen.model.autoregressive import AutoregressiveModel
from nexusgen.model.decoder import VisionDecoder

# Names of GPUs as torch tells them, and FLOP/s of their matrix units in bf16 without sparsity: half of what NVIDIA's
# data sheets tell with it (A100 2020, A10 2021, L4, L40S and H100 2023, H200 and HGX B200 2024). First match counts.
PEAK_FLOPS = (
    (r"\bB200\b", 2250e12),
    (r"\bH200\b", 989e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100\b", 989e12),
    (r"\bA100\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bL4\b", 121e12),
    (r"\bA10\b", 125e12),
)
# Matrices that no token is multiplied with: tables that rows are looked up in, and modulations, which are computed once
# for a sample. The latter are 3.3 of FLUX.1 [dev]'s 11.9 billion parameters.
_NOT_PER_TOKEN = re.compile(r"(^|\.)(image_prefill_embeds|time_text_embed|norm\w*\.linear)\.")
# Blocks of two equal streams, one for latents and one for their context: a token goes through one of them, so these
# parameters count half; 4.3 billion of FLUX.1 [dev]'s.
_TWO_STREAMS = re.compile(r"^transformer\.transformer_blocks\.")
_TOKEN_EMBEDDINGS = re.compile(r"(^|\.)embed_tokens\.")


@dataclass(frozen=True)
class ModelWork:
    """What a token costs: parameters that it is multiplied with, trained and frozen ones, and the size of attention."""

    trained: int
    frozen: int
    num_layers: int
    hidden: int  # numbers of all heads together

    def flops(self, num_tokens: float, num_samples: float, *, recomputes: bool = False) -> float:
        """Operations of forward and backward over some samples.

        A token takes 2 for each parameter in the forward, and 2 more in the backward, through which the gradient passes
        to what lies below; a trained one another 2 for its own gradient. Attention takes 12 x layers x hidden x length
        (no square is halved for being causal), with the samples' mean length. Where activations are computed again
        there is one more forward. An output layer counts at every token, though a loss may ask for some of them only,
        and so does a conditioner, whose tokens are a part of all.
        """
        forward = 2 * (self.trained + self.frozen) + 4 * self.num_layers * self.hidden * num_tokens / num_samples
        return num_tokens * ((3 + recomputes) * forward - 2 * self.frozen)


def work_of(module: nn.Module) -> ModelWork:
    """The work of a stage's module, which may be on meta or sharded."""
    if isinstance(module, AutoregressiveModel):
        num_layers, hidden = module.text_config.num_hidden_layers, module.hidden_size
    else:
        assert isinstance(module, VisionDecoder)
        sizes = module.transformer.config
        num_layers = sizes.num_layers + sizes.num_single_layers
        hidden = sizes.num_attention_heads * sizes.attention_head_dim
    counted = [(p.requires_grad, p.numel() * _share(name, module)) for name, p in module.named_parameters()]
    return ModelWork(
        trained=round(sum(count for is_trained, count in counted if is_trained)),
        frozen=round(sum(count for is_trained, count in counted if not is_trained)),
        num_layers=num_layers,
        hidden=hidden,
    )


def _share(name: str, module: nn.Module) -> float:
    """The share of the tokens that a parameter multiplies."""
    if isinstance(module, AutoregressiveModel) and _TOKEN_EMBEDDINGS.search(name):
        # Of a tied model this is also the name of the output layer.
        return float(module.qwen.lm_head.weight is module.qwen.model.language_model.embed_tokens.weight)
    if _NOT_PER_TOKEN.search(name):
        return 0.0
    return 0.5 if _TWO_STREAMS.search(name) else 1.0


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a GPU in bf16, dense; None if it isn't in the table."""
    return next((peak for pattern, peak in PEAK_FLOPS if re.search(pattern, device_name)), None)


@dataclass(frozen=True)
class Utilisation:
    """The share of the devices' arithmetic that a model's steps put to use."""

    work: ModelWork
    peak: float  # FLOP/s of all devices together

    def of(self, num_tokens: int, num_samples: int, seconds: float) -> float:
        """The share over some seconds; tokens without padding."""
        return self.work.flops(num_tokens, num_samples) / (seconds * self.peak)


def find_utilisation(module: nn.Module, device: torch.device, world_size: int, precision: str) -> Utilisation | None:
    """The measure of a training on so many devices like this one; None where no peak is known: on CPUs, and in fp32."""
    if device.type != "cuda" or precision != "bf16":
        return None
    peak = peak_flops(torch.cuda.get_device_name(device))
    return Utilisation(work_of(module), world_size * peak) if peak is not None else None
