"""Giving a model whose head is its embedding a head of its own, with the same numbers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from easydel.distributed import warn
from easydel.errors import ShardingError, UnsupportedError
from easydel.hub.quantized import float_variables
from easydel.hub.save import link_arrays
from easydel.hub.weight_map import build_links, tied_names
from easydel.infra import placing
from easydel.infra.construct import abstract_module
from easydel.infra.vocabulary import text_config
from easydel.lora.saved import is_inside
from easydel.paths import drop_attribute, named_modules, named_variables


@dataclass
class Untying:
    """What a model is given to be untied.

    Attributes:
        module: the model.
        built: its class with the untied config, of shapes.
        new: path → module that it lacks.
        configs: id of each config → the one in its place.
    """

    module: Any
    built: Any
    new: dict[str, nnx.Module]
    configs: dict[int, Any]

    def __post_init__(self) -> None:
        held = (getattr(layer, "config", None) for layer in named_modules(self.module, by_layer=False).values())
        self._old = {id(config): config for config in held if config is not None}

    @classmethod
    def of(cls, module: Any) -> Untying | None:
        """Work out what `tie_word_embeddings=False` adds to a model; `None` if it is not tied, or knows no such field.

        Nothing is changed, and no array is made.
        """
        if not getattr(text_config(module.config), "tie_word_embeddings", False):
            return None
        configs: dict[int, Any] = {}
        new = copy.deepcopy(module.config, configs)
        for config in (text_config(new), new):
            if hasattr(config, "tie_word_embeddings"):
                config.tie_word_embeddings = False
        try:
            built = abstract_module(type(module), new, dtype=module.dtype, param_dtype=module.param_dtype)
        except TypeError:  # no class that a config alone builds: it makes nothing of the field
            return None
        here = named_modules(module)
        added = {
            path: layer
            for path, layer in named_modules(built).items()
            if path not in here and path.rpartition("/")[0] in here
        }
        return cls(module, built, added, configs) if added else None

    def install(self) -> None:
        """Put the new modules in place, with the numbers that the tied ones have.

        Raises:
            UnsupportedError: the files of the untied model name a tensor that the tied one does not have.
        """
        arrays = self._arrays()
        for path, layer in self.new.items():
            for name, variable in named_variables(layer).items():
                variable.set_value(arrays[f"{path}/{name}"])
        self._configure(undo=False)
        modules = named_modules(self.module)
        for path, layer in self.new.items():
            parent, _, name = path.rpartition("/")
            setattr(modules[parent], name, layer)
        if self.module.is_sharded:
            self._place()

    def undo(self) -> None:
        """Tie again what `install` untied."""
        modules = named_modules(self.module)
        for path in self.new:
            parent, _, name = path.rpartition("/")
            drop_attribute(modules[parent], name)
        self._configure(undo=True)

    def tell(self) -> None:
        """Warn of what was done."""
        warn(
            f"embedding and head are untied, since an adapter is for one of them: {', '.join(self.new)} is a copy of "
            "the embedding now, and the config says tie_word_embeddings=False",
            stacklevel=4,
        )

    def _configure(self, *, undo: bool) -> None:
        pairs = {key: (self._old[key], new) for key, new in self.configs.items() if key in self._old}
        swapped = {id(new if undo else old): (old if undo else new) for old, new in pairs.values()}
        for layer in named_modules(self.module, by_layer=False).values():
            if (found := swapped.get(id(getattr(layer, "config", None)))) is not None:
                setattr(layer, "config", found)  # noqa: B010 - not every module has one

    def _arrays(self) -> dict[str, jax.Array]:
        """Return path → array of the new modules, by the names that both models' tensors have in files."""
        variables = float_variables(self.module)
        sources = {
            name: (link, place)
            for link in build_links(self.module, variables)
            for place, name in enumerate(link.sources)
        }
        aliases = tied_names(self.module)
        made: dict[str, jax.Array] = {}
        for link in build_links(self.built):
            if not any(is_inside(path, self.new) for path in link.targets):
                continue
            found = [sources.get(name) or sources.get(aliases.get(name, "")) for name in link.sources]
            if any(each is None for each in found):
                raise UnsupportedError(
                    f"untying {', '.join(link.targets)} is not supported: {', '.join(link.sources)} is no tensor of "
                    f"{type(self.module).__name__}, nor tied to one"
                )
            held = [link_arrays(each[0], variables)[each[1]] for each in found if each is not None]
            for path, array in zip(link.targets, link.transform.load(held, link.target_shapes), strict=True):
                made[path] = jnp.asarray(np.ascontiguousarray(array))
        return made

    def _place(self) -> None:
        paths = [f"{path}/{name}" for path, layer in self.new.items() for name in named_variables(layer)]
        mesh, variables = self.module.mesh, named_variables(self.module)
        try:
            found = placing.module_shardings(self.module, placing.rules_in_force(self.module), mesh)
        except ShardingError:  # it was placed by other rules
            found = {}
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        for path in paths:
            variables[path].set_value(jax.device_put(variables[path].get_value(), found.get(path, whole)))
