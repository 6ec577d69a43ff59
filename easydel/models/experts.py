"""What decoders with mixtures of experts share."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec

from easydel.caching import Cache
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
        (r"mlp/gate/kernel", PartitionSpec("fsdp", None)),
        *decoder_rules(),
    )
