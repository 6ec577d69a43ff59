"""A backbone and a head."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.infra.base_module import EasyDeLBaseModule
from easydel.layers.linear import Linear, normal_init
from easydel.outputs import ModelOutput


class TaskModule(EasyDeLBaseModule):
    """A backbone and a head; it takes what its backbone takes.

    A family's class sets `backbone_class`; the backbone is held under `base_model_prefix`, as in transformers. A task
    defines `_add_head` and `head`.
    """

    backbone_class: ClassVar[type[EasyDeLBaseModule]]
    base_model_prefix: ClassVar[str] = "model"

    def __init__(
        self,
        config: Any,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        super().__init__(config, dtype, param_dtype, precision, rngs)
        rngs = nnx.Rngs(0) if rngs is None else rngs
        backbone = self.backbone_class(config, dtype, param_dtype, precision, rngs)
        setattr(self, self.base_model_prefix, backbone)
        self._add_head(rngs)

    @property
    def base_model(self) -> Any:
        """The model without its head, under the name that it has in transformers for every family."""
        return getattr(self, self.base_model_prefix)

    @property
    def longest_sequence(self) -> int | None:
        """The longest sequence the model can take at all; `None`: any."""
        return getattr(self.base_model, "longest_sequence", None)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        inputs_embeds: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Any = None,
        labels: jax.Array | None = None,
        loss_config: Any = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **inputs: Any,
    ) -> Any:
        """Run the backbone and the head.

        Arguments are the backbone's (one that it lacks is not taken), and `labels`, which give `.loss` as the task
        says, computed as a `LossConfig` in `loss_config` says.
        """
        inputs |= {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "segment_ids": segment_ids,
            "cache": cache,
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
        }
        return self.run({name: value for name, value in inputs.items() if value is not None}, loss_config)

    def run(self, inputs: dict[str, Any], loss_config: Any) -> ModelOutput:
        """Run the backbone and the head; a task whose `loss_config` asks more of the forward pass overrides it."""
        del loss_config
        out = self.base_model(**inputs)
        return self.head(out, inputs.get("input_ids"), inputs.get("attention_mask"))

    def head(self, out: Any, input_ids: jax.Array | None, attention_mask: jax.Array | None) -> ModelOutput:
        """Turn the backbone's output into the task's."""
        raise TypeError(f"{type(self).__name__} must define head")

    def _add_head(self, rngs: nnx.Rngs) -> None:
        raise TypeError(f"{type(self).__name__} must define _add_head")

    def _linear(
        self,
        features_out: int,
        rngs: nnx.Rngs,
        use_bias: bool = False,
        stddev: float | None = None,
        roles: tuple[str | None, str | None] = (None, None),
    ) -> Linear:
        return Linear(
            getattr(self.base_model, "token_size", self.config.hidden_size),
            features_out,
            roles=roles,
            use_bias=use_bias,
            kernel_init=normal_init(self.config.initializer_range if stddev is None else stddev),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            rngs=rngs,
        )
