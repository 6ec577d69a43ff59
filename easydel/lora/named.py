"""Several adapters by name: layers carry the active one, the others lie on a shelf beside the model.

The shelf belongs to the model object. Nothing of it is part of the model's structure, so that to exchange equally
shaped adapters is to set arrays, and programs compiled for one serve all. Copies of a model (`merge_module`, a state's
model) carry the active adapter only.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from flax import nnx

from easydel.lora.adapters import Arrays, adapted_layers, install, new_arrays, placed, remove
from easydel.lora.choose import Planned
from easydel.lora.config import LoraConfig
from easydel.lora.layer import AdapterSpec, is_adapted
from easydel.lora.saved import check_saved, chosen_variables, exchange, like, mark, saved_variables, unmark, values
from easydel.paths import named_modules, named_variables, nearest
from easydel.stacked import layer_paths

DEFAULT = "default"


@dataclass(frozen=True)
class Adapter:
    """An adapter of a whole model, apart from the model.

    Attributes:
        specs: path of each layer, as it is stored → what its adapter is like.
        arrays: path → its arrays.
        config: that it was made from; `None`: it was made otherwise.
        saved: path → array of the parameters that are trained whole with it, as they are stored.
    """

    specs: dict[str, AdapterSpec]
    arrays: Mapping[str, Arrays]
    config: LoraConfig | None = None
    saved: Mapping[str, jax.Array] = field(default_factory=dict)


@dataclass
class _Shelf:
    active: str = DEFAULT
    config: LoraConfig | None = None
    others: dict[str, Adapter] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)  # those that carry the active one, when last looked for
    saved: dict[str, nnx.Variable] = field(default_factory=dict)  # what is trained whole with the active one,
    base: dict[str, jax.Array] = field(default_factory=dict)  # and what that is without it


_SHELVES: weakref.WeakKeyDictionary[nnx.Module, _Shelf] = weakref.WeakKeyDictionary()


def adapter_names(module: nnx.Module) -> list[str]:
    """Return the names of a module's adapters, the active one first."""
    if not _layers(module):
        return []
    shelf = _shelf(module)
    return [shelf.active, *shelf.others]


def active_adapter(module: nnx.Module) -> str | None:
    """Return the name of the adapter that the layers carry; `None` if they carry none."""
    return next(iter(adapter_names(module)), None)


def get_adapter(module: nnx.Module, name: str | None = None) -> Adapter:
    """Return an adapter, the active one if no name is given; its arrays are the module's own.

    Raises:
        ValueError: there is none of this name.
    """
    name = _known(module, active_adapter(module) if name is None else name)
    shelf = _shelf(module)
    return _carried(_layers(module), shelf) if name == shelf.active else shelf.others[name]


def put_adapter(
    module: nnx.Module,
    name: str,
    plan: Sequence[Planned],
    key: jax.Array,
    arrays: Mapping[str, Arrays] | None = None,
    config: LoraConfig | None = None,
    saved: Mapping[str, jax.Array] | None = None,
) -> None:
    """Give a module another adapter: its first one is active at once, later ones lie on the shelf.

    Args:
        module: the whole.
        name: of the adapter.
        plan: the layers and what their adapters are like, from `easydel.lora.choose.planned`.
        key: of initial numbers and dropout.
        arrays: path of each layer, as it is stored → arrays; `None`: new ones, which change nothing yet.
        config: that the plan was made from.
        saved: stored path → array of the parameters that the config's `modules_to_save` has trained whole, where they
            begin otherwise than those of the module.

    Raises:
        ValueError: there is an adapter of this name, the adapters are merged, or arrays of other shapes.
    """
    carried = _layers(module)
    check_usable(carried, "another adapter")
    check_new(module, name)
    fresh = new_arrays(plan, key)
    if arrays is not None:
        _check_arrays(arrays, fresh)
        fresh = {path: dict(given) for path, given in arrays.items()}
    specs = {planned.chosen.path: planned.spec for planned in plan}
    variables = chosen_variables(module, config.modules_to_save if config is not None else ())
    new = dict(saved or {})
    check_saved(new, variables)
    if carried:
        own = _shelf(module).base
        begin = {path: own.get(path, variable.get_value()) for path, variable in variables.items()}
        shelve(module, name, Adapter(specs, dict(fresh), config, begin | new))
        return
    install({planned.chosen.path: planned.chosen.layer for planned in plan}, fresh, specs, key)
    _SHELVES[module] = _Shelf(name, config, saved=variables, base=mark(variables, new))


