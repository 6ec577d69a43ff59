"""Building a module for its shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx

from easydel.paths import named_modules

M = TypeVar("M", bound=nnx.Module)


class _StillStream(nnx.RngStream):
    """A stream that gives the same key each time and does not count."""

    def __call__(self) -> jax.Array:
        return self.key[...]


def shape_rngs() -> nnx.Rngs:
    """Return an `nnx.Rngs` for abstract building only: every parameter would get the same key.

    Flax's own stream updates a counter per parameter, and under a trace each update costs a walk over everything
    traced so far: 5 of the 6 seconds it took to build 270 parameters abstractly.
    """
    rngs = nnx.Rngs(0)
    setattr(rngs, "default", _StillStream(jax.random.key(0), tag="default"))  # noqa: B010 - made at run time
    return rngs


def build_abstract(build: Callable[[], M]) -> M:
    """Return the module with `jax.ShapeDtypeStruct`s in place of arrays; nothing is computed.

    Plain array attributes (not variables) need care: flax marks tracers as static, and they would leak.
    """

    def marked() -> M:
        module = build()
        modules = named_modules(module)
        for path, name in plain_arrays(module):
            setattr(modules[path], name, nnx.data(getattr(modules[path], name)))
        for _, node in nnx.iter_graph(module):
            if type(node) is _StillStream:  # a dropout layer kept one: it must count when it really runs
                object.__setattr__(node, "__class__", nnx.RngStream)
        return module

    return nnx.eval_shape(marked)


def plain_arrays(module: nnx.Module) -> list[tuple[str, str]]:
    """Return (module path, attribute) of the abstract arrays that a module keeps outside variables."""
    return [
        (path, name)
        for path, node in named_modules(module).items()
        for name, value in vars(node).items()
        if isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct)
    ]
