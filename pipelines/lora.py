"""LoRA: stage `ar` with a frozen language model and small adapters beside its matrices, and how they become a model.

A linear layer with weight W computes (W + alpha / rank * B A) x; A is random at first, B zero. Source: Hu et al., arXiv
2106.09685, section 4.1. peft makes the layers. The vision head and the query embeddings, which phase 1 learns anew,
have no adapters and are trained in full; all else is the base's.

Importing this module imports neither torch nor peft, so that the registry can read a record.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import Field, field_validator

from nexusgen.config import Config
from nexusgen.errors import ModelError

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Shaped
    from torch import Tensor

    from nexusgen.model.autoregressive import AutoregressiveModel

ADAPTER_RECORD = "adapter.json"  # in a model folder that holds an adapter: which base it is for
ADAPTER_FILE = "adapter.safetensors"
TRAINED_IN_FULL = ("vision_head", "image_prefill_embeds")  # parts of the autoregressive model
_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"  # A and B, behind the name of their layer

# The linear layers of a Qwen2.5-VL layer.
LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraConfig(Config):
    """Size of the adapters, and the layers that have one."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)  # what an adapter adds is scaled by alpha / rank
    targets: tuple[LoraTarget, ...] = Field(default=get_args(LoraTarget), min_length=1)

    @field_validator("targets")
    @classmethod
    def _sort(cls, targets: tuple[LoraTarget, ...]) -> tuple[LoraTarget, ...]:
        """Each once, in the model's order: how they are written down changes nothing."""
        return tuple(target for target in get_args(LoraTarget) if target in targets)

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


class AdapterRecord(Config):
    """`adapter.json`: what the adapter beside it is to be applied to."""

    base: str  # a model's name, as `resolve_model` takes it
    base_fingerprint: str  # of the whole folder
    lora: LoraConfig
    digest: str | None = None  # sha256 of the adapter's file; records of earlier versions lack it


def add_adapters(module: AutoregressiveModel, config: LoraConfig, frozen_dtype: torch.dtype) -> None:
    """Freeze a model on meta in place, and give the layers of its language model adapters, on meta as well.

    Frozen matrices are kept in `frozen_dtype`, the dtype that the forward multiplies them in anyway: in bf16 they take
    half the memory and give the same numbers. Norms and token embeddings, which it doesn't multiply, stay as they are.
    """
    import peft
    from torch import nn

    module.requires_grad_(False)
    alpha: Any = config.alpha  # peft annotates an int, and divides it by r
    layers = peft.LoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        target_modules=list(config.targets),
        lora_dropout=0.0,  # a step's randomness would have to be repeated after a restart
        bias="none",
    )
    peft.inject_adapter_in_model(layers, module.qwen.model.language_model, low_cpu_mem_usage=True)
    for name in TRAINED_IN_FULL:
        getattr(module, name).requires_grad_(True)
    embeddings = module.qwen.model.language_model.embed_tokens.weight
    for part in module.modules():
        is_frozen = isinstance(part, nn.Linear) and not part.weight.requires_grad
        if is_frozen and part.weight is not embeddings:  # the smaller Qwen2.5-VL tie lm_head to them
            part.to(frozen_dtype)


def start_adapters(
    module: AutoregressiveModel, base: Mapping[str, Shaped[Tensor, ...]]
) -> dict[str, Shaped[Tensor, ...]]:
    """What a model with adapters starts from: the base's tensors under its names, and fresh adapters.

    These are drawn from torch's generator, A as a linear layer's weight and B zero, with the very numbers that peft
    would draw had the model been loaded before it got them.
    """
    import torch
    from torch import nn

    names = module.state_dict().keys()
    state = {}
    for name, tensor in base.items():
        layer, _, kind = name.rpartition(".")
        state[name if name in names else f"{layer}.base_layer.{kind}"] = tensor
    for name, parameter in module.named_parameters():
        if name.endswith(_DOWN):
            up = name.removesuffix(_DOWN) + _UP
            down = nn.Linear(parameter.shape[1], parameter.shape[0], bias=False)
            nn.Linear(parameter.shape[0], len(module.get_parameter(up)), bias=False)  # peft draws, and then zeroes, B
            down.reset_parameters()  # and A twice
            state[name] = down.weight.detach()
            state[up] = torch.zeros(module.get_parameter(up).shape)
    return state


def merge_adapters(
    base: Path, trained: Mapping[str, Shaped[Tensor, ...]], config: LoraConfig
) -> dict[str, Float[Tensor, ...]]:
    """The weights of a model folder that a training with adapters changed: W + alpha / rank * B A, in fp32.

    `trained` has the names of the trained module, the result those of `AutoregressiveModel`; what was trained in full
    is passed on. Sums are in fp64, so that the same adapter gives the same weights on any machine.
    Raises: ModelError if an adapter has no layer in the base, or another shape.
    """
    from nexusgen.model.tensors import iterate_tensors
    from nexusgen.model.weights import module_key

    merged = {name: tensor for name, tensor in trained.items() if not name.endswith((_DOWN, _UP))}
    layers = {name.removesuffix(_DOWN) for name in trained if name.endswith(_DOWN)}
    for released, weight in iterate_tensors(base / "autoregressive"):
        layer = module_key(released).removesuffix(".weight")
        if layer not in layers:
            continue
        down, up = trained[layer + _DOWN], trained.get(layer + _UP)
        if up is None or (len(up), down.shape[1]) != weight.shape or up.shape[1] != len(down):
            found = f"A {tuple(down.shape)}, B {tuple(up.shape) if up is not None else 'missing'}"
            raise ModelError(
                f"the adapter of {layer} doesn't fit {base}: {found}; its weight is {tuple(weight.shape)}, "
                "so wanted A (rank, in) and B (out, rank): apply it to the base that it was trained from"
            )
        merged[f"{layer}.weight"] = (weight.double() + config.scale * (up.double() @ down.double())).float()
        layers.remove(layer)
    if layers:
        raise ModelError(
            f"{base / 'autoregressive'} has no layer {', '.join(sorted(layers)[:3])}, which the adapter changes: "
            "apply it to the base that it was trained from"
        )
    return merged


def merge_file(base: Path, adapter: Path, merged: Path, config: LoraConfig) -> None:
    """Write `merge_adapters` of a safetensors file into another. Raises: as `merge_adapters`; ModelError."""
    import torch

    from nexusgen.model.tensors import iterate_file, save_tensors

    save_tensors(merge_adapters(base, dict(iterate_file(adapter)), config), merged, torch.float32)
