"""Phi-3.5 MoE (arXiv:2404.14219): two experts for each token, each chosen by SparseMixer; norms with biases."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx

from easydel.errors import UnsupportedError
from easydel.hub.weight_map import TRANSPOSE, WeightRule
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import (
    Attention,
    PreNormBlock,
    RotaryEmbedding,
    SparseMoE,
    attention_fields,
    layer_norm,
    mlp_fields,
)
from easydel.layers.moe import Router
from easydel.models.experts import MoEDecoder, expert_rules, expert_weights
from easydel.models.tasks import MoECausalLM, SequenceClassifier
from easydel.sharding import PartitionRules


@register_config("phimoe")
class PhimoeConfig(EasyDeLBaseConfig, transformers.PhimoeConfig):
    """Fields of `transformers.PhimoeConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split experts over `ep`, heads and widths over `tp`, the other side over `fsdp`."""
        return expert_rules()


class SparseMixer(Router):
    """Chooses two experts one after the other (SparseMixer-v2, arXiv:2409.12136).

    The best of the experts that are left is taken; its weight is its probability among those whose logits come near
    (within twice `jitter`, relatively). In training it is drawn by these probabilities, and a weight whose expert is
    not the best is a third of itself in three of four cases (Heun's third-order method), with the gradient of the
    whole.

    Args:
        *args: as of `Router`.
        jitter: how far from the best an expert may be.
        **options: as of `Router`; `top_k` must be 2.

    Raises:
        UnsupportedError: another `top_k`.
    """

    def __init__(self, *args: Any, jitter: float, rngs: nnx.Rngs, **options: Any) -> None:
        if options["top_k"] != 2:
            raise UnsupportedError(f"num_experts_per_tok={options['top_k']} is not supported: SparseMixer chooses two")
        super().__init__(*args, rngs=rngs, **options)
        self.jitter, self.deterministic = jitter, True
        self.rngs = rngs["dropout"].fork()

    def choose(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return weights and numbers of the experts, `[batch, seq, 2]`, given float32 `[batch, seq, experts]`."""
        first_weight, first = self._pick(logits, logits)
        taken = first[..., None] == jnp.arange(logits.shape[-1])
        second_weight, second = self._pick(logits, jnp.where(taken, -jnp.inf, logits))
        return jnp.stack([first_weight, second_weight], axis=-1), jnp.stack([first, second], axis=-1)

    def _pick(self, logits: jax.Array, left: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the weight and number of one of the experts whose logits are `left`, each `[batch, seq]`."""
        best = jax.lax.stop_gradient(left.max(axis=-1, keepdims=True))
        fixed = jax.lax.stop_gradient(logits)
        is_far = (best - fixed) / jnp.maximum(jnp.abs(fixed), best) > 2 * self.jitter
        near = jnp.where(is_far, -jnp.inf, left)
        probabilities = jax.nn.softmax(near, axis=-1)
        if self.deterministic:
            chosen = jnp.argmax(left, axis=-1)
        else:
            chosen = jnp.argmax(near + jax.random.gumbel(self.rngs(), near.shape), axis=-1)
        weight = jnp.take_along_axis(probabilities, chosen[..., None], axis=-1)[..., 0]
        if not self.deterministic:
            is_whole = (chosen == jnp.argmax(near, axis=-1)) | (jax.random.uniform(self.rngs(), chosen.shape) > 0.75)
            weight = weight - jax.lax.stop_gradient(jnp.where(is_whole, 0.0, weight * (2 / 3)))
        return weight, chosen.astype(jnp.int32)


class PhimoeMLP(SparseMoE):
    """Experts behind a `SparseMixer`; noise on the input is drawn twice, as in transformers."""

    def __init__(self, config: PhimoeConfig, **options: Any) -> None:
        super().__init__(
            **mlp_fields(config),
            num_experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            jitter=config.input_jitter_noise,
            make_router=functools.partial(SparseMixer, jitter=config.router_jitter_noise),
            mechanism=config.moe_mechanism,
            **options,
        )

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map `[batch, seq, hidden]` to the same shape, and what the router says, `[batch, seq, experts]`."""
        return super().__call__(x if self.jitter is None else self.jitter(x))


class PhimoeRotary(RotaryEmbedding):
    """Scaled positions whose cosines and sines are multiplied by `short_mscale`, in long sequences by `long_mscale`.

    As in transformers' model the frequencies of short sequences serve long ones, too (its `longrope` has others, which
    it does not use).
    """

    def frequencies(self, positions: jax.Array) -> tuple[jax.Array | np.ndarray, Any]:
        """Return inverse frequencies, float32 `[dim / 2]`, and the factor of cosines and sines, at these positions."""
        frequencies, scaling = self._inverse_frequencies()
        if self.rope_type == "default":
            return frequencies, scaling
        settings = self.settings
        is_long = jnp.max(positions) + 1 > settings["original_max_position_embeddings"]
        return frequencies, jnp.where(is_long, settings["long_mscale"], settings["short_mscale"])


class PhimoeBlock(PreNormBlock):
    """One layer; all have the same window."""

    def __init__(self, config: PhimoeConfig, layer_type: str, *, dtype: Any, param_dtype: Any, **options: Any) -> None:
        del layer_type  # all layers are alike
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        bias, window = config.attention_bias, config.sliding_window
        super().__init__(
            Attention(**attention_fields(config), qkv_bias=bias, out_bias=bias, window=window, **options),
            PhimoeMLP(config, **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            norm=layer_norm,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=PhimoeConfig)
class PhimoeModel(MoEDecoder):
    """The Phi-3.5 MoE backbone."""

    block_class = PhimoeBlock
    weight_map = (
        *expert_weights(("w1", "w3", "w2"), module="block_sparse_moe"),
        WeightRule("block_sparse_moe.gate.weight", "mlp/gate/kernel", TRANSPOSE, form="file"),
        WeightRule("mlp.router.weight", "mlp/gate/kernel", TRANSPOSE, form="memory"),
    )

    def make_norm(self) -> nnx.LayerNorm:
        """Make the norm after the last layer."""
        return layer_norm(self.config.hidden_size, self.config.rms_norm_eps, **self.dtypes)

    def make_rotary(self) -> PhimoeRotary:
        """Make the rotary positions of all layers."""
        return PhimoeRotary(
            self.config.rope_parameters,
            head_dim=attention_fields(self.config)["head_dim"],
            max_position_embeddings=self.config.max_position_embeddings,
            partial=False,
        )


@register_module(TaskType.CAUSAL_LM, config=PhimoeConfig)
class PhimoeForCausalLM(MoECausalLM):
    """Phi-3.5 MoE with a language-model head, which may have a bias."""

    backbone_class = PhimoeModel

    def _add_head(self, rngs: nnx.Rngs) -> None:
        config = self.config
        if not config.tie_word_embeddings:
            self.lm_head = self._linear(config.vocab_size, rngs, config.lm_head_bias, roles=(None, "vocab"))
        elif config.lm_head_bias:
            raise UnsupportedError("lm_head_bias=True with tie_word_embeddings=True is not supported")


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=PhimoeConfig)
class PhimoeForSequenceClassification(SequenceClassifier):
    """Phi-3.5 MoE with a classification head on the last token."""

    backbone_class = PhimoeModel
