"""Paths name what nnx holds, as nnx itself would."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from easydel.paths import flatten, matching, named_modules, named_variables, nest, split, to_state


def linear() -> nnx.Linear:
    return nnx.Linear(2, 2, rngs=nnx.Rngs(0))


class Everything(nnx.Module):
    """Every way nnx has of holding a variable, a shared one included."""

    def __init__(self) -> None:
        self.name, self.sizes = "static", (1, 2)
        self.embed = nnx.Embed(4, 2, rngs=nnx.Rngs(0))
        self.layers = nnx.List([linear() for _ in range(12)])
        self.named = nnx.Dict({"b": linear(), "a": linear()})
        self.plain = nnx.data({"k": [nnx.Param(jnp.ones(2)), linear()]})
        self.seq = nnx.Sequential(linear(), nnx.relu, nnx.Dropout(0.1, rngs=nnx.Rngs(0)))
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
        self.zhead = self.embed
        self.tied = self.embed.embedding


def test_names_are_those_of_nnx() -> None:
    module = Everything()
    expected = {
        "/".join(map(str, parts)): node
        for parts, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Variable | nnx.Module)
    }
    found = named_variables(module) | named_modules(module)
    assert found.keys() == expected.keys()
    assert all(found[path] is expected[path] for path in found)


def test_variables_have_the_paths_of_their_state() -> None:
    module = Everything()
    state = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(module))}
    assert named_variables(module).keys() == state


def test_layers_come_in_numeric_order() -> None:
    paths = [path for path in named_variables(Everything()) if path.startswith("layers/") and path.endswith("kernel")]
    assert paths == [f"layers/{i}/kernel" for i in range(12)]


def test_trees_go_back_to_their_places() -> None:
    module = Everything()
    for index, layer in enumerate(module.layers):
        layer.kernel.set_value(jnp.full((2, 2), index))
    graphdef, params, other = split(module)
    rebuilt = nnx.merge(graphdef, to_state(nest(flatten(params))), other)
    assert [int(layer.kernel.get_value()[0, 0]) for layer in rebuilt.layers] == list(range(12))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), nnx.state(module, nnx.Param), params))


def test_ambiguous_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'7' .*ambiguous"):
        named_variables(nnx.Dict({"7": linear()}))


def test_a_pattern_without_match_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'q_prj' matches no module; nearest: .*q_proj"):
        matching("q_prj", ["layers/0/q_proj", "layers/0/mlp"], what="module")
    with pytest.raises(ValueError, match="not a regular expression"):
        matching("(", ["a"])
    assert matching("q", ["q_proj", "k"]) == ["q_proj"]
