"""Language models whose backbone is a mixture of experts."""

from __future__ import annotations

from typing import Any

from easydel.errors import UnsupportedError
from easydel.loss import load_balancing_loss, router_z_loss
from easydel.models.tasks.causal_lm import CausalLM
from easydel.outputs import ModelOutput


class MoECausalLM(CausalLM):
    """A `CausalLM` whose output also has `.auxiliary_loss`, the balancing loss, where it or router logits are wanted.

    With labels it is added to the loss: times `loss_config.auxiliary_loss_coefficient` if there is one, else, where
    `output_router_logits` (the argument, or without it the config's), times `config.router_aux_loss_coef`. With a
    `loss_config.router_z_loss_coefficient` there is `.router_z_loss`, too.
    """

    def run(self, inputs: dict[str, Any], loss_config: Any) -> ModelOutput:
        """Run the backbone and the head."""
        asked = inputs.get("output_router_logits")
        asked = self.config.output_router_logits if asked is None else asked
        weighed = getattr(loss_config, "auxiliary_loss_coefficient", None) is not None
        with_z = bool(getattr(loss_config, "router_z_loss_coefficient", 0.0))
        if not (asked or weighed or with_z):
            return super().run(inputs, loss_config)
        out: Any = super().run(inputs | {"output_router_logits": True}, loss_config)
        said, mask = out.router_logits, inputs.get("attention_mask")
        return out.replace(
            auxiliary_loss=load_balancing_loss(said, self.config.num_experts_per_tok, mask)
            if asked or weighed
            else None,
            router_z_loss=router_z_loss(said, mask) if with_z else None,
            router_logits=said if asked else None,
        )


class RoutedCausalLM(CausalLM):
    """A `CausalLM` with experts that no balancing loss is known for: router logits are given if they are asked for.

    The balancing loss is about the experts of the largest softmax, and others are chosen here.
    """

    def run(self, inputs: dict[str, Any], loss_config: Any) -> ModelOutput:
        """Run the backbone and the head.

        Raises:
            UnsupportedError: `loss_config` weighs a balancing or z-loss.
        """
        for name in ("auxiliary_loss_coefficient", "router_z_loss_coefficient"):
            if weight := getattr(loss_config, name, None):
                raise UnsupportedError(f"{name}={weight} is not supported by {type(self).__name__}: leave it out")
        return super().run(inputs, loss_config)
