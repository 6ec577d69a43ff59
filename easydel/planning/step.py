"""One training step of a model of shapes: value and gradient, update, donated state; traced and compiled, never run."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from easydel.infra.functional import bind
from easydel.infra.state_arrays import optimizer_shardings
from easydel.infra.views import param_arrays
from easydel.paths import nest, split
from easydel.planning.batch import batch_shapes, objective
from easydel.sharding import fit_spec
from easydel.sharding.activations import ROLES


@dataclass(frozen=True)
class Setup:
    """What a step is made of, its depth and remat policy apart.

    Attributes:
        cls: the model's class.
        config: its config.
        mesh: to be compiled for, of simulated devices; `None` for one device.
        rules: partition rules, or `None` for the config's.
        tx: the optimizer.
        batch: shapes of the batch by name, or `None` for that of the task.
        batch_size: rows, over all devices.
        sequence_length: tokens of a row.
        dtype: of the computation.
        param_dtype: of the stored parameters.
    """

    cls: Any
    config: Any
    mesh: Any
    rules: Any
    tx: optax.GradientTransformation
    batch: Mapping[str, jax.ShapeDtypeStruct] | None
    batch_size: int
    sequence_length: int
    dtype: Any
    param_dtype: Any

    def config_with(self, **changes: Any) -> Any:
        """Return a copy of the config with some fields changed."""
        config = copy.deepcopy(self.config)
        for name, value in changes.items():
            setattr(config, name, value)
        return config


@dataclass(frozen=True)
class Arguments:
    """What a step is given: shapes with shardings, as trees."""

    params: Any
    other: Any
    opt_state: Any
    batch: Any


class Step:
    """A training step of one config.

    Args:
        setup: what it is made of.
        config: in place of the setup's: another depth, another remat policy.
    """

    def __init__(self, setup: Setup, config: Any) -> None:
        self.setup, options = setup, {"dtype": setup.dtype, "param_dtype": setup.param_dtype}
        if setup.mesh is None:
            from easydel.infra.construct import abstract_module

            self.module = abstract_module(setup.cls, config, **options)
        else:
            self.module = setup.cls.lazy_init(config, setup.mesh, setup.rules, **options)
        self.graphdef, _, other = split(self.module)
        params = nest(param_arrays(self.module))
        batch = setup.batch or batch_shapes(self.module, setup.batch_size, setup.sequence_length)
        opt_state = jax.eval_shape(setup.tx.init, params)
        if setup.mesh is not None:
            places = optimizer_shardings(opt_state, params, NamedSharding(setup.mesh, PartitionSpec()))
            opt_state = jax.tree.map(_placed, opt_state, places)
            batch = {name: _split_batch(value, setup.mesh) for name, value in batch.items()}
        self.arguments = Arguments(params, other, opt_state, dict(batch))

    def loss(self, params: Any, other: Any, batch: Any) -> jax.Array:
        """Return what the step minimises."""
        return objective(bind(self.graphdef, params, other), batch)

    def __call__(self, params: Any, other: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        """Return the new parameters and optimizer state, and the loss."""
        loss, gradients = jax.value_and_grad(self.loss)(params, other, batch)
        updates, opt_state = self.setup.tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    def trace(self) -> Any:
        """Return the step traced (`jax.stages.Traced`): state donated, and given back in the shardings it came in."""
        given = self.arguments
        out: Any = None
        if self.setup.mesh is not None:
            everywhere = NamedSharding(self.setup.mesh, PartitionSpec())
            out = (_shardings(given.params), _shardings(given.opt_state), everywhere)
        step = jax.jit(self.__call__, donate_argnums=(0, 2), **({} if out is None else {"out_shardings": out}))
        return step.trace(given.params, given.other, given.opt_state, given.batch)

    def trace_forward(self) -> Any:
        """Return the forward pass, its loss included, traced."""
        given = self.arguments
        return jax.jit(self.loss).trace(given.params, given.other, given.batch)


def bytes_per_device(tree: Any) -> int:
    """Return the bytes each device holds of a tree of shapes with shardings."""
    return sum(_part(leaf) * _itemsize(leaf) for leaf in jax.tree.leaves(tree))


def count(tree: Any) -> int:
    """Return the number of elements of a tree of shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _part(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    return math.prod(leaf.shape if sharding is None else sharding.shard_shape(leaf.shape))


def _itemsize(leaf: Any) -> int:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), leaf.dtype))
        return math.prod(data.shape) * data.dtype.itemsize
    return leaf.dtype.itemsize


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _placed(leaf: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _split_batch(value: Any, mesh: Mesh) -> Any:
    axes = [tuple(a for a in ROLES[role] if a in mesh.shape) for role in ("batch", "sequence")][: len(value.shape)]
    spec = fit_spec(PartitionSpec(*(entry or None for entry in axes)), tuple(value.shape), mesh)
    return _placed(value, NamedSharding(mesh, spec))
