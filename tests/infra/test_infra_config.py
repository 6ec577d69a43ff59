"""Configs: equality and hash over the whole content, runtime settings kept out of files, no stale traces."""

from __future__ import annotations

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from flax import nnx

from easydel import AutoEasyDeLConfig, EasyDeLBaseConfig, EasyDeLBaseModule, LlamaConfig

IDS = jnp.asarray([[1, 2, 3]], jnp.int32)


class Classic(EasyDeLBaseConfig):
    model_type = "classic-config"

    def __init__(self, width=8, scale=1.0, table=None, **kwargs):
        self.width, self.scale, self.table = width, scale, table
        super().__init__(**kwargs)


class Annotated(EasyDeLBaseConfig):
    model_type = "annotated-config"

    width: int = 8
    scale: float = 1.0
    table: dict | list | None = None


class Scaled(EasyDeLBaseModule):
    """Reads its config while it runs, as a forward pass may."""

    def __init__(self, config: Classic, dtype=jnp.float32, param_dtype=jnp.float32, precision=None, rngs=None):
        super().__init__(config, dtype, param_dtype, precision, rngs)
        self.embed = nnx.Embed(16, config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, 16, rngs=rngs)

    def __call__(self, input_ids):
        return self.head(self.embed(input_ids)) * self.config.scale


DIFFERENT = [
    ({"width": 8}, {"width": 9}),
    ({"scale": 1.0}, {"scale": 1.5}),
    ({"table": {"a": {"b": [1, 2]}}}, {"table": {"a": {"b": [1, 3]}}}),
    ({"table": [1, [2, {"x": 1}]]}, {"table": [1, [2, {"x": 2}]]}),
    ({"table": {"a": 1}}, {"table": {"a": True}}),
    ({}, {"attn_mechanism": "vanilla"}),
    ({}, {"sharding_axis_dims": (1, 1, 1, -1, 1)}),
    ({}, {"num_labels": 5}),
]


@pytest.mark.parametrize("cls", [Classic, Annotated])
@pytest.mark.parametrize(("one", "two"), DIFFERENT, ids=str)
def test_configs_are_equal_exactly_when_their_content_is(cls, one, two):
    first, same, other = cls(**copy.deepcopy(one)), cls(**copy.deepcopy(one)), cls(**two)
    assert first == same
    assert hash(first) == hash(same)
    assert first != other
    assert copy.deepcopy(first) == first


def test_classes_with_equal_fields_are_not_equal():
    assert Classic() != Annotated()
    assert Classic() != transformers.PreTrainedConfig()


@pytest.mark.parametrize("cls", [Classic, Annotated])
def test_a_change_deep_inside_shows(cls):
    config = cls(table={"a": {"b": [1, 2]}})
    before = copy.deepcopy(config)
    config.table["a"]["b"].append(3)
    assert config != before
    assert hash(config) != hash(before)


def scaled(**fields):
    return Scaled(Classic(**fields), rngs=nnx.Rngs(0))


@nnx.jit
def with_nnx_jit(model):
    return model(IDS)


@jax.jit
def with_state(state):
    return state.model(IDS)


@jax.jit
def with_module(model):
    return model(IDS)


SGD = optax.sgd(0.1)
RUNS = {
    "nnx.jit": with_nnx_jit,
    "state": lambda model: with_state(model.to_state(SGD)),
    "jax.jit": with_module,
    "pure": lambda model: jax.jit(model.pure_transform_fn())(model.params, IDS),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_config_changed_after_first_use_is_not_served_a_stale_trace(run):
    model = scaled()
    expected = np.asarray(RUNS[run](model))
    model.config.scale = 3.0
    np.testing.assert_allclose(RUNS[run](model), 3 * expected, rtol=1e-6)
    model.config.scale = 1.0
    np.testing.assert_allclose(RUNS[run](model), expected, rtol=1e-6)


@pytest.mark.parametrize("run", RUNS)
def test_another_config_is_not_served_anothers_trace(run):
    expected = np.asarray(RUNS[run](scaled()))
    np.testing.assert_allclose(RUNS[run](scaled(scale=3.0)), 3 * expected, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*takes no cache")
def test_generation_follows_a_changed_config():
    model = scaled()
    greedy = model.generate(IDS, max_new_tokens=4).sequences
    model.config.scale = -1.0  # the least likely token becomes the likeliest
    changed = model.generate(IDS, max_new_tokens=4).sequences
    np.testing.assert_array_equal(changed, scaled(scale=-1.0).generate(IDS, max_new_tokens=4).sequences)
    assert (changed != greedy).any()
    model.config.scale = 1.0
    np.testing.assert_array_equal(model.generate(IDS, max_new_tokens=4).sequences, greedy)


RUNTIME = {
    "sharding_axis_dims": (1, 1, 1, -1, 1),
    "sharding_axis_names": ("dp", "fsdp", "ep", "tp", "sp"),
    "sharding_dcn_axis_dims": (1, 1, 1, 1, 1),
    "attn_mechanism": "blockwise",
    "attn_block_size": 16,
    "moe_mechanism": "ragged",
    "gradient_checkpointing": "full",
    "scan_layers": True,
}


@pytest.mark.parametrize("cls", [LlamaConfig, Classic, Annotated])
def test_runtime_settings_never_reach_the_file(cls, tmp_path):
    config = cls(**RUNTIME)
    assert config.runtime_settings() == RUNTIME
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not RUNTIME.keys() & written.keys()
    assert not RUNTIME.keys() & json.loads(config.to_json_string()).keys()
    assert not RUNTIME.keys() & config.to_diff_dict().keys()
    assert written["model_type"] == config.model_type
    assert cls.from_pretrained(tmp_path, **RUNTIME) == config
    assert cls.from_pretrained(tmp_path) == cls()


def test_transformers_loads_our_config_and_we_theirs(tmp_path):
    fields = {
        "hidden_size": 24,
        "num_attention_heads": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    }
    LlamaConfig(**fields, attn_mechanism="vanilla").save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert type(theirs) is transformers.LlamaConfig
    assert theirs.hidden_size == 24
    assert theirs.rope_parameters["rope_theta"] == 5e4
    assert not RUNTIME.keys() & vars(theirs).keys()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = AutoEasyDeLConfig.from_pretrained(tmp_path / "theirs", attn_mechanism="vanilla")
    assert type(ours) is LlamaConfig
    assert ours.attn_mechanism == "vanilla"
    assert {**ours.to_dict(), "architectures": None} == {**LlamaConfig(**fields).to_dict(), "architectures": None}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn_mechanism": "flash9"}, "attn_mechanism='flash9' is not supported; choose one of auto"),
        ({"gradient_checkpointing": "some"}, "gradient_checkpointing='some' is not supported"),
        ({"attn_block_size": 0}, "attn_block_size must be positive"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_values_that_cannot_be_used_raise(fields, message):
    with pytest.raises(Exception, match=message):
        LlamaConfig(**fields)
