"""The five methods by name."""

from __future__ import annotations

from dataclasses import dataclass

from easydel.native.codes import Kind


@dataclass(frozen=True)
class Method:
    """What a method does to a layer.

    Attributes:
        name: as `quantize` takes it.
        format: of the weights.
        quantizes_activations: whether they become integers, too, token by token.
        is_calibrated: whether inputs get a scale of their own, chosen from observed activations.
    """

    name: str
    format: Kind
    quantizes_activations: bool = False
    is_calibrated: bool = False


METHODS = {
    method.name: method
    for method in (
        Method("nf4", "nf4"),
        Method("8bit", "int8"),
        Method("a8bit", "int8", is_calibrated=True),
        Method("a8q", "int8", quantizes_activations=True),
        Method("a4q", "int4", quantizes_activations=True),
    )
}


def method_named(name: str) -> Method:
    """Return a method.

    Raises:
        ValueError: there is no such method; the error lists those that there are.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"unknown quantization method {name!r}; choose one of {', '.join(map(repr, METHODS))}")
    return METHODS[name]


def check_group_size(group_size: int) -> int:
    """Return a group size that can be used.

    Raises:
        ValueError: it is no positive integer.
    """
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size={group_size!r}: expected a positive integer such as 64, of inputs for each scale")
    return group_size
