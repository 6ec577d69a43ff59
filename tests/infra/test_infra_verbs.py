"""Verbs return the model, and a verb that fails leaves it as it was; errors name what is wrong."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from easydel import EasyDeLBaseConfig, EasyDeLBaseModule, ShardingError, TaskType
from easydel.outputs import CausalLMOutput
from easydel.paths import flatten, nest
from easydel.sharding import create_mesh

P = PartitionSpec
IDS = jnp.asarray([[1, 2, 3]], jnp.int32)


class Config(EasyDeLBaseConfig):
    def __init__(self, vocab_size=12, hidden_size=6, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**kwargs)


class Fixed(nnx.Module):
    """A layer that cannot compute in another dtype."""

    def __init__(self):
        self.offset = nnx.Param(jnp.zeros((6,)))

    @property
    def dtype(self):
        return jnp.dtype("float32")


class Model(EasyDeLBaseModule):
    def __init__(
        self, config: Config, dtype=jnp.float32, param_dtype=jnp.float32, precision=None, rngs=None, extra=None
    ):
        super().__init__(config, dtype, param_dtype, precision, rngs)
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.head = nnx.Linear(config.hidden_size, config.vocab_size, rngs=rngs)
        self.codes = nnx.Param(jnp.arange(4))
        self.extra = extra

    def __call__(self, input_ids, attention_mask=None, scale: bool = False):
        return self.head(self.embed(input_ids))


@pytest.fixture
def model():
    return Model(Config(), rngs=nnx.Rngs(0))


def snapshot(model):
    held = {path: (leaf, leaf.dtype, leaf.sharding) for path, leaf in flatten(model.params).items()}
    return held, model.is_sharded, model.mesh, model.embed.dtype, model.head.dtype, model.dtype


KERNEL = np.zeros((6, 12), np.float32)
FAILING = {
    "to_dtype": (lambda m: m.to_dtype(jnp.int8), ValueError, "floating-point dtype"),
    "no_rule": (lambda m: m.shard_model([("embed", P())]), ShardingError, r"head/kernel \(6, 12\): no rule matches"),
    "strict": (lambda m: m.shard_model([(".*", P("fsdp"))], strict=True), ShardingError, "head/kernel: dimension 0"),
    "unknown_axis": (lambda m: m.shard_model([(".*", P("rows"))]), ShardingError, r"names \['rows'\]"),
    "one_late_rule": (lambda m: m.shard_model([("head/kernel", P("x")), (".*", P())]), ShardingError, "head/kernel"),
    "unknown_path": (
        lambda m: m.merge_params_dict({"head": {"kernel": KERNEL, "kernle": KERNEL}}),
        ValueError,
        "head/kernle: the model has no such parameter",
    ),
    "wrong_shape": (
        lambda m: m.merge_params_dict({"embed": {"embedding": np.zeros((12, 6))}, "head": {"kernel": KERNEL.T}}),
        ValueError,
        r"head/kernel: expected shape \(6, 12\), got \(12, 6\)",
    ),
    "integers": (
        lambda m: m.merge_params_dict({"head": {"kernel": np.zeros((6, 12), int)}}),
        ValueError,
        "head/kernel: expected floating-point values, got int",
    ),
    "state": (
        lambda m: m.merge_params(nnx.State({"heads": {"kernel": jnp.zeros((6, 12))}})),
        ValueError,
        "heads/kernel: the model has no such parameter",
    ),
}


@pytest.mark.parametrize("name", FAILING)
@pytest.mark.filterwarnings("ignore:.*mesh axis.*dropped")
def test_a_failing_verb_names_the_cause_and_changes_nothing(model, name):
    verb, error, message = FAILING[name]
    before = snapshot(model)
    with pytest.raises(error, match=message):
        verb(model)
    after = snapshot(model)
    assert all(after[0][path][0] is leaf for path, (leaf, *_) in before[0].items())
    assert before[1:] == after[1:]


def test_to_dtype_over_a_layer_with_a_fixed_dtype_is_all_or_nothing():
    model = Model(Config(), rngs=nnx.Rngs(0), extra=Fixed())
    try:
        model.to_dtype(jnp.bfloat16)
    except Exception:
        assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float32"), jnp.dtype("int32")}
        assert model.embed.dtype == jnp.float32
    else:
        assert model.extra.offset.get_value().dtype == model.embed.dtype == model.module_dtype == jnp.bfloat16


def test_all_problems_of_a_merge_are_listed_together(model):
    with pytest.raises(ValueError, match=r"(?s)nope.*head/kernel: expected shape") as caught:
        model.merge_params_dict({"nope": np.zeros(2), "head": {"kernel": np.zeros((1, 1))}})
    assert "embed" not in str(caught.value).replace("nearest: embed", "")


def test_a_partial_merge_replaces_only_what_it_names(model):
    before = flatten(model.params)
    assert model.merge_params_dict({"head": {"kernel": KERNEL + 7}}) is model
    after = flatten(model.params)
    assert (after.pop("head/kernel") == 7).all()
    assert all(after[path] is before[path] for path in after)
    state = nnx.State({"head": {"bias": jnp.full((12,), 3.0)}})
    assert model.merge_params(state) is model
    assert (model.head.bias.get_value() == 3).all()
    assert (model.head.kernel.get_value() == 7).all()


def test_merging_shares_arrays_and_takes_numpy(model):
    ours = nest({path: leaf + 0 for path, leaf in flatten(model.params).items()})
    model.merge_params_dict(ours)
    assert all(flatten(model.params)[path] is leaf for path, leaf in flatten(ours).items())


def test_integers_keep_their_type(model):
    model.half()
    assert model.codes.get_value().dtype == jnp.int32
    assert model.module_dtype == model.embed.dtype == model.head.dtype == model.dtype == jnp.float16
    model.float()
    assert model.module_dtype == model.head.dtype == model.dtype == jnp.float32


INPUTS = {
    "unknown": (
        {"input_ids": IDS, "atention_mask": IDS},
        TypeError,
        "takes no 'atention_mask' .did you mean 'attention_mask'",
    ),
    "static_array": ({"input_ids": IDS, "scale": jnp.ones(())}, TypeError, "'scale' is a static argument"),
    "unhashable_static": ({"input_ids": IDS, "scale": []}, TypeError, "unhashable"),
    "vocabulary": ({"input_ids": [[1, 12]]}, ValueError, r"token ids must lie in \[0, 12\), got \[1, 12\]"),
    "negative": ({"input_ids": [[-1, 2]]}, ValueError, r"got \[-1, 2\]"),
    "rank": ({"input_ids": [1, 2]}, ValueError, r"integers \[batch, seq\], got int32\[2\]"),
    "floats": ({"input_ids": [[1.0, 2.0]]}, ValueError, "integers"),
    "mask_batch": ({"input_ids": IDS, "attention_mask": np.ones((2, 3))}, ValueError, "does not fit"),
    "mask_short": ({"input_ids": IDS, "attention_mask": np.ones((1, 2))}, ValueError, "does not fit"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_prepare_inputs_names_what_is_wrong(model, name):
    inputs, error, message = INPUTS[name]
    with pytest.raises(error, match=message):
        model.prepare_inputs_for_call(**inputs)


def test_prepare_inputs_makes_arrays(model):
    made = model.prepare_inputs_for_call(input_ids=np.asarray(IDS, np.int64), attention_mask=None, scale=True)
    assert {*made} == {"input_ids", "scale"}
    assert made["input_ids"].dtype == jnp.int32
    assert made["scale"] is True
    assert model.get_static_arguments() == ("scale",)


def test_task_type_values_are_the_model_tasks():
    assert TaskType("causal-lm") == "causal-lm" == TaskType.CAUSAL_LM.value
    assert {"seq2seq", "sequence-classification", "masked-lm", "embedding", "speech-seq2seq"} <= {*TaskType}


def test_a_model_that_computes_its_own_loss_keeps_it():
    class Own(Model):
        def __call__(self, input_ids, labels=None):
            logits = super().__call__(input_ids)
            return CausalLMOutput(logits=logits, loss=None if labels is None else jnp.float32(42))

    assert Own(Config(), rngs=nnx.Rngs(0))(input_ids=IDS, labels=IDS).loss == 42


def test_a_mesh_over_some_devices_is_remembered(model):
    mesh = create_mesh((1, 2, 1, 1, 1), devices=jax.devices()[:2])
    assert model.shard_model([(".*", P())], mesh).mesh is mesh
    assert model.gather_model().mesh is mesh
