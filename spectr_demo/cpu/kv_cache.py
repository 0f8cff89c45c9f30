"""A KV cache that grows in place, on a CPU.

transformers' `DynamicCache` copies all keys and values for every new token. Here a token's are
written behind the others, into memory with room for more; what attention reads is a view of it,
with the same values.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """A layer of a `DynamicCache` whose `update` need not copy what is there."""

    _key_memory: Tensor | None = None  # (R, H, room, D), as is that of values
    _value_memory: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Both (R, H, T, D), behind what there is; gives all of it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self._key_memory = _join(self.keys, key_states, self._key_memory)
        self.values, self._value_memory = _join(self.values, value_states, self._value_memory)
        return self.keys, self.values


def grow_in_place_(cache: Cache) -> None:
    """Have a cache's plain layers, which would copy, grow so; others, with a window, stay."""
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = GrowingLayer  # the same keys and values


def _join(old: Tensor | None, new: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
    """Append `new` to `old`, which is None or empty at first. Gives both together, a view, and the
    memory that it lies in. The given memory is used again if it begins with `old` and has room."""
    if old is None or old.numel() == 0:
        old = new[:, :, :0]
    num_old, num = old.shape[2], old.shape[2] + new.shape[2]
    if (
        memory is None
        or (memory.data_ptr(), memory.shape[:2]) != (old.data_ptr(), old.shape[:2])
        or memory.shape[2] < num
    ):
        R, H, _, D = new.shape
        # By a share, or a long text would be copied every so many tokens.
        memory = new.new_empty(R, H, num + max(128, num // 4), D)
        memory[:, :, :num_old] = old
    memory[:, :, num_old:num] = new
    return memory[:, :, :num], memory
