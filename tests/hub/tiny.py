"""A module of plain nnx layers, used by the tests of this folder."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx

from easydel.paths import named_variables


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.proj = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, use_bias=False, rngs=rngs)


class Backbone(nnx.Module):
    base_model_prefix = "model"
    harmless_extras = (r"inv_freq$",)

    def __init__(self, rngs: nnx.Rngs, layers: int = 12) -> None:
        self.embed_tokens = nnx.Embed(16, 8, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(layers)])


class Causal(nnx.Module):
    base_model_prefix = "model"

    def __init__(self, rngs: nnx.Rngs, tied: bool = False, layers: int = 12) -> None:
        self.tied = tied
        self.model = Backbone(rngs, layers)
        if not tied:
            self.lm_head = nnx.Linear(8, 16, use_bias=False, rngs=rngs)

    def tied_names(self) -> dict[str, str]:
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.tied else {}


class Classifier(nnx.Module):
    base_model_prefix = "model"

    def __init__(self, rngs: nnx.Rngs, labels: int = 3) -> None:
        self.model = Backbone(rngs)
        self.score = nnx.Linear(8, labels, use_bias=False, rngs=rngs)


def arrays(module: nnx.Module) -> dict[str, np.ndarray]:
    return {p: np.asarray(v.get_value()) for p, v in named_variables(module, nnx.Param).items()}


def same(one: nnx.Module, two: nnx.Module) -> bool:
    left, right = arrays(one), arrays(two)
    return left.keys() == right.keys() and all(
        left[p].dtype == right[p].dtype and np.array_equal(left[p], right[p]) for p in left
    )


def cast(module: nnx.Module, dtype: jnp.dtype) -> nnx.Module:
    for variable in named_variables(module, nnx.Param).values():
        variable.set_value(variable.get_value().astype(dtype))
    return module
