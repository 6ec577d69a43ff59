"""What a model's forward pass takes and gives, whatever its class."""

from __future__ import annotations

import inspect
from typing import Any

import jax
from flax import nnx

from easydel.errors import UnsupportedError
from easydel.paths import named_variables

LOSS_ARGUMENTS = ("labels", "start_positions", "end_positions", "loss_config")
_KINDS = inspect.Parameter


def forward_parameters(model: Any) -> dict[str, inspect.Parameter]:
    """Return the named parameters of the `__call__` of a model (or class), without `self` and `**kwargs`.

    A class that passes its `**kwargs` on to its `backbone_class` takes what that takes, and what gives the loss.
    """
    cls = model if isinstance(model, type) else type(model)
    named, backbone = _named(cls), _backbone(cls)
    if backbone is None:
        return named
    inner = _named(backbone)
    return {n: p for n, p in named.items() if n in inner or n in LOSS_ARGUMENTS} | inner


def takes(model: Any, name: str) -> bool:
    """Whether the forward pass declares the argument `name`."""
    return name in forward_parameters(model)


def takes_anything(model: Any) -> bool:
    """Whether the forward pass has `**kwargs` that could be anything."""
    return _has_kwargs(_backbone(type(model)) or type(model))


def _named(cls: type) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(cls.__call__).parameters
    named = {n: p for n, p in parameters.items() if p.kind in (_KINDS.POSITIONAL_OR_KEYWORD, _KINDS.KEYWORD_ONLY)}
    named.pop("self", None)
    return named


def _has_kwargs(cls: type) -> bool:
    return any(p.kind is _KINDS.VAR_KEYWORD for p in inspect.signature(cls.__call__).parameters.values())


def _backbone(cls: type) -> type | None:
    return getattr(cls, "backbone_class", None) if _has_kwargs(cls) else None


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


def refuse_shapes(module: nnx.Module, what: str, error: Exception | None = None) -> None:
    """Raise `UnsupportedError` if a module holds shapes in place of arrays: `what` needs numbers."""
    values = (variable.get_value() for variable in named_variables(module, by_layer=False).values())
    if any(isinstance(value, jax.ShapeDtypeStruct) for value in values):
        name = type(module).__name__
        raise UnsupportedError(
            f"{what} is not supported by a {name} of shapes only (lazy_init): make it with "
            f"{name}.sharded_init(config, mesh, rngs=…), or load it with {name}.from_pretrained(…)"
        ) from error
