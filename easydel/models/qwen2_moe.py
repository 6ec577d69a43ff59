"""Qwen2 MoE (arXiv:2407.10671): a mixture of experts beside one expert that every token goes to, behind a gate."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import transformers
from flax import nnx

from easydel.errors import UnsupportedError
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.registry import TaskType, register_config, register_module
from easydel.layers import Attention, GatedMLP, PreNormBlock, SparseMoE, attention_fields, mlp_fields
from easydel.layers.linear import normal_init
from easydel.models.decoder import layer_types, window_of
from easydel.models.experts import MoEDecoder, expert_rules, expert_weights, sparse_layers
from easydel.models.tasks import DecoderTokenClassifier, MoECausalLM, QuestionAnswering, SequenceClassifier
from easydel.sharding import PartitionRules, at_use


@register_config("qwen2_moe")
class Qwen2MoeConfig(EasyDeLBaseConfig, transformers.Qwen2MoeConfig):
    """Fields of `transformers.Qwen2MoeConfig`, and this library's runtime settings."""

    def get_partition_rules(self) -> PartitionRules:
        """Split experts over `ep`, heads and widths over `tp`, the other side over `fsdp`."""
        return expert_rules()


class SharedGate(nnx.Module):
    """What the shared expert's result is multiplied by: `sigmoid(x · kernel)`, kernel `[hidden, 1]`.

    Like a router no `Linear`, so that neither quantization nor LoRA takes it for one.
    """

    def __init__(
        self, hidden_size: int, *, init_stddev: float, dtype: Any, param_dtype: Any, precision: Any, rngs: nnx.Rngs
    ) -> None:
        self.kernel = nnx.Param(normal_init(init_stddev)(rngs.params(), (hidden_size, 1), param_dtype))
        self.dtype, self.precision = dtype, precision

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[batch, seq, hidden]` to `[batch, seq, 1]`."""
        kernel = at_use(self.kernel.get_value().astype(self.dtype), x, None, None)
        return jax.nn.sigmoid(jnp.dot(x.astype(self.dtype), kernel, precision=self.precision))


class Qwen2MoeMLP(SparseMoE):
    """Experts that tokens are routed to, and a shared one."""

    def __init__(self, config: Qwen2MoeConfig, **options: Any) -> None:
        fields = mlp_fields(config)
        super().__init__(
            **fields | {"intermediate_size": config.moe_intermediate_size},
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            normalize=config.norm_topk_prob,
            mechanism=config.moe_mechanism,
            **options,
        )
        shared = fields | {"intermediate_size": config.shared_expert_intermediate_size}
        self.shared_expert = GatedMLP(**shared, **options)
        self.shared_expert_gate = SharedGate(config.hidden_size, init_stddev=config.initializer_range, **options)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map `[batch, seq, hidden]` to the same shape, and what the router says, `[batch, seq, experts]`."""
        mixed, router_logits = super().__call__(x)
        return mixed + self.shared_expert_gate(x) * self.shared_expert(x), router_logits


class Qwen2MoeBlock(PreNormBlock):
    """One layer; its kind is its attention's, and whether it has experts."""

    def __init__(
        self, config: Qwen2MoeConfig, kind: tuple[str, bool], *, dtype: Any, param_dtype: Any, **options: Any
    ) -> None:
        options |= {"dtype": dtype, "param_dtype": param_dtype}
        layer_type, is_sparse = kind
        if layer_type == "sliding_attention" and not config.sliding_window:
            raise UnsupportedError(
                "layer_types with 'sliding_attention' but no window is not supported: give use_sliding_window=True and "
                f"a sliding_window, got {config.sliding_window}"
            )
        window = window_of(config, layer_type)
        super().__init__(
            Attention(**attention_fields(config), qkv_bias=config.qkv_bias, window=window, **options),
            Qwen2MoeMLP(config, **options) if is_sparse else GatedMLP(**mlp_fields(config), **options),
            hidden_size=config.hidden_size,
            epsilon=config.rms_norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
        )


@register_module(TaskType.BASE, config=Qwen2MoeConfig)
class Qwen2MoeModel(MoEDecoder):
    """The Qwen2 MoE backbone."""

    block_class = Qwen2MoeBlock
    weight_map = expert_weights()

    @staticmethod
    def layer_kinds(config: Qwen2MoeConfig) -> list[tuple[str, bool]]:
        """Return each layer's kind of attention, and whether it has experts."""
        return list(zip(layer_types(config), sparse_layers(config), strict=True))


@register_module(TaskType.CAUSAL_LM, config=Qwen2MoeConfig)
class Qwen2MoeForCausalLM(MoECausalLM):
    """Qwen2 MoE with a language-model head."""

    backbone_class = Qwen2MoeModel


@register_module(TaskType.SEQUENCE_CLASSIFICATION, config=Qwen2MoeConfig)
class Qwen2MoeForSequenceClassification(SequenceClassifier):
    """Qwen2 MoE with a classification head on the last token."""

    backbone_class = Qwen2MoeModel


@register_module(TaskType.TOKEN_CLASSIFICATION, config=Qwen2MoeConfig)
class Qwen2MoeForTokenClassification(DecoderTokenClassifier):
    """Qwen2 MoE with a classification head on every token."""

    backbone_class = Qwen2MoeModel


@register_module(TaskType.QUESTION_ANSWERING, config=Qwen2MoeConfig)
class Qwen2MoeForQuestionAnswering(QuestionAnswering):
    """Qwen2 MoE that marks the answer to a question."""

    backbone_class = Qwen2MoeModel
