"""`OperationCacheMixin`: caches fit for a model's layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easydel.caching import Cache, LayerCache, StackedCaches, caching_layers
from easydel.calls import takes
from easydel.sharding import activation_mesh


class OperationCacheMixin:
    """Asks each layer that keeps something between calls for the cache of its kind."""

    config: Any
    dtype: Any

    def init_operations_cache(self, batch_size: int, max_length: int, starts: Any = None, dtype: Any = None) -> Cache:
        """Make an empty cache for `cache=` of the forward pass.

        A layer takes part by an `init_cache(batch_size, max_length, dtype)` method, which answers for what is inside
        it, too, and may return `None`; a model without any gets a cache that holds nothing.

        Args:
            batch_size: number of rows.
            max_length: number of positions it can hold, padding included.
            starts: int32 `[batch]`, how many left-pad positions each row begins with; they are masked out and do not
                count as positions. `None` means none.
            dtype: in which keys and values are kept: `"int8"`, with a float32 scale for each head of each position, or
                `None`, the model's compute dtype.

        Raises:
            ValueError: sizes below one, `starts` of a wrong shape or range, or another dtype.
            UnsupportedError: int8 for layers that keep no keys and values, or whose caches know no such form.
        """
        if dtype is not None and jnp.dtype(dtype) != jnp.int8:
            raise ValueError(f"dtype must be 'int8' or None (the model's {jnp.dtype(self.dtype)}), got {dtype!r}")
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"batch_size and max_length must be positive, got {batch_size} and {max_length}")
        starts = _checked_starts(starts, batch_size, max_length)
        with activation_mesh(getattr(self, "mesh", None) if getattr(self, "is_sharded", False) else None):
            made = [layer.init_cache(batch_size, max_length, self.dtype) for layer in caching_layers(self)]
        caches: tuple[LayerCache, ...] = tuple(cache for cache in made if cache is not None)
        keeps_slots = not caches or any(getattr(cache, "keeps_slots", True) for cache in caches)
        layers = caches[0] if len(caches) == 1 and isinstance(caches[0], StackedCaches) else caches
        cache = Cache.create(layers, batch_size, max_length if keeps_slots else None, starts)
        return cache if dtype is None else cache.quantized()

    @property
    def takes_cache(self) -> bool:
        """Whether the forward pass takes a `cache`."""
        return takes(self, "cache")


def _checked_starts(starts: Any, batch_size: int, max_length: int) -> jax.Array:
    if starts is None:
        return jnp.zeros((batch_size,), jnp.int32)
    if not isinstance(starts, jax.core.Tracer):
        host = np.asarray(starts)
        if host.shape != (batch_size,) or host.dtype.kind not in "iu" or host.min() < 0 or host.max() > max_length:
            raise ValueError(
                f"starts must be integers [batch={batch_size}] in [0, max_length={max_length}], got {host.tolist()}"
            )
    return jnp.asarray(starts, jnp.int32)
