"""What a user of the page writes: models of plain nnx layers, their configs and their torch twins."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from easydel import EasyDeLBaseConfig, EasyDeLBaseModule
from easydel.outputs import CausalLMOutput


class MyModelConfig(EasyDeLBaseConfig):
    model_type = "my-model"

    def __init__(self, vocab_size: int = 32, hidden_size: int = 16, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class MyModel(EasyDeLBaseModule):
    """The page's own class, its layers filled in; returns bare logits."""

    def __init__(
        self,
        config: MyModelConfig,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        precision: jax.lax.Precision = None,
        rngs: nnx.Rngs = None,
    ):
        super().__init__(
            config=config,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            rngs=rngs,
        )
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embed_tokens = nnx.Embed(num_embeddings=config.vocab_size, features=config.hidden_size, **kinds)
        self.up = nnx.Linear(config.hidden_size, 2 * config.hidden_size, precision=precision, **kinds)
        self.down = nnx.Linear(2 * config.hidden_size, config.hidden_size, precision=precision, **kinds)
        self.norm = nnx.LayerNorm(config.hidden_size, **kinds)
        self.lm_head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, precision=precision, **kinds)

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array = None, **kwargs):
        hidden = self.embed_tokens(input_ids)
        hidden = hidden + self.down(nnx.gelu(self.up(hidden)))
        return self.lm_head(self.norm(hidden))


class MixingModel(EasyDeLBaseModule):
    """A second user class: each token sees the mean of those before it; returns an output object."""

    config_class = MyModelConfig

    def __init__(self, config, dtype=jnp.float32, param_dtype=jnp.float32, precision=None, rngs=None):
        super().__init__(config, dtype, param_dtype, precision, rngs)
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, **kinds)
        self.layers = nnx.List([nnx.Linear(config.hidden_size, config.hidden_size, **kinds) for _ in range(2)])
        self.norm = nnx.LayerNorm(config.hidden_size, **kinds)
        self.lm_head = nnx.Linear(config.hidden_size, config.vocab_size, **kinds)

    def __call__(self, input_ids, attention_mask=None):
        hidden = self.embed_tokens(input_ids)
        counts = jnp.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype)[:, None]
        for layer in self.layers:
            hidden = hidden + jnp.tanh(layer(jnp.cumsum(hidden, axis=1) / counts))
        return CausalLMOutput(logits=self.lm_head(self.norm(hidden)))


def torch_twin(name: str, config: MyModelConfig):
    """Return the torch module a user of `name` would load `to_torch()` into."""
    import torch
    from torch import nn

    width, vocab = config.hidden_size, config.vocab_size

    class Twin(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(vocab, width)
            self.norm = nn.LayerNorm(width, eps=1e-6)
            self.lm_head = nn.Linear(width, vocab, bias=name == "mixing")
            if name == "mixing":
                self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
            else:
                self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

        def forward(self, ids):
            hidden = self.embed_tokens(ids)
            if name == "mixing":
                counts = torch.arange(1, ids.shape[1] + 1)[:, None]
                for layer in self.layers:
                    hidden = hidden + torch.tanh(layer(torch.cumsum(hidden, 1) / counts))
            else:
                hidden = hidden + self.down(nn.functional.gelu(self.up(hidden), approximate="tanh"))
            return self.lm_head(self.norm(hidden))

    return Twin()
