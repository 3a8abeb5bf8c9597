"""Several versions of the autoregressive model on one copy of its weights, as LoRA leaves them.

A version that was trained with LoRA differs from its base by low-rank matrices beside linear layers of the language
model (`lora_A`, `lora_B`; Hu et al., arXiv 2106.09685), and by its own vision head and query embeddings. A pass may
hold rows of several versions: the base's matrices multiply all of them at once, each adapter its own rows. That is
peft's `adapter_names`; the rest is chosen row by row in `reply_engine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from nexusgen.errors import ModelError
from nexusgen.model.autoregressive import AutoregressiveModel

BASE = "__base__"  # peft's name for no adapter
_LAYERS = "qwen.model.language_model."
_DOWN, _UP = ".lora_A.default.weight", ".lora_B.default.weight"  # A and B, behind the name of their layer
_IN_FULL = ("vision_head.weight", "image_prefill_embeds.weight")


@dataclass(frozen=True, eq=False)
class Variant:
    """What one version has of its own: the name of its adapter, and what was trained in full."""

    name: str
    vision_head: Float[Tensor, "hidden hidden"]  # a linear layer's weight
    queries: Float[Tensor, "tokens hidden"]


class Variants:
    """A loaded model, and the adapters on it. Not for several threads at once: nothing may change during a pass."""

    def __init__(self, model: AutoregressiveModel) -> None:
        self.base = Variant(BASE, model.vision_head.weight.detach(), model.image_prefill_embeds.weight.detach())
        self._model = model
        self._adapted: Any = None  # peft's LoraModel around the language model, while there are adapters
        self._variants: dict[str, Variant] = {}
        self._hooked: set[str] = set()  # layers that are told which adapter each row has
        self._rows: list[str] = []  # the adapter of each row of the pass at hand

    def __getitem__(self, name: str | None) -> Variant:
        """A version by the name that it was added with; None is the base. Raises: KeyError."""
        return self.base if name is None else self._variants[name]

    def add(self, name: str, tensors: Mapping[str, Shaped[Tensor, ...]], scale: float) -> None:
        """Put an adapter on the model. `tensors` have the names of the trained module, and are used as they are.

        What it adds to a layer is `scale` B A. Raises: ModelError, with nothing changed, if they don't fit the model.
        """
        import peft

        downs = {key.removesuffix(_DOWN): tensor for key, tensor in tensors.items() if key.endswith(_DOWN)}
        ups = {key.removesuffix(_UP): tensor for key, tensor in tensors.items() if key.endswith(_UP)}
        self._check(name, tensors, downs, ups)
        rank = len(next(iter(downs.values())))
        alpha: Any = scale * rank  # peft annotates an int, and divides it by r
        layers = [layer.removeprefix(_LAYERS) for layer in downs]
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, lora_dropout=0.0, bias="none")
        language_model: Any = self._model.qwen.model.language_model
        if self._adapted is None:
            self._adapted = peft.LoraModel(language_model, {name: config}, name, low_cpu_mem_usage=True)
        else:
            self._adapted.peft_config[name] = config
            self._adapted.inject_adapter(language_model, name, low_cpu_mem_usage=True)
        for layer in downs:
            adapted: Any = self._model.get_submodule(layer)
            adapted.lora_A[name].weight = nn.Parameter(downs[layer], requires_grad=False)
            adapted.lora_B[name].weight = nn.Parameter(ups[layer], requires_grad=False)
            if layer not in self._hooked:
                adapted.register_forward_pre_hook(self._name_rows, with_kwargs=True)
                self._hooked.add(layer)
        self._model.eval()
        self._variants[name] = Variant(name, *(tensors[key] for key in _IN_FULL))

    def remove(self, name: str) -> None:
        """Take an adapter off the model, none of whose rows may come any more. Raises: KeyError if there is none."""
        del self._variants[name]
        if not self._variants:
            self._adapted.unload()  # back to plain layers
            self._adapted = None
            self._hooked.clear()
        else:
            # peft would say aloud which adapter is the active one from now on, and none is: passes name theirs.
            self._adapted.set_adapter(next(iter(self._variants)))
            self._adapted.delete_adapter(name)

    @contextmanager
    def of_rows(self, variants: Sequence[Variant]) -> Iterator[None]:
        """The body's passes have one row of each of these, in this order."""
        self._rows = [variant.name for variant in variants]
        try:
            yield
        finally:
            self._rows = []

    def tensors(self) -> Iterator[Shaped[Tensor, ...]]:
        """All weights that the model and its variants keep in memory; some may be views of the same memory."""
        yield from self._model.state_dict().values()
        for variant in self._variants.values():
            yield from (variant.vision_head, variant.queries)

    def _name_rows(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Before a layer that has adapters: say which one each row has. Without rows it is the base's."""
        return args, {**kwargs, "adapter_names": self._rows or [BASE] * len(args[0])}

    def _check(
        self,
        name: str,
        tensors: Mapping[str, Shaped[Tensor, ...]],
        downs: Mapping[str, Shaped[Tensor, ...]],
        ups: Mapping[str, Shaped[Tensor, ...]],
    ) -> None:
        if name in self._variants:
            raise ModelError(f"the adapter {name} is on the model already")
        known = {*_IN_FULL, *(layer + _DOWN for layer in downs), *(layer + _UP for layer in ups)}
        if downs.keys() != ups.keys() or not downs or tensors.keys() != known:
            odd = sorted({*(known ^ tensors.keys()), *(downs.keys() ^ ups.keys())})
            raise ModelError(
                f"the adapter {name} is not whole: wanted {', '.join(_IN_FULL)}, and A and B of each layer that it "
                f"changes; missing or not known: {', '.join(odd[:3]) or 'all layers'}"
            )
        rank = len(next(iter(downs.values())))
        own = dict(self._model.named_modules())
        for layer, down in downs.items():
            module: Any = own.get(layer)
            module = getattr(module, "base_layer", module)
            if not layer.startswith(_LAYERS) or not isinstance(module, nn.Linear):
                raise ModelError(f"the adapter {name} is for a layer {layer}, which the language model lacks")
            wanted = ((rank, module.in_features), (module.out_features, rank))
            found = (tuple(down.shape), tuple(ups[layer].shape))
            if found != wanted:
                raise ModelError(f"the adapter {name} doesn't fit {layer}: A and B are {found}, wanted {wanted}")
        for key, ours in zip(_IN_FULL, (self.base.vision_head, self.base.queries), strict=True):
            if tensors[key].shape != ours.shape:
                shapes = f"{tuple(tensors[key].shape)}, wanted {tuple(ours.shape)}"
                raise ModelError(f"the adapter {name} doesn't fit {key}: it is {shapes}")
