"""Loading: exact values in the right places, and nothing that does not fit goes unnoticed."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from easydel.errors import CheckpointError
from easydel.hub.load import load_module
from easydel.hub.save import save_module
from easydel.hub.transforms import TRANSPOSE, Split, Stack
from easydel.hub.weight_map import WeightRule, build_links
from easydel.paths import named_variables
from easydel.rngs import shape_rngs
from tests.hub.tiny import Backbone, Causal, Classifier, arrays, cast, same


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Causal, Path]:
    model = Causal(nnx.Rngs(7))
    save_module(model, tmp_path)
    return model, tmp_path


def edit(folder: Path, **changes: np.ndarray | None) -> None:
    """Replace or (None) remove tensors of the file; `__` in a keyword stands for a dot."""
    tensors = load_file(folder / "model.safetensors")
    for key, value in changes.items():
        name = key.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (jnp.float32, "5GB"),
        (jnp.bfloat16, "2KB"),
        (jnp.float16, "5GB"),
        pytest.param(jnp.float32, "2KB", marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, "5GB", marks=pytest.mark.slow),
        pytest.param(jnp.float16, "2KB", marks=pytest.mark.slow),
    ],
)
def test_round_trip(tmp_path: Path, dtype: jnp.dtype, size: str) -> None:
    model = cast(Causal(nnx.Rngs(1)), dtype)
    save_module(model, tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors").exists() == (size == "5GB")
    assert same(load_module(lambda: Causal(nnx.Rngs(0)), tmp_path), model)


def test_shapes_built_with_still_rngs_are_the_same(saved: tuple[Causal, Path]) -> None:
    _, folder = saved
    model = Odd(nnx.Rngs(5))
    save_module(model, folder)
    got = load_module(lambda: Odd(nnx.Rngs(5)), folder, build_shapes=lambda: Odd(shape_rngs()))
    assert nnx.graphdef(got) == nnx.graphdef(load_module(lambda: Odd(nnx.Rngs(5)), folder))
    assert same(got, model)
    np.testing.assert_array_equal(got.drop(jnp.ones(64)), model.drop(jnp.ones(64)))


def test_names_and_layout_are_hugging_face_s(saved: tuple[Causal, Path]) -> None:
    model, folder = saved
    tensors, want = load_file(folder / "model.safetensors"), arrays(model)
    assert "model.layers.10.norm.weight" in tensors
    assert len(tensors) == len(want)
    np.testing.assert_array_equal(tensors["model.layers.10.proj.weight"], want["model/layers/10/proj/kernel"].T)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], want["model/embed_tokens/embedding"])


def test_param_dtype(saved: tuple[Causal, Path]) -> None:
    model, folder = saved
    got = load_module(lambda: Causal(nnx.Rngs(0)), folder, param_dtype=jnp.bfloat16)
    for path, array in arrays(got).items():
        np.testing.assert_array_equal(array, arrays(model)[path].astype(jnp.bfloat16))


def test_every_misfit_is_in_one_table(saved: tuple[Causal, Path]) -> None:
    _, folder = saved
    edit(
        folder, model__layers__3__norm__bias=None, model__surprise=np.zeros(2, np.float32),
        model__layers__11__down__weight=np.zeros((8, 17), np.float32), lm_head__weight=np.zeros((16, 8), np.int32),
        model__layers__0__norm__bias=np.zeros((8, 1), np.float32),
    )  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        load_module(lambda: Causal(nnx.Rngs(0)), folder)
    text = str(caught.value)
    kinds = ("missing", "unexpected", "shape", "dtype")
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith(kinds)}
    assert len(lines) == 5
    assert "5 problems" in text
    assert str(folder) in text
    assert "allow_new" in text
    assert lines["model.layers.3.norm.bias"].startswith("missing")
    assert "float32[8, 16]" in lines["model.layers.11.down.weight"]
    assert "float32[8, 17]" in lines["model.layers.11.down.weight"]
    assert lines["model.surprise"].startswith("unexpected")
    assert lines["lm_head.weight"].startswith("dtype")
    assert "int32[16, 8]" in lines["lm_head.weight"]


def test_base_and_head_load_each_other(tmp_path: Path, saved: tuple[Causal, Path]) -> None:
    model, folder = saved
    base = load_module(lambda: Backbone(nnx.Rngs(0)), folder)
    assert same(base, model.model)
    save_module(base, tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"missing +lm_head\.weight"):
        load_module(lambda: Causal(nnx.Rngs(0)), tmp_path / "base")
    assert same(load_module(lambda: Causal(nnx.Rngs(0), tied=True), tmp_path / "base").model, model.model)


def test_allow_new_makes_a_new_head(saved: tuple[Causal, Path]) -> None:
    model, folder = saved
    cast(model, jnp.bfloat16)
    save_module(model, folder)
    with pytest.raises(CheckpointError, match=r"score\.weight"):
        load_module(lambda: Classifier(nnx.Rngs(3)), folder)
    with pytest.warns(UserWarning, match=r"lm_head\.weight"):
        got = load_module(lambda: Classifier(nnx.Rngs(3)), folder, allow_new=["score"])
    assert same(got.model, model.model)
    # the same seed as an ordinary construction, in the checkpoint's dtype
    want = Classifier(nnx.Rngs(3)).score.kernel.get_value().astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got.score.kernel.get_value()), np.asarray(want))


def test_allow_new_replaces_a_head_of_another_size(tmp_path: Path) -> None:
    model = Classifier(nnx.Rngs(1), labels=3)
    save_module(model, tmp_path)
    with pytest.raises(CheckpointError, match="shape"):
        load_module(lambda: Classifier(nnx.Rngs(0), labels=5), tmp_path)
    got = load_module(lambda: Classifier(nnx.Rngs(0), labels=5), tmp_path, allow_new=[r"^score"])
    assert got.score.kernel.get_value().shape == (8, 5)
    assert same(got.model, model.model)


def test_tied_heads(saved: tuple[Causal, Path]) -> None:
    model, folder = saved
    build = lambda: Causal(nnx.Rngs(0), tied=True)  # noqa: E731
    with pytest.raises(CheckpointError, match="tie_word_embeddings=False"):
        load_module(build, folder)
    embedding = np.asarray(model.model.embed_tokens.embedding.get_value())
    edit(folder, lm_head__weight=embedding)
    assert same(load_module(build, folder).model, model.model)
    edit(folder, lm_head__weight=embedding, model__embed_tokens__weight=None)
    assert same(load_module(build, folder).model, model.model)


def test_harmless_extras_are_silent(saved: tuple[Causal, Path]) -> None:
    model, folder = saved
    edit(folder, model__layers__0__rotary_emb__inv_freq=np.ones(4, np.float32))
    assert same(load_module(lambda: Causal(nnx.Rngs(0)), folder), model)


class Odd(nnx.Module):
    """Everything that is no parameter: statistics, random states, a buffer, a plain array, a convolution."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 5, (2, 4), rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.buffer = nnx.Variable(jnp.arange(3.0), persistent=False)
        self.plain = jnp.arange(4.0)
        self.tensor = nnx.Param(jnp.ones((2, 3, 4)))


