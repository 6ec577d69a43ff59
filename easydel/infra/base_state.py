"""`EasyDeLState`: parameters, optimizer state and step of a training run, as one immutable pytree."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from easydel.calls import refuse_shapes
from easydel.infra.functional import bind
from easydel.infra.views import param_arrays
from easydel.paths import flatten, nest, split

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EasyDeLState:
    """A training state; a pytree that can be passed through `jax.jit`.

    Attributes:
        step: int32 `[]`, the number of updates applied.
        params: nested dict of the parameters, as in `model.params`.
        other: the model's non-parameter state.
        opt_state: the optimizer's state; what belongs to a parameter is sharded like it.
        tx: the optimizer (static).
        graphdef: the model's definition (static).
    """

    step: jax.Array
    params: dict[str, Any]
    other: nnx.State
    opt_state: Any
    tx: optax.GradientTransformation = field(metadata=_STATIC)
    graphdef: Any = field(metadata=_STATIC)

    @classmethod
    def create(cls, model: nnx.Module, tx: optax.GradientTransformation) -> EasyDeLState:
        """Make a state at step 0 from a model and an optimizer. The arrays are shared with the model, not copied."""
        if not isinstance(tx, optax.GradientTransformation):
            raise TypeError(f"expected an optax optimizer such as optax.adamw(1e-4), got {type(tx).__name__}")
        refuse_shapes(model, "a training state")
        graphdef, _, other = split(model)
        params = nest(param_arrays(model))
        step = jnp.zeros((), jnp.int32)
        return cls(step=step, params=params, other=other, opt_state=tx.init(params), tx=tx, graphdef=graphdef)

    def apply_gradients(self, grads: dict[str, Any]) -> EasyDeLState:
        """Return the state after one optimizer update.

        Args:
            grads: gradients, a tree like `params`.

        Raises:
            ValueError: `grads` is a tree of another structure.
        """
        if flatten(grads, by_layer=False).keys() != flatten(self.params, by_layer=False).keys():
            raise ValueError("grads must be a tree like state.params, as jax.grad over them returns it")
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, updates)
        return replace(self, step=self.step + 1, params=params, opt_state=opt_state)

    @property
    def model(self) -> Any:
        """The model with this state's parameters."""
        return bind(self.graphdef, self.params, self.other)
