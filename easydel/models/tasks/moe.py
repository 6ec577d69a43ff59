"""Language models whose backbone is a mixture of experts."""

from __future__ import annotations

from typing import Any

from easydel.loss import load_balancing_loss
from easydel.models.tasks.causal_lm import CausalLM
from easydel.outputs import ModelOutput


class MoECausalLM(CausalLM):
    """A `CausalLM` whose output also has `.auxiliary_loss`, the balancing loss, where it or router logits are wanted.

    With labels it is added to the loss: times `loss_config.auxiliary_loss_coefficient` if there is one, else, where
    `output_router_logits` (the argument, or without it the config's), times `config.router_aux_loss_coef`.
    """

    def run(self, inputs: dict[str, Any], loss_config: Any) -> ModelOutput:
        """Run the backbone and the head."""
        asked = inputs.get("output_router_logits")
        asked = self.config.output_router_logits if asked is None else asked
        weighed = getattr(loss_config, "auxiliary_loss_coefficient", None) is not None
        if not (asked or weighed):
            return super().run(inputs, loss_config)
        out: Any = super().run(inputs | {"output_router_logits": True}, loss_config)
        top_k = self.config.num_experts_per_tok
        balance = load_balancing_loss(out.router_logits, top_k, inputs.get("attention_mask"))
        return out.replace(auxiliary_loss=balance, router_logits=out.router_logits if asked else None)
