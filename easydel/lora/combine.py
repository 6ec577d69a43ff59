"""One adapter made of several, with PEFT's meanings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from easydel.errors import UnsupportedError
from easydel.lora.layer import AdapterSpec
from easydel.lora.named import Adapter

Part = tuple[Mapping[str, jax.Array], float]
"""The arrays of one layer's adapter, and its weight."""


def combined(
    adapters: Mapping[str, Adapter], weights: Sequence[float], combination_type: str, rank: int | None = None
) -> Adapter:
    """Return an adapter that stands for a weighted sum of others.

    Args:
        adapters: by name.
        weights: of each, in their order.
        combination_type: `"linear"` sums `A` and `B` apart, each weighted by the square root (a rough approximation, of
            adapters of one rank); `"cat"` puts them side by side, which is exact, and the ranks add up; `"svd"` is the
            best approximation of a rank.
        rank: for `"svd"`; the largest of the adapters' ranks if `None`.

    Raises:
        ValueError: no adapters, another number of weights, weights that are not finite, or ranks that differ.
        UnsupportedError: another combination, or adapters with DoRA.
    """
    names = list(adapters)
    if not names or len(weights) != len(names):
        raise ValueError(f"expected a weight for each adapter, got {list(weights)} for {names}")
    if not all(isinstance(w, int | float) and math.isfinite(w) for w in weights):
        raise ValueError(f"weights={list(weights)}: expected finite numbers")
    if combination_type not in _WAYS:
        raise UnsupportedError(
            f"combination_type={combination_type!r} is not supported; choose one of {', '.join(_WAYS)}"
        )
    if rank is not None and (combination_type != "svd" or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"svd_rank={rank!r}: expected a positive integer, and only with combination_type='svd'")
    if dora := [name for name in names if any(spec.dora for spec in adapters[name].specs.values())]:
        raise UnsupportedError(f"combining adapters with DoRA ({', '.join(dora)}) is not supported")
    if saved := [name for name in names if adapters[name].saved]:
        raise UnsupportedError(f"combining adapters with modules_to_save ({', '.join(saved)}) is not supported")
    paths = dict.fromkeys(path for adapter in adapters.values() for path in adapter.specs)
    if combination_type == "linear":
        _check_ranks(adapters)
    largest = max(spec.rank for adapter in adapters.values() for spec in adapter.specs.values())
    specs, arrays = {}, {}
    for path in paths:
        held = [(adapters[name], float(w)) for name, w in zip(names, weights, strict=True)]
        parts = [(adapter.arrays[path], w) for adapter, w in held if path in adapter.arrays]
        a, b = _WAYS[combination_type](parts, largest if rank is None else rank)
        arrays[path] = {"a": a, "b": b, "scale": jnp.ones_like(parts[0][0]["scale"])}
        dropout = max(adapter.specs[path].dropout for adapter, _ in held if path in adapter.specs)
        specs[path] = AdapterSpec(a.shape[-1], dropout)
    return Adapter(specs, arrays)


def _check_ranks(adapters: Mapping[str, Adapter]) -> None:
    paths = {path for adapter in adapters.values() for path in adapter.specs}
    for path in sorted(paths):
        ranks = {name: adapter.specs[path].rank for name, adapter in adapters.items() if path in adapter.specs}
        if len(set(ranks.values())) > 1:
            raise ValueError(f"{path}: combination_type='linear' needs equal ranks, got {ranks}; use 'cat' or 'svd'")


def _factor(part: Part) -> jax.Array:
    """Return weight times scale of a part, to be multiplied with its `a`."""
    arrays, weight = part
    scale = arrays["scale"] * weight
    return scale.reshape(scale.shape + (1,) * (arrays["a"].ndim - scale.ndim))


def _linear(parts: Sequence[Part], rank: int) -> tuple[jax.Array, jax.Array]:
    del rank
    factors = [_factor(part) for part in parts]  # the sign goes to one side only, or two would cancel
    sides = [(jnp.sign(f) * jnp.sqrt(jnp.abs(f)), jnp.sqrt(jnp.abs(f))) for f in factors]
    a = sum(arrays["a"] * left for (arrays, _), (left, _) in zip(parts, sides, strict=True))
    b = sum(arrays["b"] * right for (arrays, _), (_, right) in zip(parts, sides, strict=True))
    return jnp.asarray(a), jnp.asarray(b)


def _cat(parts: Sequence[Part], rank: int) -> tuple[jax.Array, jax.Array]:
    del rank
    a = jnp.concatenate([part[0]["a"] * _factor(part) for part in parts], axis=-1)
    return a, jnp.concatenate([arrays["b"] for arrays, _ in parts], axis=-2)


def _svd(parts: Sequence[Part], rank: int) -> tuple[jax.Array, jax.Array]:
    """Return the best approximation of the sum (Eckart-Young); of low-rank factors, so no full matrix is decomposed."""
    a, b = _cat(parts, rank)
    left, upper = jnp.linalg.qr(a)
    right, lower = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    u, s, vt = jnp.linalg.svd(upper @ jnp.swapaxes(lower, -1, -2), full_matrices=False)
    made = jnp.matmul(left, u[..., :rank]), jnp.matmul(vt[..., :rank, :] * s[..., :rank, None], right.swapaxes(-1, -2))
    missing = rank - made[0].shape[-1]
    if missing <= 0:
        return made
    return tuple(_padded(array, axis, missing) for array, axis in zip(made, (-1, -2), strict=True))  # type: ignore[return-value]


def _padded(array: jax.Array, axis: int, count: int) -> jax.Array:
    widths: list[Any] = [(0, 0)] * array.ndim
    widths[axis] = (0, count)
    return jnp.pad(array, widths)


_WAYS: dict[str, Callable[[Sequence[Part], int], tuple[jax.Array, jax.Array]]] = {
    "linear": _linear,
    "cat": _cat,
    "svd": _svd,
}
