"""How a stage's module is laid over the ranks: whole on each of them, or sharded block by block with FSDP2.

A module begins on meta, without memory. It is laid out there, and then each rank reads its own part of the weights from
their files: no rank ever holds more than that part and one tensor.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from nexusgen.model.decoder import VisionDecoder
from nexusgen.model.tensors import check_tensors


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


@torch.no_grad()
def fill_module(
    module: nn.Module, state: Mapping[str, Shaped[Tensor, "..."]], device: torch.device, *, skip_trained: bool = False
) -> None:
    """Give a module on meta, whole or sharded, its memory on `device` and the numbers of `state`.

    Of a sharded tensor a rank reads its own rows alone: what is mapped from a file stays there but for them. With
    `skip_trained` the tensors that require a gradient aren't read, because a checkpoint will overwrite them.
    Raises: ModelError naming tensors that are missing, left over or misshapen.
    """
    check_tensors(module.state_dict(), state, "the weights that a training starts from")
    buffers = {name: buffer.to(device) for name, buffer in module.named_buffers()}  # never on meta: they are in no file
    first = {parameter: name for name, parameter in module.named_parameters()}
    names = {name: first[parameter] for name, parameter in module.named_parameters(remove_duplicate=False)}
    module.to_empty(device=device)
    for name, source in names.items():
        if name != source:  # to_empty makes two parameters of a tied one
            place, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(place), attribute, module.get_parameter(source))
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])
    for name, parameter in module.named_parameters():
        if not (skip_trained and parameter.requires_grad):
            local(parameter).copy_(_own_rows(state[name], parameter))


def _own_rows(tensor: Shaped[Tensor, "..."], parameter: Tensor) -> Shaped[Tensor, "..."]:
    """What a rank holds of a tensor: the chunk of its rows that FSDP2 gives it, which may be empty; else all."""
    if not isinstance(parameter, DTensor):
        return tensor
    chunks = tensor.chunk(parameter.device_mesh.size())
    rank = parameter.device_mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else tensor[:0]


@contextlib.contextmanager
def attention_kernel(precision: Literal["auto", "bf16", "fp32"], device: torch.device) -> Iterator[None]:
    """On a CPU in bf16, attention by plain matrix products: the backward of its fused bf16 kernel is slow (a third of a
    whole step of the demo's sizes, measured with torch 2.13)."""
    with sdpa_kernel(SDPBackend.MATH) if precision == "bf16" and device.type == "cpu" else contextlib.nullcontext():
        yield


def recompute_activations(module: nn.Module, precision: Literal["auto", "bf16", "fp32"], device: torch.device) -> None:
    """Keep no activations inside blocks; they are computed again in the backward, as the libraries themselves do it.

    They are computed by the same kernels as in the forward, which keep the same tensors, or torch refuses them.
    Autocast torch remembers itself.
    """

    def contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        return contextlib.nullcontext(), attention_kernel(precision, device)

    options: dict[str, Any] = {"use_reentrant": False, "context_fn": contexts}
    for part in module.modules():
        if isinstance(part, ModelMixin):
            part.enable_gradient_checkpointing(functools.partial(checkpoint, **options))
        elif isinstance(part, PreTrainedModel):
            part.activation_checkpointing_enable(activation_checkpointing_kwargs=options)


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
