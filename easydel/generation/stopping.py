"""When a row ends: end-of-text tokens, stop strings, the caller's own functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easydel.generation.options import GenerationOptions
from easydel.generation.processors.ids import id_set
from easydel.generation.stop_strings import stop_table
from easydel.generation.written import Written


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stopping:
    """What ends a row.

    Attributes:
        eos_token_ids: int32 `[n]`, padded with `NO_TOKEN`.
        moves: of the stop strings' automaton, int32 `[states, vocab]`; `None`: there are none.
        criteria: functions `(input_ids, scores) -> bool [rows]`, given the tokens so far, the last among them, as own
            logits processors are, and the scores it was chosen from (static).
    """

    eos_token_ids: Any
    moves: Any
    criteria: tuple[Callable[[jax.Array, jax.Array], Any], ...] = field(metadata={"static": True})

    @classmethod
    def create(cls, options: GenerationOptions, ids: Any, mask: Any, vocab_size: int | None) -> tuple[Stopping, Any]:
        """Return what ends rows, and the automaton's states after the prompts, int32 `[batch]` (`None`: no strings)."""
        moves = states = None
        if options.stop_strings:
            table = stop_table(options.tokenizer, options.stop_strings, vocab_size or 0)
            moves, states = table.on_device, table.states_after(ids, mask)
        return cls(id_set(options.eos_token_ids), moves, options.stopping_criteria), states

    def ends(
        self, tokens: jax.Array, states: Any, written: Callable[[], Written], scores: Callable[[], jax.Array]
    ) -> tuple[jax.Array, Any]:
        """Say which rows end with their last token.

        Args:
            tokens: int32 `[rows]`, just chosen.
            states: of the automaton before them, int32 `[rows]`, or `None`.
            written: gives all tokens, those included.
            scores: gives what they were chosen from, `[rows, vocab]`.

        Returns:
            Bool `[rows]`, and the states after the tokens.

        Raises:
            ValueError: a function gives something of another shape.
        """
        ended = ((tokens[:, None] == self.eos_token_ids) & (tokens[:, None] >= 0)).any(axis=-1)
        if self.moves is not None:
            moves = jnp.asarray(self.moves)[states, tokens]
            ended, states = ended | (moves < 0), jnp.where(moves < 0, -1 - moves, moves)
        for function in self.criteria:
            given = function(written().last(written().tokens.shape[1]), scores())
            if np.shape(given) != ended.shape:
                name = getattr(function, "__name__", type(function).__name__)
                raise ValueError(
                    f"stopping_criteria {name} must return bool {list(ended.shape)}, one for each row; "
                    f"got shape {list(np.shape(given))}"
                )
            ended |= jnp.asarray(given, bool)
        return ended, states