def test_what_is_no_parameter(tmp_path: Path) -> None:
    model = Odd(nnx.Rngs(5))
    model.norm.mean.set_value(jnp.arange(5.0))
    save_module(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["conv.weight"].shape == (5, 3, 2, 4)
    assert not {"buffer", "drop.rngs.key"} & tensors.keys()
    got = load_module(lambda: Odd(nnx.Rngs(5)), tmp_path)
    assert same(got, model)
    np.testing.assert_array_equal(np.asarray(got.norm.mean.get_value()), np.arange(5.0))
    np.testing.assert_array_equal(np.asarray(got.plain), np.arange(4.0))
    np.testing.assert_array_equal(np.asarray(got.buffer.get_value()), np.arange(3.0))
    x = jnp.ones((1, 5, 5, 3))
    np.testing.assert_array_equal(got.drop(got.conv(x)), model.drop(model.conv(x)))


class Rules(nnx.Module):
    weight_map = (
        WeightRule("block.{i}.expert.{e}.w.weight", "blocks/{i}/experts", Stack(TRANSPOSE)),
        WeightRule("fused.weight", ("q/kernel", "k/kernel"), Split(0, TRANSPOSE)),
        WeightRule("self.output", "out", None),
    )

    def __init__(self, rngs: nnx.Rngs) -> None:
        def normal() -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), (3, 4, 5)))

        self.blocks = nnx.List([nnx.Dict(experts=normal()) for _ in range(11)])
        q, k = (nnx.Linear(4, size, use_bias=False, rngs=rngs) for size in (6, 2))
        self.attn = nnx.Dict(q=q, k=k, out=nnx.Linear(4, 4, rngs=rngs))


def test_weight_rules_work_both_ways(tmp_path: Path) -> None:
    model = Rules(nnx.Rngs(2))
    save_module(model, tmp_path)
    tensors, want = load_file(tmp_path / "model.safetensors"), arrays(model)
    np.testing.assert_array_equal(tensors["block.10.expert.2.w.weight"], want["blocks/10/experts"][2].T)
    fused = np.concatenate([want["attn/q/kernel"].T, want["attn/k/kernel"].T])
    np.testing.assert_array_equal(tensors["attn.fused.weight"], fused)
    assert {"attn.self.output.weight", "attn.self.output.bias"} <= tensors.keys()
    assert same(load_module(lambda: Rules(nnx.Rngs(0)), tmp_path), model)


def test_colliding_plain_names_stay_apart() -> None:
    class Two(nnx.Module):
        def __init__(self) -> None:
            self.kernel, self.scale = nnx.Param(jnp.ones((2, 3))), nnx.Param(jnp.ones(3))

    assert sorted(link.sources[0] for link in build_links(Two())) == ["kernel", "scale"]


def test_straight_into_shards(saved: tuple[Causal, Path]) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs 8 simulated devices")
    model, folder = saved
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def place(module: nnx.Module) -> dict[str, NamedSharding]:
        specs = {2: PartitionSpec("a", "b"), 1: PartitionSpec("b")}
        ranks = {path: len(v.get_value().shape) for path, v in named_variables(module).items()}
        return {path: NamedSharding(mesh, specs[rank]) for path, rank in ranks.items() if rank in specs}

    got = load_module(lambda: Causal(nnx.Rngs(0)), folder, shardings=place)
    assert same(got, model)
    for variable in named_variables(got, nnx.Param).values():
        array = variable.get_value()
        assert len(array.sharding.device_set) == 8
        assert array.addressable_shards[0].data.size * (8 if array.ndim == 2 else 4) == array.size
    save_module(got, folder / "again")
    assert same(load_module(lambda: Causal(nnx.Rngs(0)), folder / "again"), model)
    with pytest.warns(UserWarning, match="lm_head"):
        new = load_module(lambda: Classifier(nnx.Rngs(0), labels=4), folder, shardings=place, allow_new=["score"])
    assert len(new.score.kernel.get_value().sharding.device_set) == 8
