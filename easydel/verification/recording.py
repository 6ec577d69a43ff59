"""What the modules of a model return in one eager run, by path."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easydel.infra.forward import prepare_inputs
from easydel.paths import named_modules

_LOCK = threading.RLock()  # classes are changed for a while: one thread at a time


@dataclass(frozen=True)
class Call:
    """The first call of a module.

    Attributes:
        order: how many calls of other modules had ended before this one did.
        given: the first float array among the arguments; `None`: there is none.
        made: the float arrays of what was returned, float32.
    """

    order: int
    given: np.ndarray | None
    made: tuple[np.ndarray, ...]


@contextmanager
def recorded(model: nnx.Module) -> Iterator[dict[str, Call]]:
    """Record the calls of all modules inside `model` while in the block, those of other modules not.

    Python looks `__call__` up on the class, so it is the classes that are changed; they are as before afterwards,
    whatever happens. What is traced rather than run leaves no record.

    Yields:
        Path → its first call, filled as modules return, so in the order in which they do.
    """
    paths = {id(module): path for path, module in named_modules(model).items() if path}
    calls: dict[str, Call] = {}
    running: set[int] = set()

    def recording(call: Any) -> Any:
        @functools.wraps(call)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(self))
            if path is None or path in calls or id(self) in running:  # running: a class that calls its parent's
                return call(self, *args, **kwargs)
            running.add(id(self))
            try:
                out = call(self, *args, **kwargs)
            finally:
                running.discard(id(self))
            given, made = _arrays((args, kwargs)), _arrays(out)
            if given is not None and made is not None:
                calls[path] = Call(len(calls), given[0] if given else None, tuple(made))
            return out

        return run

    owners: set[Any] = {_owner(type(module)) for module in named_modules(model).values()} - {None}
    with _LOCK:
        before = {cls: cls.__dict__["__call__"] for cls in owners}
        try:
            for cls, call in before.items():
                cls.__call__ = recording(call)
            yield calls
        finally:
            for cls, call in before.items():
                cls.__call__ = call


def _owner(cls: type) -> type | None:
    """Return the class that defines the `__call__` which instances of `cls` run."""
    return next((base for base in cls.__mro__ if "__call__" in base.__dict__), None)


def _arrays(tree: Any) -> list[np.ndarray] | None:
    """Return the float arrays in a tree, float32; `None` if it holds tracers: values are not known then."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return None
    return [np.asarray(leaf, np.float32) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


def run_recorded(model: Any, inputs: Mapping[str, np.ndarray]) -> tuple[dict[str, Call], dict[str, np.ndarray]]:
    """Run a model once, operation by operation.

    Args:
        model: whose layers are held one by one: those in a scan are traced.
        inputs: of its forward pass.

    Returns:
        Path → call, and name → float array of what the model returns.

    Raises:
        ValueError: tokens outside the vocabulary, or more of them than the model has positions for.
    """
    arguments = prepare_inputs(model, inputs)
    with recorded(model) as calls:
        out = model(**arguments)
    found = {name: _arrays(out[name]) for name in out if isinstance(out[name], jax.Array)}
    return calls, {name: arrays[0] for name, arrays in found.items() if arrays}
