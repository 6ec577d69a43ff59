"""`EasyDeLState`: parameters, optimizer state and step of a training run, as one immutable pytree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from easydel.calls import refuse_shapes
from easydel.infra import state_files
from easydel.infra.functional import bind
from easydel.infra.state_arrays import everywhere, init_optimizer, move_state
from easydel.infra.trainable import Patterns, TrainableSummary, choose, frozen_with_adapters, summarize
from easydel.infra.views import param_arrays
from easydel.lora import adapted_layers, learned_paths
from easydel.lora.named import check_usable
from easydel.paths import flatten, nest, split
from easydel.sharding import PartitionRules

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EasyDeLState:
    """A training state; a pytree that can be passed through `jax.jit`.

    Attributes:
        step: int32 `[]`, the number of updates applied.
        params: nested dict of all parameters, as in `model.params`.
        other: the model's non-parameter state.
        opt_state: the optimizer's state, of the parameters that are trained; what belongs to one is sharded like it.
        tx: the optimizer (static).
        graphdef: the model's definition (static).
        frozen: paths of the parameters that are not trained, as they are stored (static).
    """

    step: jax.Array
    params: dict[str, Any]
    other: nnx.State
    opt_state: Any
    tx: optax.GradientTransformation = field(metadata=_STATIC)
    graphdef: Any = field(metadata=_STATIC)
    frozen: frozenset[str] = field(default=frozenset(), metadata=_STATIC)

    @classmethod
    def create(
        cls,
        model: nnx.Module,
        tx: optax.GradientTransformation,
        *,
        trainable: Patterns = None,
        frozen: Patterns = None,
    ) -> Self:
        """Make a state at step 0 from a model and an optimizer. The arrays are shared with the model, not copied.

        Args:
            model: what is trained.
            tx: an optax optimizer; it sees the trained parameters only.
            trainable: regular expressions on parameter paths; what none is found in is frozen. `None`: all, of a model
                with adapters those.
            frozen: regular expressions on parameter paths; what one is found in is frozen. Give one of the two.

        Raises:
            TypeError: `tx` is no optimizer.
            ValueError: a pattern matches nothing, nothing is left to train, or adapters are merged or disabled.
        """
        if not isinstance(tx, optax.GradientTransformation):
            raise TypeError(f"expected an optax optimizer such as optax.adamw(1e-4), got {type(tx).__name__}")
        refuse_shapes(model, "a training state")
        graphdef, _, other = split(model)
        arrays = param_arrays(model)
        check_usable(adapted_layers(model), "a training state")
        kept = frozen_with_adapters(list(arrays), learned_paths(model), trainable, frozen)
        params = nest(arrays)
        opt_state = init_optimizer(tx.init, choose(params, kept, inside=False))
        step = jnp.zeros((), jnp.int32, device=everywhere(params))
        return cls(step=step, params=params, other=other, opt_state=opt_state, tx=tx, graphdef=graphdef, frozen=kept)

    @property
    def trainable_params(self) -> dict[str, Any]:
        """The part of `params` that is trained."""
        return choose(self.params, self.frozen, inside=False) if self.frozen else self.params

    def with_params(self, params: Mapping[str, Any]) -> Self:
        """Return a state with other parameters: a tree like `params`, or like `trainable_params`.

        Raises:
            ValueError: the tree has other paths.
        """
        return replace(self, params=self._complete(params, "params", self.params))

    def apply_gradients(self, grads: Mapping[str, Any]) -> Self:
        """Return the state after one optimizer update; frozen parameters stay as they are.

        Args:
            grads: gradients, a tree like `params` (those of frozen parameters have no effect), or like
                `trainable_params`.

        Raises:
            ValueError: `grads` is a tree of another structure.
        """
        trained = self.trainable_params
        grads = self._complete(grads, "grads", trained)
        updates, opt_state = self.tx.update(grads, self.opt_state, trained)
        new: dict[str, Any] = optax.apply_updates(trained, updates)
        # A compiler free to choose puts results of a step elsewhere: the next one would be compiled anew for them.
        placement = getattr(self.model, "placement", None)
        state = self.with_params(new if placement is None else placement.hold(new))
        return replace(state, step=self.step + 1, opt_state=opt_state)

    def _complete(self, tree: Mapping[str, Any], name: str, wanted: dict[str, Any]) -> dict[str, Any]:
        """Return a tree of all or of the trained parameters as one like `wanted`; `params` fills it up."""
        given, own = flatten(tree, by_layer=False), flatten(self.params, by_layer=False)
        if given.keys() not in (own.keys(), own.keys() - self.frozen):
            raise ValueError(f"{name} must be a tree like state.params, as jax.grad over them returns it")
        if given.keys() == flatten(wanted, by_layer=False).keys():
            return dict(tree) if type(tree) is dict else nest(given)
        return nest({path: given.get(path, own[path]) for path in flatten(wanted, by_layer=False)})

    @property
    def model(self) -> Any:
        """The model with this state's parameters."""
        return bind(self.graphdef, self.params, self.other)

    def summary(self) -> TrainableSummary:
        """Say how many parameters are trained, and what the optimizer keeps for them."""
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.opt_state))
        return summarize(self.params, self.frozen, size)

    # ------------------------------------------------------------------ sharding
    def shard_state(
        self, partition_rules: PartitionRules | None = None, mesh: Any = None, *, strict: bool = False
    ) -> Self:
        """Return the state on a mesh: parameters by the rules, the optimizer's moments as their parameters.

        Args:
            partition_rules: `(regex, PartitionSpec)` pairs, the model's if `None`.
            mesh: the model's if `None`.
            strict: raise where a mesh axis does not divide a dimension, instead of dropping the axis with a warning.

        Raises:
            ShardingError: the rules do not fit the parameters or the mesh.
        """
        return move_state(self, self.model.shard_model(partition_rules, mesh, strict=strict))

    def gather_state(self) -> Self:
        """Return the state with every array whole on one device of this process."""
        return move_state(self, self.model.gather_model())

    # ------------------------------------------------------------------ files
    def save_state(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Write parameters, optimizer state, step and the model's config into a directory, whole or not at all.

        Of a model with adapters only what is trained is written, and a fingerprint of the base.

        Args:
            directory: a new one.
            overwrite: replace one that is there.

        Raises:
            FileExistsError: the directory exists.
        """
        state_files.save(self, directory, overwrite=overwrite)

    @classmethod
    def load_state(
        cls,
        directory: str | Path,
        tx: optax.GradientTransformation,
        *,
        model: Any = None,
        model_class: type | None = None,
        mesh: Any = None,
        partition_rules: PartitionRules | None = None,
    ) -> Self:
        """Read what `save_state` wrote, each device its own part.

        Args:
            directory: where it is.
            tx: the optimizer, of the same kind as the one that was saved.
            model: for a state of adapters, the base they were trained on; the state's model has the adapters, the
                given one stays as it is. The other arguments are for states without adapters.
            model_class: of the model; `None` for one that is registered.
            mesh: where to put the arrays, any; one device if `None`.
            partition_rules: the model's if `None`; only with a mesh.

        Raises:
            CheckpointError: there is no such state, it is one of another optimizer, or adapters of another base.
        """
        if model is not None:
            if (model_class, mesh, partition_rules) != (None, None, None):
                raise ValueError("model= is where it is already: leave out model_class, mesh and partition_rules")
            return state_files.load_adapters(cls, directory, tx, model)
        return state_files.load(cls, directory, tx, model_class=model_class, mesh=mesh, rules=partition_rules)
