"""A module that holds shapes in place of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
from flax import nnx

from easydel.paths import named_modules, nodes_of
from easydel.rngs import StillStream

M = TypeVar("M", bound=nnx.Module)


def build_abstract(build: Callable[[], M]) -> M:
    """Return the module with `jax.ShapeDtypeStruct`s in place of arrays; nothing is computed.

    Plain array attributes (not variables) need care: flax marks tracers as static, and they would leak.
    """

    def marked() -> M:
        module = build()
        modules = named_modules(module, by_layer=False)
        for path, name in plain_arrays(modules):
            setattr(modules[path], name, nnx.data(getattr(modules[path], name)))
        for stream in nodes_of(module, StillStream):  # a dropout layer kept one: it must count when it really runs
            object.__setattr__(stream, "__class__", nnx.RngStream)
        return module

    return nnx.eval_shape(marked)


def plain_arrays(modules: Mapping[str, nnx.Module]) -> list[tuple[str, str]]:
    """Return (module path, attribute) of the abstract arrays that modules, by path, keep outside variables."""
    return [
        (path, name)
        for path, node in modules.items()
        for name, value in vars(node).items()
        if isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct)
    ]
