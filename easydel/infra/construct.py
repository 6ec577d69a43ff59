"""How a module class is called with what it accepts, really or abstractly."""

from __future__ import annotations

import inspect
from typing import Any

import jax.numpy as jnp
from flax import nnx


def construct(cls: Any, config: Any, *, dtype: Any, param_dtype: Any, precision: Any, rngs: nnx.Rngs) -> Any:
    """Build `cls(config, …)`, passing on those of the usual arguments that its `__init__` takes.

    Raises:
        TypeError: `__init__` needs other arguments, so that the class cannot be built from a config alone.
    """
    offered = {"dtype": dtype, "param_dtype": param_dtype, "precision": precision, "rngs": rngs}
    # Of the function, not the class: nnx's metaclass takes anything.
    signature = inspect.signature(cls.__init__.__get__(object()))
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
    from easydel.hub.abstract import build_abstract
    from easydel.rngs import shape_rngs

    return build_abstract(
        lambda: construct(cls, config, dtype=dtype, param_dtype=param_dtype, precision=None, rngs=shape_rngs())
    )


def config_class_of(cls: Any) -> Any:
    """Return a module class's config class: `config_class`, else the annotation of `__init__`'s `config`.

    An annotation that is text is looked up where `__init__` was written; if it names something local to a function, the
    one config class of that name is meant. `None` if there is none, or several.
    """
    if getattr(cls, "config_class", None) is not None:
        return cls.config_class
    parameter = inspect.signature(cls.__init__).parameters.get("config")
    annotation = None if parameter is None else parameter.annotation
    if isinstance(annotation, str):
        written_in = getattr(inspect.unwrap(cls.__init__), "__globals__", {})
        found = written_in.get(annotation) or _config_classes_named(annotation)
        annotation = found[0] if isinstance(found, list) and len(found) == 1 else found
    return annotation if isinstance(annotation, type) and hasattr(annotation, "from_pretrained") else None


def _config_classes_named(name: str) -> list[type]:
    from easydel.infra.base_config import EasyDeLBaseConfig

    known: set[Any] = set()
    waiting: list[Any] = [EasyDeLBaseConfig]
    while waiting:
        for cls in waiting.pop().__subclasses__():
            if cls not in known:
                known.add(cls)
                waiting.append(cls)
    return [cls for cls in known if cls.__name__ == name.rpartition(".")[2]]
