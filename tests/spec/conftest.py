"""The models and meshes that every snippet of the page is run on."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easydel import LlamaConfig, LlamaForCausalLM
from easydel.paths import flatten
from easydel.sharding import create_mesh
from tests.spec.user_models import MixingModel, MyModel, MyModelConfig

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,  # MixingModel has two of its own
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef: Any, state: Any, input_ids: Any) -> Any:
    """Run the forward pass of a split model."""
    return nnx.merge(graphdef, state)(input_ids=input_ids)


@dataclass
class Case:
    """A model class, its config, and the mesh to shard on; `fresh()` is a model nobody else holds."""

    name: str
    cls: type
    config: Any
    mesh: Any
    master: Any

    def fresh(self) -> Any:
        return nnx.clone(self.master)

    @property
    def returns_array(self) -> bool:
        return self.name == "my_model"

    def logits(self, model: Any, input_ids: Any) -> jax.Array:
        """Run the model compiled; equal models share the compilation."""
        outputs = forward(*nnx.split(model), input_ids)
        return outputs if self.returns_array else outputs.logits


CLASSES = {
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**LLAMA)),
    "my_model": (MyModel, MyModelConfig),
    "mixing": (MixingModel, MyModelConfig),
}


@pytest.fixture(scope="session")
def masters():
    return {name: cls(make(), rngs=nnx.Rngs(0)) for name, (cls, make) in CLASSES.items()}


# Each class once, on one device or on eight; the other way round with the slow tests.
CASES = ["llama-8", "my_model-8", "mixing-1"]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("llama-1", "my_model-1", "mixing-8")]


@pytest.fixture(params=[*CASES, *OTHERS])
def case(request, masters) -> Case:
    name, count = request.param.split("-")
    mesh = create_mesh((1, -1, 1, 2, 1) if count == "8" else (1,) * 5, devices=jax.devices()[: int(count)])
    return Case(name, CLASSES[name][0], masters[name].config, mesh, masters[name])


@pytest.fixture
def model(case):
    return case.fresh()


@pytest.fixture(scope="session")
def input_ids():
    return jnp.asarray(np.random.default_rng(0).integers(1, 32, (2, 8)), jnp.int32)


@pytest.fixture(scope="session")
def attention_mask(input_ids):
    return jnp.ones_like(input_ids)


def arrays(tree: Any) -> dict[str, np.ndarray]:
    """Return path → numpy copy."""
    return {path: np.array(leaf) for path, leaf in flatten(tree).items()}


def assert_same(one: Any, two: Any) -> None:
    """Assert that two trees hold equal arrays under equal paths."""
    left, right = arrays(one), arrays(two)
    assert left.keys() == right.keys()
    for path, value in left.items():
        np.testing.assert_array_equal(value, right[path], err_msg=path)
