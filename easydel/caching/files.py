"""Caches on disk: `cache.safetensors` and `cache.json`, which says what kinds they are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from easydel.caching.attention import AttentionCache
from easydel.caching.cache import Cache
from easydel.caching.combined import CombinedCache
from easydel.caching.cross import CrossAttentionCache, EncoderDecoderCache
from easydel.caching.latent import LatentCache
from easydel.caching.quantized import QuantizedStates
from easydel.caching.recurrent import RecurrentCache
from easydel.caching.sliding import SlidingCache
from easydel.caching.stacked import StackedCaches
from easydel.distributed import by_first, whole
from easydel.errors import UnsupportedError
from easydel.sharding.activations import activation_mesh, activation_spec

ARRAYS, KINDS, FORMAT = "cache.safetensors", "cache.json", 1
_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        *(AttentionCache, Cache, CombinedCache, CrossAttentionCache, EncoderDecoderCache),
        *(LatentCache, QuantizedStates, RecurrentCache, SlidingCache, StackedCaches),
    )
}
_STATES = ("batch", None, "heads", None)
"""The roles of the dimensions of keys and values; of others, by the fields that they stand in:"""
_ROLES = {"state": ("batch", "heads", None, None), "window": ("batch", None, None), "valid": ("batch", None)}


def save_cache(cache: Cache, directory: Any) -> None:
    """Write a cache.

    Args:
        cache: of layers of this library's kinds.
        directory: made if there is none; a cache that it holds is replaced.

    Raises:
        UnsupportedError: a layer's cache is of another kind.
    """
    from safetensors.numpy import save_file

    arrays: dict[str, np.ndarray] = {}
    said = {"format": FORMAT, "cache": _described(cache, "cache", arrays)}
    folder = Path(directory)

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / (ARRAYS + ".part")
        save_file(arrays, written)
        written.replace(folder / ARRAYS)
        (folder / KINDS).write_text(json.dumps(said, indent=1) + "\n")

    by_first(write)


def load_cache(directory: Any, mesh: Any = None) -> Cache:
    """Read a cache, bit for bit what was saved.

    Args:
        directory: that it was saved in.
        mesh: on which rows and heads are split as a forward pass splits them; `None`: one device.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another format, or its files do not fit together.
    """
    from safetensors.numpy import load_file

    folder = Path(directory)
    said = json.loads((folder / KINDS).read_text())
    if said.get("format") != FORMAT:
        raise ValueError(f"{folder / KINDS} is of format {said.get('format')!r}, expected {FORMAT}")
    arrays = load_file(folder / ARRAYS)
    try:
        cache = _restored(said["cache"], arrays)
    except KeyError as error:
        raise ValueError(f"{folder / ARRAYS} and {KINDS} do not fit together: {error} is missing") from error
    return jax.tree.map(jax.device_put, cache) if mesh is None else _placed(cache, mesh)


def _described(node: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    if node is None or isinstance(node, bool | int | str):
        return {"value": node}
    if isinstance(node, jax.Array | np.ndarray):
        arrays[name] = np.ascontiguousarray(whole(node)).reshape(node.shape)
        return {"array": name}
    if isinstance(node, tuple):
        return {"tuple": [_described(part, f"{name}/{place}", arrays) for place, part in enumerate(node)]}
    if isinstance(node, dict):
        return {"dict": {key: _described(part, f"{name}/{key}", arrays) for key, part in node.items()}}
    kind = type(node).__name__
    if _KINDS.get(kind) is not type(node):
        raise UnsupportedError(f"a cache of kind {kind} cannot be saved (offered: {', '.join(sorted(_KINDS))})")
    parts = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    return {"kind": kind, "fields": {key: _described(part, f"{name}/{key}", arrays) for key, part in parts.items()}}


def _restored(said: Any, arrays: dict[str, np.ndarray]) -> Any:
    if "value" in said:
        return said["value"]
    if "array" in said:
        return arrays[said["array"]]
    if "tuple" in said:
        return tuple(_restored(part, arrays) for part in said["tuple"])
    if "dict" in said:
        return {key: _restored(part, arrays) for key, part in said["dict"].items()}
    return _KINDS[said["kind"]](**{key: _restored(part, arrays) for key, part in said["fields"].items()})


def _placed(cache: Cache, mesh: Any) -> Cache:
    stacked = isinstance(cache.layers, StackedCaches)

    def place(path: Any, array: Any) -> jax.Array:
        names = [getattr(entry, "name", None) for entry in path]
        roles: tuple[str | None, ...] = ()
        if names[0] == "layers":
            kept = next((_ROLES[name] for name in reversed(names) if name in _ROLES), _STATES)
            roles = (None, *kept) if stacked else kept
        return jax.device_put(array, NamedSharding(mesh, activation_spec(array.shape, *roles)))

    with activation_mesh(mesh):
        return jax.tree_util.tree_map_with_path(place, cache)
