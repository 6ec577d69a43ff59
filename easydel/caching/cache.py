"""`Cache`: one cache per layer, and the account of what has been written."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from easydel.caching.stacked import StackedCaches
from easydel.errors import UnsupportedError
from easydel.paths import named_modules

LayerCache = Any
"""A layer's cache: a pytree with `grow(max_length)`, whose layer knows how to update it."""


def caching_layers(module: Any) -> list[Any]:
    """Return the outermost modules that make caches (`init_cache`), in order."""
    found: dict[str, Any] = {}
    for path, inner in named_modules(module).items():  # outer ones come first
        inside = any(path == outer or path.startswith(f"{outer}/" if outer else "") for outer in found)
        if hasattr(inner, "init_cache") and not inside:
            found[path] = inner
    return list(found.values())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Caches of all layers.

    A *slot* is a place in the sequence, padding included; slots are filled from 0 on.

    Attributes:
        layers: one cache per caching layer, in order; of layers that run in a scan, `StackedCaches`.
        valid: bool `[batch, max_length]`, whether a slot holds a token (not padding, not empty); `None` if no layer
            looks back at single slots, as in recurrent models, whose caches have no length.
        index: int32 `[]`, the number of slots written.
        seen: int32 `[batch]`, the number of tokens among them.
        starts: int32 `[batch]`, slots before it are left padding.
        is_empty: whether nothing was written yet (static): new tokens then need to look at one another only.
    """

    layers: tuple[LayerCache, ...] | StackedCaches
    valid: jax.Array | None
    index: jax.Array
    seen: jax.Array
    starts: jax.Array
    is_empty: bool = field(default=True, metadata={"static": True})

    @classmethod
    def create(
        cls, layers: tuple[LayerCache, ...] | StackedCaches, batch_size: int, max_length: int | None, starts: jax.Array
    ) -> Cache:
        """Make an empty cache around the layers' empty caches; `max_length=None`: without an end."""
        return cls(
            layers=layers,
            valid=None if max_length is None else jnp.zeros((batch_size, max_length), bool),
            index=jnp.zeros((), jnp.int32),
            seen=jnp.zeros((batch_size,), jnp.int32),
            starts=starts,
        )

    @property
    def batch_size(self) -> int:
        """The number of rows."""
        return self.starts.shape[0]

    @property
    def max_length(self) -> int | None:
        """The number of slots; `None`: no end."""
        return None if self.valid is None else self.valid.shape[1]

    def extend(self, attention_mask: jax.Array | None, batch: int, length: int) -> tuple[Cache, jax.Array, jax.Array]:
        """Make room for `length` new tokens.

        Args:
            attention_mask: bool or 0/1 `[batch, length]` for the new tokens, or `[batch, written + length]` for all;
                its last `length` columns count. `None`: all are tokens.
            batch: rows of the new tokens.
            length: how many are new.

        Returns:
            The cache with its account brought up to date (the layers' caches are not yet), the new tokens' mask, bool
            `[batch, length]`, and their positions, int32 `[batch, length]`.

        Raises:
            ValueError: the batch differs, the mask's width is neither, or the cache is too short (the last two are
                known only outside `jax.jit`).
        """
        self._check(attention_mask, batch, length)
        slots = self.index + jnp.arange(length, dtype=jnp.int32)
        new = slots[None, :] >= self.starts[:, None]
        if attention_mask is not None:
            new &= attention_mask[:, -length:].astype(bool)
        running = self.seen[:, None] + jnp.cumsum(new, axis=1, dtype=jnp.int32)
        valid = self.valid
        if valid is not None:
            valid = jax.lax.dynamic_update_slice(valid, new, (0, 0 if self.is_empty else self.index))
        cache = replace(self, valid=valid, index=self.index + length, seen=running[:, -1], is_empty=False)
        return cache, new, jnp.maximum(running - 1, 0)

    def with_layers(self, layers: tuple[LayerCache, ...] | StackedCaches) -> Cache:
        """Return the cache with the layers' updated caches."""
        return replace(self, layers=layers)

    def grow(self, max_length: int) -> Cache:
        """Return the cache with room for `max_length` positions (not fewer than it has)."""
        valid = self.valid
        if valid is not None:
            if max_length < valid.shape[1]:
                raise ValueError(f"a cache of {self.max_length} positions cannot grow to {max_length}")
            valid = jnp.pad(valid, ((0, 0), (0, max_length - valid.shape[1])))
        return replace(self, valid=valid, layers=self._each("grow", max_length))

    def crop(self, length: int) -> Cache:
        """Return the cache of the first `length` slots (columns of what it was given, padding included).

        Args:
            length: at most the slots written; negative: so many fewer than those.

        Raises:
            ValueError: there are not as many; a layer is recurrent; a sliding layer's ring has wrapped around.
            UnsupportedError: a layer's cache has no `crop`.
        """
        index = int(self.index)
        kept = index + length if length < 0 else length
        if not 0 <= kept <= index:
            raise ValueError(f"a cache of which {index} slots are written cannot be cropped to {length}")
        layers = self._each("crop", kept, index)
        if kept == index or self.valid is None:
            return replace(self, layers=layers)
        valid = self.valid & (jnp.arange(self.valid.shape[1]) < kept)
        seen, index_now = valid.sum(axis=1, dtype=jnp.int32), jnp.full((), kept, jnp.int32)
        return replace(self, layers=layers, valid=valid, seen=seen, index=index_now)

    def repeat(self, count: int) -> Cache:
        """Return the cache with each row `count` times, one after another: a prefix for several prompts."""
        return self.reorder(jnp.repeat(jnp.arange(self.batch_size, dtype=jnp.int32), count))

    def shift(self, by: Any) -> Cache:
        """Return the cache with all that it holds `by` slots further right; positions stay what they are.

        Args:
            by: int32 `[]`; negative: left. What leaves the cache is forgotten.
        """
        valid = self.valid
        if valid is not None:
            before = jnp.arange(valid.shape[1]) - by
            valid = jnp.roll(valid, by, axis=1) & (before >= 0) & (before < valid.shape[1])
        starts = jnp.maximum(self.starts + by, 0)
        return replace(self, layers=self._each("shift", by), valid=valid, starts=starts, index=self.index + by)

    def insert(self, other: Cache, row: Any) -> Cache:
        """Return the cache with another's only row in place of a row of its own.

        Args:
            other: of one row, as long as this one, and with as many slots written: `shift` it there.
            row: int32 `[]`.
        """
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=row, axis=0)
        if isinstance(self.layers, StackedCaches):
            assert isinstance(other.layers, StackedCaches)
            layers: Any = self.layers.insert(other.layers, row)
        else:
            layers = jax.tree.map(put, self.layers, other.layers)
        valid = None if self.valid is None or other.valid is None else put(self.valid, other.valid)
        seen, starts = put(self.seen, other.seen), put(self.starts, other.starts)
        return replace(self, layers=layers, valid=valid, seen=seen, starts=starts)

    def save(self, directory: Any) -> None:
        """Write the cache into a directory, which is made; see `easydel.caching.files.save_cache`."""
        from easydel.caching.files import save_cache

        save_cache(self, directory)

    @staticmethod
    def load(directory: Any, mesh: Any = None) -> Cache:
        """Read a cache that was saved, onto any mesh; see `easydel.caching.files.load_cache`."""
        from easydel.caching.files import load_cache

        return load_cache(directory, mesh)

    def reorder(self, rows: jax.Array) -> Cache:
        """Return the cache whose rows are those named, in that order; one may be named several times.

        Args:
            rows: int32 `[new batch]`.
        """
        if isinstance(self.layers, StackedCaches):
            layers: Any = self.layers.reorder(rows)
        else:  # whatever a layer keeps, its arrays have one entry for each row
            layers = jax.tree.map(lambda kept: kept[rows], self.layers)
        valid = None if self.valid is None else self.valid[rows]
        return replace(self, layers=layers, valid=valid, seen=self.seen[rows], starts=self.starts[rows])

    def _each(self, change: str, *arguments: Any) -> Any:
        """Return the layers' caches, each changed by its method of this name."""
        for layer in [self.layers] if isinstance(self.layers, StackedCaches) else self.layers:
            if not hasattr(layer, change):
                raise UnsupportedError(f"a layer's cache, {type(layer).__name__}, has no method {change}")
        if isinstance(self.layers, StackedCaches):
            return getattr(self.layers, change)(*arguments)
        return tuple(getattr(layer, change)(*arguments) for layer in self.layers)

    def _check(self, attention_mask: jax.Array | None, batch: int, length: int) -> None:
        if batch != self.starts.shape[0]:
            raise ValueError(f"the cache was made for batch_size={self.starts.shape[0]}, the input has {batch} rows")
        width = length if attention_mask is None else attention_mask.shape[1]
        if width < length:
            raise ValueError(f"attention_mask of width {width} does not cover {length} new tokens")
        if isinstance(self.index, jax.core.Tracer):
            return
        written = int(self.index)
        if self.max_length is not None and written + length > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} positions; {written} are written and {length} more do not fit: "
                "make it longer with init_operations_cache(max_length=…)"
            )
        if width not in (length, written + length):
            raise ValueError(
                f"attention_mask has width {width}: expected {length} (new tokens) or {written + length} (all so far)"
            )
