"""A module that holds shapes in place of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from flax import nnx

from easydel.paths import nodes_of, plain_arrays
from easydel.rngs import StillStream

M = TypeVar("M", bound=nnx.Module)


def build_abstract(build: Callable[[], M]) -> M:
    """Return the module with `jax.ShapeDtypeStruct`s in place of arrays; nothing is computed.

    Plain array attributes (not variables) need care: flax marks tracers as static, and they would leak.
    """

    def marked() -> M:
        module = build()
        for node, name in plain_arrays(module).values():
            setattr(node, name, nnx.data(getattr(node, name)))
        for stream in nodes_of(module, StillStream):  # a dropout layer kept one: it must count when it really runs
            object.__setattr__(stream, "__class__", nnx.RngStream)
        return module

    return nnx.eval_shape(marked)
