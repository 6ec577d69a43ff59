"""What in a model depends on the size of its vocabulary.

It is not guessed from sizes or names: the class is built abstractly for two sizes, and whatever differs (tables,
heads, biases, attributes such as `num_embeddings`) depends on it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from easydel.infra.construct import abstract_module
from easydel.paths import named_modules, named_variables


@dataclass(frozen=True)
class Configs:
    """A config with another vocabulary size: a copy, since other models and states may hold the old one.

    Attributes:
        new: the copy.
        copies: id of each config in the old one → its copy.
    """

    new: Any
    copies: Mapping[int, Any]


@dataclass(frozen=True)
class Differences:
    """What a model's class builds differently for another vocabulary size.

    Attributes:
        axes: path of a variable → its axis that has another length.
        before: path → its shape for the present size.
        after: path → its shape for the other size.
        attributes: `(path of a module, name)` → the attribute's values for both sizes.
        built: paths of all variables.
    """

    axes: dict[str, int]
    before: dict[str, tuple[int, ...]]
    after: dict[str, tuple[int, ...]]
    attributes: dict[tuple[str, str], tuple[Any, Any]]
    built: frozenset[str]


def vocabulary_size(config: Any) -> int:
    """Return the number of tokens in a config's vocabulary.

    Raises:
        ValueError: the config has no `vocab_size`.
    """
    size = getattr(text_config(config), "vocab_size", None)
    if not isinstance(size, int):
        raise ValueError(f"{type(config).__name__} has no vocab_size (an int), got {size!r}: there is no vocabulary")
    return size


def text_config(config: Any) -> Any:
    """Return the config that holds the vocabulary: a nested one in models of several modalities."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def changed_configs(config: Any, size: int) -> Configs:
    """Return a copy of a config with another vocabulary size, in it and in the nested config that holds it."""
    copies: dict[int, Any] = {}
    old, new = vocabulary_size(config), copy.deepcopy(config, copies)
    for part in (text_config(new), new):
        if getattr(part, "vocab_size", None) == old:
            part.vocab_size = size
    return Configs(new, copies)


def differences(module: Any, configs: Configs) -> Differences:
    """Build the module's class abstractly with its own config and with a changed one, and compare.

    Raises:
        ValueError: the two have other variables, or one changes along several axes.
        TypeError: the class cannot be built from a config.
    """
    # Only contents make a safe key: another kind of config may be equal to itself whatever was changed in it.
    module_class: Any = type(module)
    compare = _compare if hasattr(module.config, "content") else _compare.__wrapped__
    return compare(module_class, module.config, configs.new)


@functools.lru_cache(maxsize=32)
def _compare(module_class: Any, present: Any, other: Any) -> Differences:
    pair = [abstract_module(module_class, config) for config in (present, other)]
    before, after = ({p: tuple(v.shape) for p, v in named_variables(m).items()} for m in pair)
    axes = {}
    for path in sorted(before.keys() | after.keys()):
        old, new = before.get(path), after.get(path)
        if old == new:
            continue
        found = [n for n, (a, b) in enumerate(zip(old or (), new or (), strict=False)) if a != b]
        if old is None or new is None or len(old) != len(new) or len(found) != 1:
            raise ValueError(
                f"{module_class.__name__} builds {path} as {old} for one vocab_size and as {new} for another: only one "
                "axis may change with the vocabulary"
            )
        axes[path] = found[0]
    return Differences(axes, before, after, _changed_attributes(*map(named_modules, pair)), frozenset(before))


_PLAIN = (bool, int, float, str, tuple, type(None))


def _changed_attributes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[tuple[str, str], tuple[Any, Any]]:
    """Return the plain static attributes that differ; what else a module holds is compared as variables."""
    return {
        (path, name): (vars(before[path]).get(name), value)
        for path in before.keys() & after.keys()
        for name, value in vars(after[path]).items()
        if isinstance(value, _PLAIN) and type(vars(before[path]).get(name)) is type(value)
        if vars(before[path])[name] != value and name != "_config_content"  # the base class's own note of the config
    }
