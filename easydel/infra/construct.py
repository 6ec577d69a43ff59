"""How a module class is called with what it accepts, really or abstractly."""

from __future__ import annotations

import inspect
import typing
from typing import Any

import jax.numpy as jnp
from flax import nnx


def construct(cls: Any, config: Any, *, dtype: Any, param_dtype: Any, precision: Any, rngs: nnx.Rngs) -> Any:
    """Build `cls(config, …)`, passing on those of the usual arguments that its `__init__` takes.

    Raises:
        TypeError: `__init__` needs other arguments, so that the class cannot be built from a config alone.
    """
    offered = {"dtype": dtype, "param_dtype": param_dtype, "precision": precision, "rngs": rngs}
    signature = inspect.signature(cls)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    accepted = {k: v for k, v in offered.items() if takes_any or k in signature.parameters}
    try:
        signature.bind(config, **accepted)
    except TypeError as error:
        raise TypeError(
            f"{cls.__name__}{signature} cannot be built from a config: __init__ should take (config, dtype, "
            f"param_dtype, precision, rngs) and give defaults to whatever else it takes ({error})"
        ) from error
    return cls(config, **accepted)


def abstract_module(cls: Any, config: Any, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32) -> Any:
    """Build a module whose variables hold shapes only (`jax.ShapeDtypeStruct`)."""
    from easydel.hub.abstract import build_abstract, shape_rngs

    return build_abstract(
        lambda: construct(cls, config, dtype=dtype, param_dtype=param_dtype, precision=None, rngs=shape_rngs())
    )


def config_class_of(cls: Any) -> Any:
    """Return a module class's config class: `config_class`, else the annotation of `__init__`'s `config`."""
    if getattr(cls, "config_class", None) is not None:
        return cls.config_class
    try:
        annotation = typing.get_type_hints(cls.__init__).get("config")
    except NameError:  # an annotation that names something local to a function
        annotation = inspect.signature(cls.__init__).parameters["config"].annotation
    return annotation if isinstance(annotation, type) and hasattr(annotation, "from_pretrained") else None
