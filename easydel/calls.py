"""What a model's forward pass takes and gives, whatever its class."""

from __future__ import annotations

import inspect
from typing import Any

import jax

_KINDS = inspect.Parameter


def forward_parameters(model: Any) -> dict[str, inspect.Parameter]:
    """Return the named parameters of the model's `__call__`, without `self` and `**kwargs`."""
    parameters = inspect.signature(type(model).__call__).parameters
    named = {n: p for n, p in parameters.items() if p.kind in (_KINDS.POSITIONAL_OR_KEYWORD, _KINDS.KEYWORD_ONLY)}
    named.pop("self", None)
    return named


def takes(model: Any, name: str) -> bool:
    """Whether the forward pass declares the argument `name`."""
    return name in forward_parameters(model)


def takes_anything(model: Any) -> bool:
    """Whether the forward pass has `**kwargs`."""
    parameters = inspect.signature(type(model).__call__).parameters.values()
    return any(p.kind is _KINDS.VAR_KEYWORD for p in parameters)


def logits_of(outputs: Any) -> jax.Array:
    """Return the logits of an output object, or the bare array that they are.

    Raises:
        TypeError: there are none.
    """
    logits = outputs if isinstance(outputs, jax.Array) else getattr(outputs, "logits", None)
    if logits is None:
        raise TypeError(
            f"{type(outputs).__name__} has no logits: a model must return an array of logits or an object with .logits "
            "for losses and generation (a backbone alone has none)"
        )
    return logits
