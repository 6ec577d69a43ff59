"""The registry: our families and the user's stand side by side; what is unknown is named."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import easydel
from easydel import (
    AutoEasyDeLConfig,
    AutoEasyDeLModel,
    AutoEasyDeLModelForCausalLM,
    AutoEasyDeLModelForSequenceClassification,
    EasyDeLBaseConfig,
    EasyDeLBaseModule,
    LlamaConfig,
    ShardingError,
    TaskType,
    UnsupportedError,
    register_config,
    register_module,
)
from easydel.infra import registry
from easydel.sharding import create_mesh


@pytest.fixture(autouse=True)
def _forget_what_a_test_registers(monkeypatch):
    registry.get_config_class("llama")
    monkeypatch.setattr(registry, "_CONFIGS", dict(registry._CONFIGS))
    monkeypatch.setattr(registry, "_MODULES", dict(registry._MODULES))


def define(model_type="house"):
    class HouseConfig(EasyDeLBaseConfig):
        def __init__(self, vocab_size=16, hidden_size=8, **kwargs):
            self.vocab_size, self.hidden_size = vocab_size, hidden_size
            super().__init__(**kwargs)

    class House(EasyDeLBaseModule):
        def __init__(self, config: HouseConfig, dtype=jnp.float32, param_dtype=jnp.float32, precision=None, rngs=None):
            super().__init__(config, dtype, param_dtype, precision, rngs)
            self.embed = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)

        def __call__(self, input_ids):
            return self.embed.attend(self.embed(input_ids))

    HouseConfig.model_type = model_type
    return HouseConfig, House


def test_user_classes_register_as_ours_do(tmp_path):
    config_class, module_class = define()
    assert register_config("house")(config_class) is config_class
    assert register_module(TaskType.CAUSAL_LM, config=config_class, model_type="house")(module_class) is module_class
    model = AutoEasyDeLModelForCausalLM.from_config(config_class(vocab_size=24), rngs=nnx.Rngs(0))
    assert type(model) is module_class
    assert (model.model_type, model.model_task) == ("house", "causal-lm")
    model.save_pretrained(tmp_path)
    loaded = AutoEasyDeLModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is module_class
    assert type(AutoEasyDeLConfig.from_pretrained(tmp_path)) is type(loaded.config) is config_class
    assert loaded.config.vocab_size == 24
    with pytest.raises(
        UnsupportedError, match=r"task 'sequence-classification' of model_type 'house' is not supported.*causal-lm"
    ):
        AutoEasyDeLModelForSequenceClassification.from_pretrained(tmp_path)


def test_register_module_registers_its_config_too():
    config_class, module_class = define()
    register_module("base", config=config_class)(module_class)
    assert AutoEasyDeLConfig.for_model("house", hidden_size=4).hidden_size == 4
    assert type(AutoEasyDeLModel.from_config(config_class(), rngs=nnx.Rngs(0))) is module_class


def test_auto_classes_make_models_on_a_mesh():
    config_class, module_class = define()
    register_module("base", config=config_class)(module_class)
    mesh, rules = create_mesh((1, 4, 1, 2, 1)), [("embedding", PartitionSpec("tp", "fsdp"))]
    lazy = AutoEasyDeLModel.lazy_init(config_class(), {"fsdp": 2, "tp": 2}, rules)
    sharded = AutoEasyDeLModel.sharded_init(config_class(), mesh, rules, rngs=nnx.Rngs(1))
    assert type(lazy) is type(sharded) is module_class
    shape = lazy.graphtree_params_shape["embed"]["embedding"]
    assert isinstance(shape, jax.ShapeDtypeStruct)
    assert shape.sharding.shard_shape(shape.shape) == (shape.shape[0] // 2, shape.shape[1] // 2)
    with pytest.raises(ShardingError, match="strict"):
        AutoEasyDeLModel.lazy_init(config_class(), {"tp": 3}, rules, strict=True)
    table = sharded.embed.embedding.get_value()
    assert (table.sharding.spec, sharded.mesh) == (PartitionSpec("tp", "fsdp"), mesh)
    np.testing.assert_array_equal(table, module_class(config_class(), rngs=nnx.Rngs(1)).embed.embedding.get_value())
    with pytest.raises(UnsupportedError, match="task 'sequence-classification' of model_type 'house'"):
        AutoEasyDeLModelForSequenceClassification.sharded_init(config_class(), mesh)


def test_a_taken_name_raises_and_the_same_definition_may_come_again():
    config_class, module_class = define()
    register_module("causal-lm", config=config_class)(module_class)
    again_config, again_module = define()
    register_config("house")(again_config)
    register_module("causal-lm", config=again_config)(again_module)
    assert registry.get_module_class("causal-lm", "house") is again_module

    class Intruder(EasyDeLBaseConfig):
        pass

    with pytest.raises(ValueError, match=r"model_type 'house' is already taken by .*HouseConfig"):
        register_config("house")(Intruder)
    with pytest.raises(ValueError, match=r"model_type 'llama' is already taken by easydel\.models\.llama\.LlamaConfig"):
        register_config("llama")(Intruder)

    class Other(EasyDeLBaseModule):
        pass

    with pytest.raises(ValueError, match="task 'causal-lm' of model_type 'house' is already taken"):
        register_module("causal-lm", config=again_config)(Other)


def test_llama_cannot_be_taken_before_it_is_loaded():
    """A family keeps its name even if nobody has imported it yet."""
    registry._CONFIGS.clear()
    registry._MODULES.clear()

    class Intruder(EasyDeLBaseConfig):
        pass

    with pytest.raises(ValueError, match="'llama' is already taken"):
        register_config("llama")(Intruder)


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda c, m: register_config("cottage")(c), "model_type is 'house', but is registered as 'cottage'"),
        (lambda c, m: register_module("poetry", config=c)(m), "unknown task 'poetry'; known: base, causal-lm"),
        (lambda c, m: register_module("base", config=type("Bare", (EasyDeLBaseConfig,), {}))(m), "has no model_type"),
    ],
)
def test_registrations_that_make_no_sense_raise(register, message):
    with pytest.raises(ValueError, match=message):
        register(*define())


@pytest.mark.parametrize("auto", [AutoEasyDeLModelForCausalLM, AutoEasyDeLModel, AutoEasyDeLConfig])
def test_an_unknown_model_type_is_named_with_the_known_ones(auto, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lama"}))
    with pytest.raises(
        UnsupportedError, match=r"model_type 'lama' is not supported .did you mean 'llama'.*known: .*llama"
    ):
        auto.from_pretrained(tmp_path)


@pytest.mark.parametrize("auto", [AutoEasyDeLModelForCausalLM, AutoEasyDeLConfig])
def test_auto_classes_are_not_built(auto):
    with pytest.raises(TypeError, match="is not built directly"):
        auto()


def test_every_family_gives_its_names():
    for model_type, (_, prefix, tasks) in registry.FAMILIES.items():
        config = getattr(easydel, f"{prefix}Config")
        assert config.model_type == model_type
        for task in tasks:
            name = registry.OTHER_NAMES.get((model_type, task), prefix + registry.SUFFIXES[task])
            module = getattr(easydel, name)
            assert (module.model_type, module.model_task, module.config_class) == (model_type, task.value, config)
    assert easydel.LlamaConfig is LlamaConfig
