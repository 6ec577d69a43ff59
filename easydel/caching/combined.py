"""The caches of layers that stand side by side in one block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CombinedCache:
    """A block's cache where several of its layers keep something, each what its kind needs.

    Attributes:
        parts: the layers' caches, in an order that the block knows.
    """

    parts: tuple[Any, ...]

    @property
    def keeps_slots(self) -> bool:
        """Whether single slots are looked back at."""
        return any(getattr(part, "keeps_slots", True) for part in self.parts)

    def grow(self, max_length: int) -> Self:
        """Return the cache with room for `max_length` positions."""
        return type(self)(tuple(part.grow(max_length) for part in self.parts))

    def crop(self, length: int, index: int) -> Self:
        """Return the cache without the slots from `length` on, of `index` written.

        Raises:
            ValueError: a part cannot do without them.
        """
        return type(self)(tuple(part.crop(length, index) for part in self.parts))

    def shift(self, by: Any) -> Self:
        """Return the cache with all that it holds `by` slots further right."""
        return type(self)(tuple(part.shift(by) for part in self.parts))
