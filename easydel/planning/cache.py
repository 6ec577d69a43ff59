"""The memory of a cache for generation."""

from __future__ import annotations

import math
from typing import Any

import jax

from easydel.infra.functional import bind
from easydel.planning.step import Step


def cache_bytes(step: Step, batch_size: int, max_length: int) -> int:
    """Return the bytes each device holds of an empty cache, as `init_operations_cache` would lay it out.

    0 for a model that takes none.
    """
    if not step.module.takes_cache:
        return 0

    def make(params: Any, other: Any) -> Any:
        return bind(step.graphdef, params, other).init_operations_cache(batch_size, max_length)

    lowered = jax.jit(make).lower(step.arguments.params, step.arguments.other)
    shapes, shardings = jax.tree.leaves(lowered.out_info), jax.tree.leaves(lowered.compile().output_shardings)
    parts = zip(shapes, shardings, strict=True)
    return sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in parts)
