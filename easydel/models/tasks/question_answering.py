"""Models that mark the answer to a question in a text."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from easydel.models.tasks.base import TaskModule
from easydel.outputs import ModelOutput, QuestionAnsweringOutput


class QuestionAnswering(TaskModule):
    """Scores every token as the first and as the last of the answer."""

    can_generate: ClassVar[bool] = False
    output_class: ClassVar[type[Any]] = QuestionAnsweringOutput
    reads_num_labels: ClassVar[bool] = True
    """Whether the config's `num_labels` must be 2; a family whose configs say something else has 2 all the same."""

    def _add_head(self, rngs: nnx.Rngs) -> None:
        if self.reads_num_labels and self.config.num_labels != 2:
            raise ValueError(f"question answering needs num_labels=2 (start and end), got {self.config.num_labels}")
        self.qa_outputs = self._linear(2, rngs, use_bias=True)

    def __call__(  # type: ignore[override]  # the labels come first here, as in transformers
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        start_positions: jax.Array | None = None,
        end_positions: jax.Array | None = None,
        labels: jax.Array | None = None,
        loss_config: Any = None,
        **inputs: Any,
    ) -> Any:
        """Run the backbone and the head.

        Args:
            input_ids: int32 `[batch, seq]`.
            attention_mask: 0 where a token is padding, `[batch, seq]`.
            start_positions: int32 `[batch]`, the place of the answer's first token; gives `.loss` with
                `end_positions`. One past the sequence does not count.
            end_positions: int32 `[batch]`, the place of its last token.
            labels: both of them as one array `[batch, 2]`.
            loss_config: how the loss is computed.
            **inputs: what else the backbone takes.
        """
        if (start_positions is None) != (end_positions is None):
            raise ValueError("give both start_positions and end_positions, or neither")
        if start_positions is not None:
            places = [jnp.asarray(places).reshape(-1) for places in (start_positions, end_positions)]
            labels = jnp.stack(places, axis=-1)
        return super().__call__(input_ids, attention_mask, labels=labels, loss_config=loss_config, **inputs)

    def head_input(self, hidden: jax.Array) -> jax.Array:
        """Map the backbone's hidden states `[batch, seq, hidden]` to what `qa_outputs` is given: they stay."""
        return hidden

    def head(self, out: Any, input_ids: jax.Array | None, attention_mask: jax.Array | None) -> ModelOutput:
        """Turn the backbone's output into logits `[batch, seq]` of start and end."""
        logits = self.qa_outputs(self.head_input(out.last_hidden_state))
        return self.output_class(start_logits=logits[..., 0], end_logits=logits[..., 1], **out.carried())
