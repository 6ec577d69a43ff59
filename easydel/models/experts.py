"""What decoders with mixtures of experts share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from easydel.caching import Cache
from easydel.hub.weight_map import TRANSPOSE, Permute, Split, Stack, WeightRule
from easydel.layers import GatedMLP, SparseMoE, mlp_fields
from easydel.layers.moe import CorrectedRouter, Router
from easydel.models.decoder import Decoder, decoder_rules
from easydel.outputs import BaseModelOutput
from easydel.sharding import PartitionRules


class MoEDecoder(Decoder):
    """A `Decoder` that also gives, if asked, what the routers of its layers say."""

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
    ) -> BaseModelOutput:
        """Run the backbone; see `Decoder`.

        Args:
            input_ids: see `Decoder`, as the others.
            attention_mask: see there.
            position_ids: see there.
            inputs_embeds: see there.
            segment_ids: see there.
            cache: see there.
            output_hidden_states: see there.
            output_attentions: see there.
            output_router_logits: also return each layer's router logits; `None`: as the config says.
        """
        out: Any = super().__call__(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            segment_ids,
            cache,
            output_hidden_states,
            output_attentions,
        )
        asked = self.config.output_router_logits if output_router_logits is None else output_router_logits
        return out if asked else out.replace(router_logits=None)


def expert_rules() -> PartitionRules:
    """Return `decoder_rules` and those of experts: they over `ep`, their width over `tp`, the other side `fsdp`."""
    return (
        (r"mlp/experts/(gate|up)_proj/kernel", PartitionSpec("ep", "fsdp", "tp")),
        (r"mlp/experts/down_proj/kernel", PartitionSpec("ep", "tp", "fsdp")),
        (r"mlp/(gate|shared_expert_gate)/kernel", PartitionSpec("fsdp", None)),
        (r"shared_experts?/(gate|up)_proj/kernel", PartitionSpec("fsdp", "tp")),
        (r"shared_experts?/down_proj/kernel", PartitionSpec("tp", "fsdp")),
        (r"mlp/experts/(gate|up)_bias", PartitionSpec("ep", "tp")),
        (r"mlp/experts/down_bias", PartitionSpec("ep", None)),
        (r"self_attn/sinks", PartitionSpec()),
        (r"self_attn/(q_a_proj|kv_a_proj_with_mqa)/kernel", PartitionSpec("fsdp", None)),
        (r"self_attn/(q|kv)_b_proj/kernel", PartitionSpec("fsdp", "tp")),
        *decoder_rules(),
    )


def sparse_layers(config: Any) -> list[bool]:
    """Return which layers have experts: each `decoder_sparse_step`-th one, but for those in `mlp_only_layers`."""
    return [
        config.num_experts > 0 and n not in config.mlp_only_layers and (n + 1) % config.decoder_sparse_step == 0
        for n in range(config.num_hidden_layers)
    ]


def behind_dense_layers(config: Any) -> list[bool]:
    """Return which layers have experts: all but the `first_k_dense_replace` first ones."""
    return [n >= config.first_k_dense_replace for n in range(config.num_hidden_layers)]


def shared_and_routed(config: Any, make_router: Callable[..., Router], *, use_bias: bool, **options: Any) -> SparseMoE:
    """Make `n_routed_experts` beside `n_shared_experts`, which are one wide MLP, as DeepSeek names the fields.

    Args:
        config: the model's.
        make_router: as of `SparseMoE`.
        use_bias: whether the shared experts have biases.
        **options: of all layers.

    Raises:
        ValueError: it is not said how many experts a token goes to.
    """
    if config.num_experts_per_tok is None:
        raise ValueError("num_experts_per_tok must be a number, got None")
    fields = mlp_fields(config) | {"intermediate_size": config.moe_intermediate_size}
    shared = fields | {"intermediate_size": config.moe_intermediate_size * config.n_shared_experts}
    return SparseMoE(
        **fields,
        num_experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        make_router=make_router,
        mechanism=config.moe_mechanism,
        shared_experts=GatedMLP(**shared, use_bias=use_bias, **options),
        **options,
    )


def corrected_router(config: Any) -> Callable[..., Router]:
    """Return what makes the router of DeepSeek-V3's fields."""
    groups = {"groups": config.n_group, "top_groups": config.topk_group}
    if None in groups.values():
        raise ValueError(f"n_group={config.n_group} and topk_group={config.topk_group} must be numbers; 1 is no limit")

    def make(*args: Any, **options: Any) -> Router:
        options |= {"normalize": config.norm_topk_prob, "scaling": config.routed_scaling_factor, **groups}
        return CorrectedRouter(*args, **options)

    return make


GATE, UP, DOWN = (f"mlp/experts/{name}_proj/kernel" for name in ("gate", "up", "down"))


def expert_weights(
    files: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"), module: str = "mlp", memory: str = "mlp"
) -> tuple[WeightRule, ...]:
    """Return the rules of experts that files hold one by one, and transformers' model in memory stacked and fused.

    Args:
        files: names of gate, up and down in files.
        module: what the mixture is called there.
        memory: what transformers' model calls it.
    """
    start = f"{module}.experts.{{e}}."
    one_by_one = (
        WeightRule(f"{start}{name}.weight", kernel, Stack(TRANSPOSE), form="file")
        for name, kernel in zip(files, (GATE, UP, DOWN), strict=True)
    )
    return (*one_by_one, *fused_experts(f"{memory}.experts.gate_up_proj", f"{memory}.experts.down_proj", form="memory"))


def fused_experts(gate_up: str, down: str, form: str | None = None) -> tuple[WeightRule, ...]:
    """Return the rules of stacked experts: `gate_up` `[experts, 2 · width, hidden]`, `down` `[…, hidden, width]`."""
    stacked = Permute((0, 2, 1))
    return (
        WeightRule(gate_up, (GATE, UP), Split(axis=1, inner=stacked), form=form),
        WeightRule(down, DOWN, stacked, form=form),
    )
