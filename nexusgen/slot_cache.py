"""A KV cache of fixed size for requests that come and go: each has a slot, and each row of a pass a place in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class SlotCache(Cache):
    """Keys and values of `num_slots` sequences of at most `max_length` tokens, allocated at the first pass.

    `begin` says which slots the next forward is about, and where each row writes. What is written in the `num_spare`
    places behind `max_length` is lost.
    """

    def __init__(self, num_layers: int, num_slots: int, max_length: int, num_spare: int, device: torch.device) -> None:
        self.max_length = max_length
        self.device = device
        self._used = [0] * num_slots  # places written to since the slot was cleared, but for those behind the end
        self._pass = _Pass()
        shape = (num_slots, max_length + num_spare)
        super().__init__(layers=[_SlotLayer(self._pass, shape) for _ in range(num_layers)])

    def begin(self, slots: Sequence[int], starts: Sequence[int], num_new: int, num_keys: int) -> None:
        """Prepare a pass of `num_new` tokens in each of some slots, in rising order, row i writing from `starts[i]` on.
        The pass sees the first `num_keys` tokens of its slots, as far as `mask` lets it."""
        for slot, start in zip(slots, starts, strict=True):
            if start < self.max_length:
                self._used[slot] = max(self._used[slot], start + num_new)
        current, of_slots = self._pass, torch.tensor(slots, device=self.device)
        is_range = slots[-1] - slots[0] == len(slots) - 1
        current.seen = slice(slots[0], slots[-1] + 1) if is_range else of_slots  # a view, or a copy
        current.slots = of_slots[:, None]
        current.places = torch.tensor(starts, device=self.device)[:, None] + torch.arange(num_new, device=self.device)
        current.num_new, current.num_keys = num_new, num_keys

    def mask(self) -> Bool[Tensor, "rows 1 new keys"]:
        """What each token of the pass sees: its slot up to itself."""
        keys = torch.arange(self._pass.num_keys, device=self.device)
        return (keys <= self._pass.places[..., None])[:, None]

    def clear(self, slot: int) -> None:
        """Forget what a slot holds. What is masked weighs nothing, but a masked NaN would still be one."""
        for layer in self.layers:
            for stored in (layer.keys, layer.values):
                if stored is not None:
                    stored[slot, :, : self._used[slot]] = 0
        self._used[slot] = 0


class _Pass:
    """The pass at hand, told to every layer."""

    seen: slice | Tensor  # slots, as an index
    slots: Tensor  # [rows, 1]
    places: Tensor  # [rows, new]: where their new tokens are written
    num_new: int
    num_keys: int


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, [slots, heads, places, dim]; `shape` is (slots, places)."""

    # It knows the pass and not the cache: in a circle of references, memory is given back only when Python looks for
    # circles, and this is much memory.
    def __init__(self, current: _Pass, shape: tuple[int, int]) -> None:
        super().__init__()
        self._pass = current
        self._shape = shape

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        _, heads, _, dim = key_states.shape
        num_slots, num_places = self._shape
        self.keys = key_states.new_zeros(num_slots, heads, num_places, dim)
        self.values = torch.zeros_like(self.keys)
        self.is_initialized = True

    def update(
        self,
        key_states: Float[Tensor, "rows heads new dim"],
        value_states: Float[Tensor, "rows heads new dim"],
        *args: object,
        **kwargs: object,
    ) -> tuple[Float[Tensor, "rows heads keys dim"], Float[Tensor, "rows heads keys dim"]]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._extend(self.keys, key_states), self._extend(self.values, value_states)

    def _extend(self, stored: Tensor | None, states: Tensor) -> Tensor:
        """Write the new tokens of a pass; gives all that it sees."""
        assert stored is not None
        current = self._pass
        stored[current.slots, :, current.places] = states.transpose(1, 2)
        return stored[:, :, : current.num_keys][current.seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._pass.num_keys, 0

    def get_seq_length(self) -> int:
        """Tokens before those of the pass, in a pass without a mask."""
        return self._pass.num_keys - self._pass.num_new

    def get_max_length(self) -> int:
        return self._shape[1]
