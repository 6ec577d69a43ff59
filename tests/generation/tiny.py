"""Small models for the tests of this folder."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import easydel
from easydel import EasyDeLBaseConfig, EasyDeLBaseModule

VOCAB = 24


@functools.cache
def llama(vocab: int = VOCAB) -> Any:
    """Return a one-layer Llama whose random weights make the next token far from certain, and far from uniform."""
    config = easydel.LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        initializer_range=0.4,
        eos_token_id=None,
        bos_token_id=None,
    )
    return easydel.LlamaForCausalLM(config, rngs=nnx.Rngs(3))


class Forgetful(easydel.LlamaForCausalLM):
    """A Llama that takes no cache."""

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        return super().__call__(input_ids=input_ids, attention_mask=attention_mask).logits


@functools.cache
def forgetful() -> Forgetful:
    """Return `llama()` without a cache."""
    model = Forgetful(llama().config, rngs=nnx.Rngs(3))
    return model.merge_params(llama().split_params())


class PlainConfig(EasyDeLBaseConfig):
    model_type = "plain-of-generation-tests"

    def __init__(self, vocab_size: int = VOCAB, kind: str = "causal", **kwargs: Any) -> None:
        self.vocab_size, self.kind = vocab_size, kind
        super().__init__(**kwargs)


class Plain(EasyDeLBaseModule):
    """A model without a cache, of plain nnx layers.

    Kinds: "causal" sums what came before; "masked" sees all tokens that the mask keeps; "blind" sees everything.
    """

    def __init__(self, config: PlainConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config)
        self.embed = nnx.Embed(config.vocab_size, 16, rngs=rngs)
        self.mix = nnx.Linear(16, 16, rngs=rngs)
        self.head = nnx.Linear(16, config.vocab_size, rngs=rngs)

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        x = self.embed(input_ids) * 5
        if self.config.kind == "masked" and attention_mask is not None:
            x = x * attention_mask[..., None]
        seen = (
            jnp.cumsum(x, axis=1)
            if self.config.kind == "causal"
            else jnp.broadcast_to(x.sum(1, keepdims=True), x.shape)
        )
        return self.head(jnp.tanh(self.mix(x) + seen)) * 4


@functools.cache
def plain(kind: str) -> Plain:
    return Plain(PlainConfig(kind=kind), nnx.Rngs(0))
