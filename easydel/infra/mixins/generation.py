"""`EasyGenerationMixin`: text from a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from easydel.outputs import GenerationOutput

if TYPE_CHECKING:
    from transformers import GenerationConfig


class EasyGenerationMixin:
    """Generates tokens, with the defaults of the model's `generation_config`."""

    config: Any
    can_generate: ClassVar[bool] = True
    """Whether the class predicts a next token at all, as far as is known before it is asked."""
    generation_settings: str | None = None
    """The generation config as JSON: a string, so that it can be part of the module's static structure."""

    @property
    def generation_config(self) -> GenerationConfig | None:
        """A copy of the defaults for `generate` (from `generation_config.json`); assign to change them."""
        from transformers import GenerationConfig

        return None if self.generation_settings is None else GenerationConfig(**json.loads(self.generation_settings))

    @generation_config.setter
    def generation_config(self, config: GenerationConfig | None) -> None:
        settings = None if config is None else config.to_diff_dict()
        self.generation_settings = None if settings is None else json.dumps(settings, sort_keys=True)

    def generate(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> GenerationOutput:
        """Continue prompts.

        The prompt and the whole loop run compiled, with the cache updated in place. Prompt lengths are rounded up to
        few sizes, so that new lengths rarely compile anything.

        Args:
            input_ids: int `[batch, seq]`; of a model with an encoder, what that reads.
            attention_mask: 0 where a token is padding, left or right, `[batch, seq]`.
            **options: as in transformers: `max_new_tokens` or `max_length`, `min_new_tokens`, `do_sample`,
                `temperature`, `top_k`, `top_p`, `eos_token_id` (one or several), `pad_token_id`, and `seed`;
                `cache_implementation="quantized"` keeps keys and values as int8. A sampling knob without `do_sample`
                means sampling; what is not given comes from `generation_config=`, else the
                model's. Without `top_k` and `top_p` nothing is filtered. A model with an encoder also takes
                `decoder_input_ids` with `decoder_attention_mask`, or `decoder_start_token_id`: what it continues.

        Returns:
            An object with `.sequences`, int32 `[batch, seq + new]`: the prompt as given and the new tokens, padded
            after an end-of-text token. Of a model with an encoder the prompt is the decoder's: its start token.

        Raises:
            UnsupportedError: an option that is not offered; it is named.
            ValueError: a value out of range, or prompts that do not fit.
        """
        from easydel.generation import generate

        return generate(self, input_ids, attention_mask, **options)

    def stream(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Iterator[np.ndarray]:
        """Continue prompts and yield the tokens of each step, int32 `[batch]`, as they are made.

        Takes what `generate` takes. It ends when every row has ended.
        """
        from easydel.generation import stream

        return stream(self, input_ids, attention_mask, **options)
