"""The parameters of adapters and of their base as two trees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

from easydel.lora.adapters import adapted_layers
from easydel.lora.saved import is_saved
from easydel.paths import flatten, named_variables, nest
from easydel.stacked import kind_of


def is_lora(variable: nnx.Variable) -> bool:
    """Whether a variable is a parameter of an adapter, or of a module that is trained whole with it."""
    return isinstance(variable, nnx.LoRAParam) or is_saved(variable)


def lora_paths(module: nnx.Module) -> frozenset[str]:
    """Return the paths of the adapters' parameters, as they are stored."""
    return frozenset(named_variables(module, nnx.LoRAParam, by_layer=False))


def learned_paths(module: nnx.Module) -> frozenset[str]:
    """Return the paths of all that is trained with adapters, as it is stored: theirs, and of `modules_to_save`."""
    found = named_variables(module, nnx.Param, by_layer=False)
    return frozenset(path for path, variable in found.items() if is_lora(variable))


def split(module: nnx.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `(base, adapters)` as nested dicts of arrays; see `EasyDeLBaseModule.split_lora_params`."""
    found = named_variables(module, nnx.Param, by_layer=False)
    if not any(map(is_lora, found.values())):
        raise ValueError("the model has no adapters to split off; apply_lora_to_layers() gives it some")
    sides = (
        {path: variable.get_value() for path, variable in found.items() if is_lora(variable) is wanted}
        for wanted in (False, True)
    )
    base, adapters = map(nest, sides)
    return base, adapters


def check_lora_tree(module: nnx.Module, tree: Mapping[Any, Any] | nnx.State) -> None:
    """Check that a tree holds nothing of a module's base.

    Raises:
        ValueError: it does, or the module has no adapters.
    """
    if not lora_paths(module):
        raise ValueError("the model has no adapters to put these into; apply_lora_to_layers() gives it some")
    own = {
        path
        for path, variable in named_variables(module, nnx.Param).items()
        if not issubclass(kind_of(variable), nnx.LoRAParam) and not is_saved(variable)
    }
    own |= {
        path for path, variable in named_variables(module, nnx.Param, by_layer=False).items() if not is_lora(variable)
    }
    if foreign := sorted(own & flatten(tree, by_layer=False).keys()):
        raise ValueError(
            f"merge_lora_params takes the parameters of adapters only, got {', '.join(foreign[:3])} of the base "
            f"({len(foreign)} in all); merge_params_dict takes any"
        )


def refuse_adapters(module: nnx.Module, what: str, instead: str) -> None:
    """Raise `ValueError` if a module has adapters."""
    if paths := lora_paths(module):
        raise ValueError(f"{what}: the model has adapters ({next(iter(sorted(paths)))} and others); {instead}")


def refuse_unfolded(module: nnx.Module, what: str) -> None:
    """Raise `ValueError` if a module has adapters that its weights do not hold."""
    loose = [path for path, layer in adapted_layers(module).items() if not layer.lora.merged]
    if loose:
        raise ValueError(
            f"{what}: the model has adapters that are not in its weights ({loose[0]} and others), and its files would "
            "lack them: save_adapter() writes the adapter alone, merge_and_unload() or merge_adapter() folds it in"
        )
