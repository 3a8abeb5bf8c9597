"""How a stage's module is laid over the ranks: whole on each of them, or sharded block by block with FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from nexusgen.model.decoder import VisionDecoder


def resolve_precision(precision: Literal["auto", "bf16", "fp32"], on_gpu: bool) -> Literal["bf16", "fp32"]:
    """`auto` is bf16 on a GPU and on a CPU that multiplies it in hardware (AVX-512 and later), else fp32.

    On a CPU with AVX2 alone a step of the demo takes 1.5 s in bf16 and 0.2 s in fp32.
    """
    if precision != "auto":
        return precision
    return "bf16" if on_gpu or torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def shard_module(module: nn.Module, world_size: int, device: torch.device, precision: torch.dtype) -> None:
    """Shard a module over all ranks in place, a block at a time; weights stay fp32, forwards are in `precision`.

    Gradients are summed, not averaged, in fp32: losses are already divided by the counts of the whole step.
    """
    mesh = init_device_mesh(device.type, (world_size,))
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
    for block in _blocks(module):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    if isinstance(module, VisionDecoder):  # what sampling and guidance call in place of forward
        register_fsdp_forward_method(module, "context")
        register_fsdp_forward_method(module, "velocity")


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The repeated layers: members of lists of modules, the outermost ones."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def recompute_activations(module: nn.Module) -> None:
    """Keep no activations inside blocks; they are computed again in the backward, as the libraries themselves do it."""
    for part in module.modules():
        if isinstance(part, ModelMixin):
            part.enable_gradient_checkpointing()
        elif isinstance(part, PreTrainedModel):
            part.gradient_checkpointing_enable({"use_reentrant": False})


def set_last_backward(module: nn.Module, is_last: bool) -> None:
    """Gradients of a sharded module are summed over the ranks with the last micro-batch alone."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(is_last)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes."""
    return next(module.parameters()).device


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; all of one that isn't sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
