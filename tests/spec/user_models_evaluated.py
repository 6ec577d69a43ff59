"""The page's model in a file without `from __future__ import annotations`: its annotations are objects."""

import jax
import jax.numpy as jnp
from flax import nnx

from easydel import EasyDeLBaseConfig, EasyDeLBaseModule


class EvaluatedConfig(EasyDeLBaseConfig):
    def __init__(self, vocab_size=32, hidden_size=16, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class EvaluatedModel(EasyDeLBaseModule):
    def __init__(
        self,
        config: EvaluatedConfig,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        precision: jax.lax.Precision = None,
        rngs: nnx.Rngs = None,
    ):
        super().__init__(config=config, dtype=dtype, param_dtype=param_dtype, precision=precision, rngs=rngs)
        self.embed_tokens = nnx.Embed(num_embeddings=config.vocab_size, features=config.hidden_size, rngs=rngs)

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array = None, **kwargs):
        return self.embed_tokens.attend(self.embed_tokens(input_ids))


def define_inside_a_function():
    """Return a config and a model class that only this function's scope knows."""

    class LocalConfig(EasyDeLBaseConfig):
        def __init__(self, vocab_size=32, hidden_size=16, **kwargs):
            self.vocab_size = vocab_size
            self.hidden_size = hidden_size
            super().__init__(**kwargs)

    class LocalModel(EvaluatedModel):
        def __init__(self, config: LocalConfig, dtype=jnp.float32, param_dtype=jnp.float32, precision=None, rngs=None):
            super().__init__(config, dtype, param_dtype, precision, rngs)

    return LocalConfig, LocalModel
