"""`OperationCacheMixin`: caches fit for a model's layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easydel.caching import Cache, LayerCache, QuantizedStates, StackedCaches, caching_layers
from easydel.calls import takes
from easydel.errors import UnsupportedError
from easydel.sharding import activation_mesh


class OperationCacheMixin:
    """Asks each layer that keeps something between calls for the cache of its kind."""

    config: Any
    dtype: Any

    def init_operations_cache(self, batch_size: int, max_length: int, starts: Any = None, dtype: Any = None) -> Cache:
        """Make an empty cache for `cache=` of the forward pass.

        A layer takes part by an `init_cache(batch_size, max_length, dtype)` method, which answers for what is inside
        it, too, and may return `None`; a model without any gets a cache that holds nothing. Where its `dtype` is int8,
        keys and values are `QuantizedStates`, and what else there is stays floats.

        Args:
            batch_size: number of rows.
            max_length: number of positions it can hold, padding included.
            starts: int32 `[batch]`, how many left-pad positions each row begins with; they are masked out and do not
                count as positions. `None` means none.
            dtype: in which keys and values are kept: `"int8"`, with a float32 scale for each head of each position, or
                `None`, the model's compute dtype.

        Raises:
            ValueError: sizes below one, `starts` of a wrong shape or range, or another dtype.
            UnsupportedError: int8 for a model that keeps no keys and values, or whose layers make plain arrays of it.
        """
        if dtype is not None and dtype not in ("int8", jnp.int8, np.int8):
            raise ValueError(f"dtype must be 'int8' or None (the model's {jnp.dtype(self.dtype)}), got {dtype!r}")
        if batch_size < 1 or max_length < 1:
            raise ValueError(f"batch_size and max_length must be positive, got {batch_size} and {max_length}")
        starts = _checked_starts(starts, batch_size, max_length)
        with activation_mesh(getattr(self, "mesh", None) if getattr(self, "is_sharded", False) else None):
            made = [layer.init_cache(batch_size, max_length, dtype or self.dtype) for layer in caching_layers(self)]
        caches: tuple[LayerCache, ...] = tuple(cache for cache in made if cache is not None)
        keeps_slots = not caches or any(getattr(cache, "keeps_slots", True) for cache in caches)
        layers = caches[0] if len(caches) == 1 and isinstance(caches[0], StackedCaches) else caches
        if dtype is not None:
            _check_quantized(self, layers)
        return Cache.create(layers, batch_size, max_length if keeps_slots else None, starts)

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


def _check_quantized(model: Any, layers: Any) -> None:
    leaves = jax.tree.leaves(layers, is_leaf=lambda x: isinstance(x, QuantizedStates))
    if any(getattr(leaf, "dtype", None) == jnp.int8 for leaf in leaves):  # numbers would be cut off without a scale
        raise UnsupportedError(
            f"{type(model).__name__} cannot keep int8: an init_cache of its layers made plain int8 arrays; it should "
            "make easydel.caching.QuantizedStates of them, or AttentionCache.create(…, dtype)"
        )
    if not any(isinstance(leaf, QuantizedStates) for leaf in leaves):
        raise UnsupportedError(f"{type(model).__name__} cannot keep int8: its layers keep no keys and values")
