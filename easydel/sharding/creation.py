"""Arrays made where they will lie: each device computes its own part, and the numbers are those of one device.

A whole initialisation compiled as one program would differ from the eager one in last bits: XLA folds constants and
fuses across operations. So it is traced once and run operation by operation, each compiled as it is eagerly, with the
result split over the devices. Equal layers share their programs, and nothing but the operation's own arrays is alive.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import JaxprEqn, Literal, jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from easydel.sharding.placement import place

# What gives each element the same bits, however many of them a device computes: exact or correctly rounded arithmetic,
# JAX's counter-based random bits, and the samplers made of them. Logarithms and their like are not among these, as
# compilers round them differently in vectors and in what is left over; nor is whatever sums.
_PER_ELEMENT = frozenset({
    "abs", "add", "and", "bitcast_convert_type", "broadcast_in_dim", "clamp", "convert_element_type", "copy", "div",
    "eq", "erf_inv", "ge", "gt", "jit", "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "random_bits",
    "select_n", "shift_left", "shift_right_logical", "sign", "sqrt", "stack", "sub", "xor",
})  # fmt: skip


def create_arrays(make: Callable[[], Sequence[jax.Array]], shardings: Sequence[Sharding | None]) -> list[jax.Array]:
    """Run `make` and put each array it returns where its sharding says, without ever having them all in one place.

    A matrix that `make` draws at random, or a stack of such, is computed in parts, by each device its own. What has at
    most one dimension, or is made by more than arithmetic on each element, is computed whole on one device and then
    spread. The numbers are those of `make()` on one device, bit by bit, whatever the shardings.

    Args:
        make: takes nothing and returns arrays; traced once. Extra work whose results it does not return is left out.
        shardings: of each array; `None`: the default device.

    Returns:
        The arrays, in order.
    """
    traced = jax.make_jaxpr(lambda: list(make()))()
    jaxpr = traced.jaxpr
    places = _places(jaxpr, shardings)
    last = _last_uses(jaxpr, places)
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, traced.consts, strict=True))
    programs: dict[Hashable, Any] = {}
    outputs: dict[Any, list[int]] = {}
    for position, var in enumerate(jaxpr.outvars):
        if not isinstance(var, Literal):
            outputs.setdefault(var, []).append(position)
    made: list[Any] = [var.val if isinstance(var, Literal) else values.get(var) for var in jaxpr.outvars]
    for position, eqn in enumerate(jaxpr.eqns):
        if not any(var in places for var in eqn.outvars):
            continue
        arguments = [var.val if isinstance(var, Literal) else values[var] for var in eqn.invars]
        results = _run(eqn, arguments, [places.get(var) for var in eqn.outvars], programs)
        del arguments
        for var, result in zip(eqn.outvars, results, strict=True):
            values[var] = result
            for output in outputs.get(var, ()):  # spread at once: many whole ones would fill the first device
                made[output] = _placed(result, shardings[output])
        del result, results
        for var in last[position]:
            del values[var]
    return [_placed(array, sharding) for array, sharding in zip(made, shardings, strict=True)]


def _placed(array: Any, sharding: Sharding | None) -> jax.Array:
    return jax.device_put(array) if sharding is None else place(array, sharding)


def _places(jaxpr: Any, shardings: Sequence[Sharding | None]) -> dict[Any, Sharding | None]:
    """Return how each variable that is needed will lie; `None`: whole, on the default device."""
    places: dict[Any, Sharding | None] = {}

    def want(var: Any, sharding: Sharding | None) -> None:
        if not isinstance(var, Literal):
            places[var] = sharding if places.get(var, sharding) == sharding else None

    for var, sharding in zip(jaxpr.outvars, shardings, strict=True):
        split = sharding is not None and not sharding.is_fully_replicated and len(var.aval.shape) > 1
        want(var, sharding if split else None)
    for eqn in reversed(jaxpr.eqns):
        needed = [var for var in eqn.outvars if var in places]
        if not needed:
            continue
        if not _is_per_element(eqn) or len(needed) != 1:
            places |= dict.fromkeys(needed)
        (place,) = {places[var] for var in needed}
        for var in eqn.invars:
            want(var, _argument_place(eqn, var, place))
    return places


def _argument_place(eqn: JaxprEqn, var: Any, place: Sharding | None) -> Sharding | None:
    """Return how an argument lies whose operation's result lies as `place` says."""
    shape, made = getattr(var.aval, "shape", ()), getattr(eqn.outvars[0].aval, "shape", None)
    if shape == made:
        return place
    if eqn.primitive.name == "stack" and isinstance(place, NamedSharding) and len(shape) > 1:
        entries, axis = [*place.spec, *[None] * (len(shape) + 1 - len(place.spec))], eqn.params["axis"]
        if entries.pop(axis) is None:
            return NamedSharding(place.mesh, PartitionSpec(*entries), memory_kind=place.memory_kind)
    return None


def _is_per_element(eqn: JaxprEqn) -> bool:
    inner = [e for jaxpr in jaxprs_in_params(eqn.params) for e in jaxpr.eqns]
    return eqn.primitive.name in _PER_ELEMENT and all(_is_per_element(e) for e in inner)


def _last_uses(jaxpr: Any, places: Mapping[Any, Any]) -> dict[int, list[Any]]:
    """Return, by an operation's position, what none that follows it takes."""
    last: dict[Any, int] = {}
    for position, eqn in enumerate(jaxpr.eqns):
        if any(var in places for var in eqn.outvars):
            last |= {var: position for var in (*eqn.invars, *eqn.outvars) if not isinstance(var, Literal)}
    found: dict[int, list[Any]] = {position: [] for position in range(len(jaxpr.eqns))}
    for var, position in last.items():
        found[position].append(var)
    return found


def _run(
    eqn: JaxprEqn, arguments: Sequence[Any], places: Sequence[Sharding | None], programs: dict[Hashable, Any]
) -> Sequence[Any]:
    """Run one operation, its result split if it has a place. Arguments are never constants of the program."""

    def bind(*values: Any) -> Any:
        with eqn.ctx.manager:
            return eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))

    if not any(places):
        results = bind(*arguments)
    else:
        # Inner programs are known by identity: equal layers have the very same, and the trace keeps them alive.
        options = tuple((k, v if isinstance(v, Hashable) else id(v)) for k, v in sorted(eqn.params.items()))
        types = tuple(str(getattr(var, "aval", None)) for var in eqn.invars)
        key = (eqn.primitive, options, types, tuple(places))
        if key not in programs:
            programs[key] = jax.jit(bind, out_shardings=list(places) if eqn.primitive.multiple_results else places[0])
        results = programs[key](*arguments)
    return list(results) if eqn.primitive.multiple_results else [results]
