"""Several adapters by name: layers carry the active one, the others lie on a shelf beside the model.

The shelf belongs to the model object. Nothing of it is part of the model's structure, so that to exchange equally
shaped adapters is to set arrays, and programs compiled for one serve all. Copies of a model (`merge_module`, a state's
model) carry the active adapter only.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx

from easydel.lora.adapters import Arrays, adapted_layers, install, new_arrays, placed, remove
from easydel.lora.choose import Planned
from easydel.lora.config import LoraConfig
from easydel.lora.layer import AdapterSpec, is_adapted
from easydel.paths import named_modules, nearest
from easydel.stacked import layer_paths

DEFAULT = "default"


@dataclass(frozen=True)
class Adapter:
    """An adapter of a whole model, apart from the model.

    Attributes:
        specs: path of each layer, as it is stored → what its adapter is like.
        arrays: path → its arrays.
        config: that it was made from; `None`: it was made otherwise.
    """

    specs: dict[str, AdapterSpec]
    arrays: Mapping[str, Arrays]
    config: LoraConfig | None = None


@dataclass
class _Shelf:
    active: str = DEFAULT
    config: LoraConfig | None = None
    others: dict[str, Adapter] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)  # those that carry the active one, when last looked for


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
    return _carried(_layers(module), shelf.config) if name == shelf.active else shelf.others[name]


def put_adapter(
    module: nnx.Module,
    name: str,
    plan: Sequence[Planned],
    key: jax.Array,
    arrays: Mapping[str, Arrays] | None = None,
    config: LoraConfig | None = None,
) -> None:
    """Give a module another adapter: its first one is active at once, later ones lie on the shelf.

    Args:
        module: the whole.
        name: of the adapter.
        plan: the layers and what their adapters are like, from `easydel.lora.choose.planned`.
        key: of initial numbers and dropout.
        arrays: path of each layer, as it is stored → arrays; `None`: new ones, which change nothing yet.
        config: that the plan was made from.

    Raises:
        ValueError: there is an adapter of this name, the adapters are merged, or arrays of other shapes.
    """
    carried = _layers(module)
    check_usable(carried, "another adapter")
    _check_new(module, name)
    fresh = new_arrays(plan, key)
    if arrays is not None:
        _check_arrays(arrays, fresh)
        fresh = {path: dict(values) for path, values in arrays.items()}
    specs = {planned.chosen.path: planned.spec for planned in plan}
    if carried:
        shelve(module, name, Adapter(specs, dict(fresh), config))
        return
    install({planned.chosen.path: planned.chosen.layer for planned in plan}, fresh, specs, key)
    _SHELVES[module] = _Shelf(name, config)


def shelve(module: nnx.Module, name: str, adapter: Adapter) -> None:
    """Put an adapter on the shelf of a module that has others.

    Raises:
        ValueError: there is an adapter of this name.
    """
    _check_new(module, name)
    layers = _layers_at(module, adapter.specs)
    arrays = {path: _all_placed(layers[path], path, values) for path, values in adapter.arrays.items()}
    _shelf(module).others[name] = Adapter(adapter.specs, arrays, adapter.config)


def set_adapter(module: nnx.Module, name: str) -> None:
    """Exchange the active adapter; see `EasyDeLBaseModule.set_adapter`."""
    _known(module, name)
    layers = _layers(module)
    check_usable(layers, "set_adapter")
    shelf = _shelf(module)
    if name == shelf.active:
        return
    new, old = shelf.others[name], _carried(layers, shelf.config)
    if new.specs == old.specs:  # nothing is compiled anew
        for path, arrays in new.arrays.items():
            for key, variable in layers[path].lora.variables().items():
                held, array = old.arrays[path][key], arrays[key]
                if array.sharding != held.sharding or array.dtype != held.dtype:  # the model was moved, or cast
                    array = jax.device_put(array.astype(held.dtype), held.sharding)
                variable.set_value(array)
    else:
        remove(module)
        install(_layers_at(module, new.arrays), new.arrays, new.specs, jax.random.key(0))
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
    remove(module)
    _SHELVES.pop(module, None)


def forget_all(module: nnx.Module) -> None:
    """Empty a module's shelf."""
    _SHELVES.pop(module, None)


@contextlib.contextmanager
def disabled(module: nnx.Module) -> Iterator[None]:
    """Leave the adapters out in a block; see `EasyDeLBaseModule.disable_adapters`."""
    layers = adapted_layers(module)
    if not layers:
        raise ValueError("disable_adapters: the model has no adapters")
    check_usable(layers, "disable_adapters")
    adapters = [layer.lora for layer in layers.values()]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True


def check_usable(layers: Mapping[str, Any], what: str) -> None:
    """Raise `ValueError` if adapters are folded into the weights, or disabled."""
    if any(layer.lora.merged for layer in layers.values()):
        raise ValueError(f"{what}: the adapters are merged into the weights; call unmerge_adapter() first")
    if not all(layer.lora.enabled for layer in layers.values()):
        raise ValueError(f"{what}: the adapters are disabled; leave disable_adapters() first")


def _shelf(module: nnx.Module) -> _Shelf:
    return _SHELVES.setdefault(module, _Shelf())


def _known(module: nnx.Module, name: Any) -> str:
    names = adapter_names(module)
    if name not in names:
        near = nearest(str(name), names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"the model has no adapter {name!r}, but {', '.join(map(repr, names)) or 'none at all'}{hint}")
    return name


def _carried(layers: Mapping[str, Any], config: LoraConfig | None) -> Adapter:
    """Return the adapter that layers carry."""
    arrays = {path: {n: v.get_value() for n, v in layer.lora.variables().items()} for path, layer in layers.items()}
    return Adapter({path: layer.lora.spec for path, layer in layers.items()}, arrays, config)


def _check_new(module: nnx.Module, name: Any) -> None:
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