def shelve(module: nnx.Module, name: str, adapter: Adapter) -> None:
    """Put an adapter on the shelf of a module that has others.

    Raises:
        ValueError: there is an adapter of this name.
    """
    check_new(module, name)
    layers = _layers_at(module, adapter.specs)
    arrays = {path: _all_placed(layers[path], path, values) for path, values in adapter.arrays.items()}
    _shelf(module).others[name] = replace(adapter, arrays=arrays)


def set_adapter(module: nnx.Module, name: str) -> None:
    """Exchange the active adapter; see `EasyDeLBaseModule.set_adapter`."""
    _known(module, name)
    layers = _layers(module)
    check_usable(layers, "set_adapter")
    shelf = _shelf(module)
    if name == shelf.active:
        return
    new, old = shelf.others[name], _carried(layers, shelf)
    _exchange_saved(module, shelf, new)
    if new.specs == old.specs:  # nothing is compiled anew
        for path, arrays in new.arrays.items():
            for key, variable in layers[path].lora.variables().items():
                held, array = old.arrays[path][key], arrays[key]
                if array.sharding != held.sharding or array.dtype != held.dtype:  # the model was moved, or cast
                    array = like(held, array)
                variable.set_value(array)
    else:
        remove(module)
        install(_layers_at(module, new.arrays), new.arrays, new.specs, jax.random.key(0))
        shelf.layers = {}  # others carry it now
    del shelf.others[name]
    shelf.others[shelf.active] = old
    shelf.active, shelf.config = name, new.config


def delete_adapter(module: nnx.Module, name: str) -> None:
    """Forget an adapter; see `EasyDeLBaseModule.delete_adapter`."""
    _known(module, name)
    shelf = _shelf(module)
    if name != shelf.active:
        del shelf.others[name]
        return
    check_usable(adapted_layers(module), "delete_adapter")
    if shelf.others:
        raise ValueError(
            f"{name!r} is the active adapter; set_adapter() to another one ({', '.join(shelf.others)}) before "
            "deleting it"
        )
    _check_base_known(shelf, "delete_adapter")
    unmark(shelf.saved, shelf.base)
    remove(module)
    _SHELVES.pop(module, None)


def forget_all(module: nnx.Module) -> None:
    """Empty a module's shelf, and leave modules that were trained whole as they are now."""
    unmark(saved_variables(module), None)
    _SHELVES.pop(module, None)


@contextlib.contextmanager
def disabled(module: nnx.Module) -> Iterator[None]:
    """Leave the adapters out in a block; see `EasyDeLBaseModule.disable_adapters`."""
    layers = adapted_layers(module)
    if not layers:
        raise ValueError("disable_adapters: the model has no adapters")
    check_usable(layers, "disable_adapters")
    adapters, shelf = [layer.lora for layer in layers.values()], _shelf(module)
    _check_base_known(shelf, "disable_adapters")
    learned = exchange(shelf.saved, shelf.base)
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True
        exchange(shelf.saved, learned)


def check_usable(layers: Mapping[str, Any], what: str) -> None:
    """Raise `ValueError` if adapters are folded into the weights, or disabled."""
    if any(layer.lora.merged for layer in layers.values()):
        raise ValueError(f"{what}: the adapters are merged into the weights; call unmerge_adapter() first")
    if not all(layer.lora.enabled for layer in layers.values()):
        raise ValueError(f"{what}: the adapters are disabled; leave disable_adapters() first")


def _shelf(module: nnx.Module) -> _Shelf:
    if module not in _SHELVES:
        _SHELVES[module] = _Shelf(saved=saved_variables(module))
    return _SHELVES[module]


