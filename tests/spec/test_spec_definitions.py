"""base_module.md: Basic Structure, wherever and however the user writes the class."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easydel import EasyDeLBaseConfig, EasyDeLBaseModule
from tests.spec.conftest import assert_same
from tests.spec.user_models import MyModel, MyModelConfig
from tests.spec.user_models_evaluated import EvaluatedConfig, EvaluatedModel, define_inside_a_function


def define_inside_a_function_with_string_annotations():
    """`from __future__ import annotations` leaves the text "HiddenConfig", which no module holds."""

    class HiddenConfig(EasyDeLBaseConfig):
        def __init__(self, vocab_size=32, hidden_size=16, **kwargs):
            self.vocab_size = vocab_size
            self.hidden_size = hidden_size
            super().__init__(**kwargs)

    class HiddenModel(EasyDeLBaseModule):
        def __init__(
            self,
            config: HiddenConfig,
            dtype: jnp.dtype = jnp.float32,
            param_dtype: jnp.dtype = jnp.float32,
            precision: jax.lax.Precision = None,
            rngs: nnx.Rngs = None,
        ):
            super().__init__(config=config, dtype=dtype, param_dtype=param_dtype, precision=precision, rngs=rngs)
            self.embed_tokens = nnx.Embed(num_embeddings=config.vocab_size, features=config.hidden_size, rngs=rngs)

        def __call__(self, input_ids: jax.Array, attention_mask: jax.Array = None, **kwargs):
            return self.embed_tokens.attend(self.embed_tokens(input_ids))

    return HiddenConfig, HiddenModel


class PartlyResolvable(EvaluatedModel):
    """Another annotation names something only a type checker sees; the config's own can be resolved."""

    def __init__(
        self,
        config: EvaluatedConfig,
        dtype: OnlyForTypeCheckers = jnp.float32,  # noqa: F821
        param_dtype=jnp.float32,
        precision=None,
        rngs: nnx.Rngs = None,
    ):
        super().__init__(config, dtype, param_dtype, precision, rngs)


@pytest.mark.parametrize(
    "define",
    [
        lambda: (MyModelConfig, MyModel),
        lambda: (EvaluatedConfig, EvaluatedModel),
        lambda: (EvaluatedConfig, PartlyResolvable),
        define_inside_a_function,
        define_inside_a_function_with_string_annotations,
    ],
    ids=["module_future", "module", "unresolvable_neighbour", "function", "function_future"],
)
def test_every_way_of_writing_the_class_works(define, tmp_path):
    config_class, model_class = define()
    model = model_class(config_class(vocab_size=24), rngs=nnx.Rngs(0))
    ids = jnp.ones((1, 4), jnp.int32)
    assert model(input_ids=ids, labels=ids).loss.dtype == jnp.float32
    assert model.shard_model() is model
    assert model.get_static_arguments() == ()
    assert model.flops_per_token(sequence_length=4) > 0
    with pytest.warns(UserWarning, match="takes no cache"):
        assert model.generate(input_ids=ids, max_new_tokens=2).sequences.shape == (1, 6)
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert type(loaded.config) is config_class
    assert loaded.config.vocab_size == 24
    assert_same(loaded.params, model.params)


def test_labels_may_be_given_by_position(input_ids):
    """The front door must not add a second `labels` to a call that already has one."""

    class Positional(MyModel):
        def __call__(self, input_ids, labels=None):
            return super().__call__(input_ids)

    model = Positional(MyModelConfig(), rngs=nnx.Rngs(0))
    by_name = model(input_ids, labels=input_ids).loss
    np.testing.assert_array_equal(model(input_ids, input_ids).loss, by_name)


def test_llama_takes_every_argument_by_position(masters, input_ids):
    model = masters["llama"]
    by_name = model(input_ids=input_ids, labels=input_ids).loss
    np.testing.assert_array_equal(model(input_ids, None, None, None, None, None, input_ids).loss, by_name)
