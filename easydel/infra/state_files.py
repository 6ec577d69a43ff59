"""A training state in a directory, and back onto any mesh."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from easydel.checkpoints import load_arrays, save_arrays
from easydel.checkpoints.arrays import read_metadata
from easydel.errors import CheckpointError, UnsupportedError
from easydel.infra import adapting
from easydel.infra.construct import abstract_module, config_class_of
from easydel.infra.registry import get_module_class
from easydel.infra.state_arrays import everywhere, named_arrays, optimizer_shardings, with_arrays
from easydel.infra.state_base import check_base, describe_base
from easydel.infra.trainable import choose
from easydel.infra.views import param_arrays
from easydel.lora import DEFAULT, LoraConfig
from easydel.paths import nest, split

KIND = "easydel training state"


def describe(state: Any) -> dict[str, Any]:
    """Return what has to be known, besides the arrays, to make a state anew; `json` can write it."""
    model = state.model
    return {
        "kind": KIND,
        "class": type(model).__name__,
        "model_type": model.model_type,
        "model_task": model.model_task,
        "dtype": str(model.dtype),
        "param_dtype": str(model.param_dtype),
        "config": model.config.to_dict(),
        "runtime_settings": model.config.runtime_settings(),
        "frozen": sorted(state.frozen),
        **describe_base(state),
    }


def save(state: Any, directory: str | Path, *, overwrite: bool) -> None:
    """Write a state; see `EasyDeLState.save_state`."""
    if state.model.is_quantized and not state.model.lora_is_enabled:
        raise UnsupportedError(
            "save_state is not supported for a quantized model without adapters, whose layers a class does not "
            "build from its config: write the model with save_pretrained, or dequantize it before training"
        )
    save_arrays(directory, named_arrays(state), describe(state), overwrite=overwrite)


def load(
    cls: Any, directory: str | Path, tx: optax.GradientTransformation, *, model_class: Any, mesh: Any, rules: Any
) -> Any:
    """Read a state; see `EasyDeLState.load_state`."""
    about = _read_about(directory)
    if about.get("lora"):
        raise CheckpointError(
            f"{directory}: holds adapters and not their base: give the model that they were trained on, as "
            "load_state(…, model=base)"
        )
    if model_class is None:
        model_class = get_module_class(about["model_task"], about["model_type"])
    if model_class.__name__ != about["class"]:
        raise CheckpointError(f"{directory}: is the state of a {about['class']}, not of a {model_class.__name__}")
    config = config_class_of(model_class).from_dict(about["config"] | about["runtime_settings"])
    template = abstract_state(cls, config, tx, about, model_class, mesh, rules)
    arrays, _ = load_arrays(directory, named_arrays(template))
    return replace(template, **with_arrays(template, arrays))


def load_adapters(cls: Any, directory: str | Path, tx: optax.GradientTransformation, model: Any) -> Any:
    """Read a state of adapters onto their base; see `EasyDeLState.load_state`."""
    about = _read_about(directory)
    if not about.get("lora"):
        raise CheckpointError(f"{directory}: holds a whole model, no adapters: leave model= out")
    if type(model).__name__ != about["class"]:
        raise CheckpointError(f"{directory}: holds adapters of a {about['class']}, not of a {type(model).__name__}")
    adapted = nnx.clone(model)  # the arrays are shared
    if not adapted.lora_is_enabled:
        adapting.add(adapted, DEFAULT, LoraConfig.from_dict(about["lora"]))
    graphdef, _, other = split(adapted)
    params = nest(param_arrays(adapted))
    place = everywhere(params) or SingleDeviceSharding(next(iter(jax.tree.leaves(params)[0].devices())))
    parts = {"params": params, "other": other, "graphdef": graphdef, "frozen": frozenset(about["frozen"])}
    template = _before_reading(cls, tx, place, **parts)
    check_base(about, describe_base(template), directory)
    arrays, _ = load_arrays(directory, named_arrays(template))
    return replace(template, **with_arrays(template, arrays))


def _read_about(directory: str | Path) -> dict[str, Any]:
    about = read_metadata(directory)
    if about.get("kind") != KIND:
        raise CheckpointError(f"{directory}: holds no training state (written by save_state)")
    return about


def abstract_state(cls: Any, config: Any, tx: Any, about: Any, model_class: Any, mesh: Any, rules: Any) -> Any:
    """Return a state of shapes and shardings only."""
    dtypes = {"dtype": about["dtype"], "param_dtype": about["param_dtype"]}
    if mesh is None:
        place: Any = SingleDeviceSharding(jax.local_devices()[0])
        model = abstract_module(model_class, config, **dtypes)
    else:
        model = model_class.lazy_init(config, mesh, rules, **dtypes)
        place = NamedSharding(model.mesh, PartitionSpec())

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or place)

    graphdef, _, other = split(model)
    params, other = jax.tree.map(placed, (nest(param_arrays(model)), other))
    parts = {"params": params, "other": other, "graphdef": graphdef, "frozen": frozenset(about["frozen"])}
    return _before_reading(cls, tx, place, **parts)


def _before_reading(
    cls: Any, tx: optax.GradientTransformation, place: Any, *, params: Any, frozen: frozenset[str], **parts: Any
) -> Any:
    """Return a state of these parts whose count and optimizer state are shapes, laid out as the parameters are.

    Args:
        cls: of the state.
        tx: the optimizer.
        place: of what does not follow a parameter.
        params: arrays or shapes, with shardings.
        frozen: paths of those that are not trained.
        **parts: the state's other fields.
    """
    trained = choose(params, frozen, inside=False)
    shapes = jax.eval_shape(tx.init, trained)
    opt_state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        optimizer_shardings(shapes, trained, place),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=place)
    return cls(step=step, params=params, opt_state=opt_state, tx=tx, frozen=frozen, **parts)