def _known(module: nnx.Module, name: Any) -> str:
    names = adapter_names(module)
    if name not in names:
        near = nearest(str(name), names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"the model has no adapter {name!r}, but {', '.join(map(repr, names)) or 'none at all'}{hint}")
    return name


def _carried(layers: Mapping[str, Any], shelf: _Shelf) -> Adapter:
    """Return the adapter that layers carry."""
    arrays = {path: {n: v.get_value() for n, v in layer.lora.variables().items()} for path, layer in layers.items()}
    owners: dict[int, list[str]] = {}
    for path, layer in layers.items():
        owners.setdefault(id(layer.lora.a), []).append(path)
    shared = {path: paths[0] for paths in owners.values() if len(paths) > 1 for path in paths}
    specs = {path: replace(layer.lora.spec, shares=shared.get(path)) for path, layer in layers.items()}
    return Adapter(specs, arrays, shelf.config, values(shelf.saved))


def _exchange_saved(module: nnx.Module, shelf: _Shelf, new: Adapter) -> None:
    """Put the modules that another adapter trains whole in place of those of the active one."""
    _check_base_known(shelf, "set_adapter")
    if shelf.saved.keys() == new.saved.keys():  # the structure stays
        exchange(shelf.saved, new.saved)
        return
    unmark(shelf.saved, shelf.base)
    variables = named_variables(module, nnx.Param, by_layer=False)
    shelf.saved = {path: variables[path] for path in new.saved}
    shelf.base = mark(shelf.saved, new.saved)


def _check_base_known(shelf: _Shelf, what: str) -> None:
    if lost := sorted(shelf.saved.keys() - shelf.base.keys()):
        raise ValueError(
            f"{what}: what {lost[0]} is without the adapter is not known here: only the very model that was given the "
            "adapter keeps it, no copy of it and no state's model"
        )


def check_new(module: nnx.Module, name: Any) -> None:
    """Raise `ValueError` if a module cannot have an adapter of this name, or has one."""
    if not isinstance(name, str) or not name or "/" in name:
        raise ValueError(f"adapter_name={name!r}: expected a name without '/'")
    if name in adapter_names(module):
        raise ValueError(
            f"there is an adapter {name!r} already; choose another name, or delete_adapter({name!r}) first"
        )


def _layers(module: nnx.Module) -> dict[str, Any]:
    """Return `adapted_layers`, those that are known without another walk over the module."""
    shelf = _SHELVES.get(module)
    if shelf is None:
        return adapted_layers(module)
    if not shelf.layers or not all(
        is_adapted(layer) and _is_at(module, path, layer) for path, layer in shelf.layers.items()
    ):
        shelf.layers = adapted_layers(module)
    return shelf.layers


def _is_at(module: Any, path: str, layer: Any) -> bool:
    node = module
    for name in path.split("/"):
        if node is None:
            return False
        node = node[int(name)] if name.isdigit() else getattr(node, name, None)
    return node is layer


def _all_placed(layer: Any, path: str, arrays: Arrays) -> Arrays:
    is_stack = layer_paths(path) is not None
    return {name: placed(layer, name, array, is_stack) for name, array in arrays.items()}


def _layers_at(module: nnx.Module, paths: Mapping[str, Any]) -> dict[str, Any]:
    modules = named_modules(module, by_layer=False)
    return {path: modules[path] for path in paths}


def _check_arrays(arrays: Mapping[str, Arrays], like: Mapping[str, Arrays]) -> None:
    problems = [f"{path}: no such adapted layer" for path in arrays.keys() - like.keys()]
    problems += [f"{path}: missing" for path in like.keys() - arrays.keys()]
    for path in arrays.keys() & like.keys():
        got, wanted = ({n: tuple(np.shape(x)) for n, x in each[path].items()} for each in (arrays, like))
        if got != wanted:
            problems.append(f"{path}: expected {wanted}, got {got}")
    if problems:
        raise ValueError("these adapters do not fit the model:\n  " + "\n  ".join(sorted(problems)))
