"""A mapping bounded by the total cost of its entries; what was used longest ago leaves first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Recent(Generic[V]):
    """Keeps values up to a total cost of ``bound``, in any unit; a value that costs more is not kept."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.held = 0
        self._entries: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()

    def get(self, key: Hashable) -> V | None:
        found = self._entries.get(key)
        if found is None:
            return None
        self._entries.move_to_end(key)
        return found[0]

    def put(self, key: Hashable, value: V, cost: int) -> None:
        self.held -= self._entries.pop(key, (None, 0))[1]
        if cost > self.bound:
            return
        self._entries[key] = value, cost
        self.held += cost
        while self.held > self.bound:
            self.held -= self._entries.popitem(last=False)[1][1]
