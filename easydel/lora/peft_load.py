"""A PEFT adapter's tensors as arrays of a model's layers, and the config that installs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from easydel.distributed import warn
from easydel.errors import CheckpointError
from easydel.hub.quantized import float_variables
from easydel.hub.save import link_arrays
from easydel.lora.config import LoraConfig
from easydel.lora.describe import config_of
from easydel.lora.peft_files import AdapterFiles
from easydel.lora.peft_match import AdapterMatch, Names, match_adapter
from easydel.lora.peft_tensors import from_tensors
from easydel.paths import named_modules, named_variables
from easydel.stacked import layer_paths

Arrays = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter that fits a model.

    Attributes:
        config: that makes adapters of its layers.
        arrays: stored path of each layer → its arrays.
        saved: stored path → array of the parameters that are trained whole with it.
    """

    config: LoraConfig
    arrays: Arrays
    saved: dict[str, np.ndarray]


def load_adapter(files: AdapterFiles, module: Any, names: Names) -> LoadedAdapter:
    """Read an adapter for a model; the model is not changed.

    Args:
        files: of the adapter.
        module: the model.
        names: what it is called in transformers, untied as far as the adapter needs that.

    Raises:
        CheckpointError: config, tensors and model do not fit; all that is wrong is listed.
    """
    match = match_adapter(files, names)
    _check_base(files, match, module)
    config = files.config
    layers: Arrays = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for layer, entries in match.adapted:
        name = match.spelled[layer.name]
        tensors = {end: entry.read() for end, entry in entries.items()}
        for path, arrays in from_tensors(layer, tensors).items():
            layers[path] = arrays
            ranks[path], alphas[path] = config.rank_of(name), config.alpha_of(name)
    made = config_of(
        ranks,
        alphas,
        saved=[path for link in match.saved for path in link.targets],
        dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        embeddings=any(layer.is_embedding for layer, _ in match.adapted),
        fused=any(len(layer.paths) > 1 for layer, _ in match.adapted),
    )
    for path, arrays in layers.items():
        arrays["scale"] = np.asarray(made.scale_of(path), np.float32)
    saved: dict[str, np.ndarray] = {}
    for link in match.saved:
        held = [match.table[name].read() for name in link.sources]
        loaded = link.transform.load(held, link.target_shapes)
        saved |= {path: np.ascontiguousarray(array) for path, array in zip(link.targets, loaded, strict=True)}
    stacks = _stacks(module)
    return LoadedAdapter(made, _stacked(layers, stacks), _stacked_arrays(saved, stacks))


def _stacks(module: nnx.Module) -> dict[str, tuple[str, int]]:
    """Return path of a layer, or of its parameter → stored path and place, of what is stored stacked."""
    stored = [*named_modules(module, by_layer=False), *named_variables(module, by_layer=False)]
    return {path: (name, place) for name in stored for place, path in enumerate(layer_paths(name) or ())}


def _stacked(layers: Arrays, stacks: Mapping[str, tuple[str, int]]) -> Arrays:
    """Return arrays of layers under the paths that they are stored under."""
    found: Arrays = {}
    for name in dict.fromkeys(name for arrays in layers.values() for name in arrays):
        held = {path: arrays[name] for path, arrays in layers.items() if name in arrays}
        for path, array in _stacked_arrays(held, stacks).items():
            found.setdefault(path, {})[name] = array
    return found


def _stacked_arrays(arrays: Mapping[str, np.ndarray], stacks: Mapping[str, tuple[str, int]]) -> dict[str, np.ndarray]:
    """Return arrays by stored path. Of a stack of which some layers lack, what is there: the plan refuses it."""
    found = {path: array for path, array in arrays.items() if path not in stacks}
    parts: dict[str, dict[int, np.ndarray]] = {}
    for path, array in arrays.items():
        if path in stacks:
            name, place = stacks[path]
            parts.setdefault(name, {})[place] = array
    for name, held in parts.items():
        shapes = {array.shape for array in held.values()}
        # Of several ranks nothing can be stacked; the plan says so.
        found[name] = (
            np.stack([held[place] for place in sorted(held)]) if len(shapes) == 1 else next(iter(held.values()))
        )
    return found


def _check_base(files: AdapterFiles, match: AdapterMatch, module: Any) -> None:
    """Compare tensors of the base that the file holds, too, with the model's.

    PEFT writes the base's embedding beside an adapter of it.

    Raises:
        CheckpointError: the model has other numbers there.
    """
    if not match.base:
        return
    variables = float_variables(module)
    for name, (entry, link) in match.base.items():
        own = link_arrays(link, variables)[link.sources.index(name)]
        if not np.array_equal(np.asarray(entry.read()).astype(own.dtype), own):
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name!r} is of the base, and this model has other numbers there: the "
                "adapter was trained on another base, or on a changed one; load its numbers into the model first"
            )


def warn_of_base(files: AdapterFiles, name: str | None, revision: str | None) -> None:
    """Warn if an adapter says that it was trained on another model than this one.

    Args:
        files: of the adapter.
        name: directory or Hub id of this one, if it is known.
        revision: of it, on the Hub.
    """
    theirs, asked = files.config.base_model_name_or_path, files.config.revision
    if not theirs or not name:
        return
    same = theirs.rstrip("/").rpartition("/")[2] == name.rstrip("/").rpartition("/")[2]
    if not same:
        warn(
            f"{files.directory}: the adapter was trained on {theirs!r}, and this model was loaded from {name!r}; the "
            "shapes fit, but do the weights?",
            stacklevel=5,
        )
    elif asked and revision and len(asked) == len(revision) == 40 and asked != revision:
        warn(
            f"{files.directory}: the adapter was trained on revision {asked} of {theirs!r}, this model is of "
            f"{revision}",
            stacklevel=5,
        )
