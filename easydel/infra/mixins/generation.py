"""`EasyGenerationMixin`: text from a model."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, overload

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

    def generate(
        self, input_ids: Any, attention_mask: Any = None, *, streamer: Any = None, **options: Any
    ) -> GenerationOutput:
        """Continue prompts.

        The prompt and the whole loop run compiled, with the cache updated in place. Prompts run in pieces of few sizes,
        so that new lengths rarely compile anything.

        Args:
            input_ids: int `[batch, seq]`; of a model with an encoder, what that reads.
            attention_mask: 0 where a token is padding, left or right, `[batch, seq]`.
            streamer: such as transformers' `TextStreamer`: its `put` is given the prompt, int32 `[batch, seq]`, and the
                tokens of each step, int32 `[rows]`, as they are made; then its `end` is called. Not with beams.
            **options: those of transformers' `GenerationConfig`, all of them in `easydel.generation.GenerationOptions`:
                lengths (`max_new_tokens`, `min_new_tokens`, `eos_token_id`, `pad_token_id`, `stop_strings`, …),
                sampling (`do_sample`, `temperature`, `top_k`, `top_p`, `min_p`, `seed`, …), beams (`num_beams`,
                `length_penalty`, `early_stopping`), penalties and bans, `num_return_sequences`, `output_scores`,
                `output_logits`; further `frequency_penalty` and `presence_penalty`, and functions of your own as
                `logits_processor` and `stopping_criteria`; `cache_implementation="quantized"` keeps keys and values as
                int8. A sampling knob without `do_sample` means sampling; what is
                not given comes from `generation_config=`, else the model's. Without a knob nothing is filtered. A model
                with an encoder also takes `decoder_input_ids` with `decoder_attention_mask`, or
                `decoder_start_token_id`: what it continues. `cache=` gives a `Cache` that holds the first tokens of
                the prompts, of which `input_ids` are the whole; of one row it serves all of them.

        Returns:
            An object with `.sequences`, int32 `[batch, seq + new]`: the prompt as given and the new tokens, padded
            after an end-of-text token; further fields as asked for, see `easydel.outputs.GenerationOutput`. Of a model
            with an encoder the prompt is the decoder's: its start token.

        Raises:
            UnsupportedError: an option that is not offered; it is named.
            ValueError: a value out of range, or prompts that do not fit.
        """
        from easydel.generation import generate

        return generate(self, input_ids, attention_mask, streamer=streamer, **options)

    @overload
    def stream(
        self, input_ids: Any, attention_mask: Any = None, *, tokenizer: None = None, **options: Any
    ) -> Generator[np.ndarray]: ...

    @overload
    def stream(
        self, input_ids: Any, attention_mask: Any = None, *, tokenizer: Any, **options: Any
    ) -> Generator[str]: ...

    def stream(
        self, input_ids: Any, attention_mask: Any = None, *, tokenizer: Any = None, **options: Any
    ) -> Generator[Any]:
        """Continue prompts and yield text, or without a tokenizer the tokens of each step, as they are made.

        The tokens are those of `generate`. The loop runs compiled, a few tokens at a time between two looks at it; when
        the generator is closed, nothing is left running. It ends when every row has ended.

        Args:
            input_ids: as of `generate`.
            attention_mask: likewise.
            tokenizer: of transformers: text is yielded then, of one prompt and one answer, without special tokens, in
                pieces that are not empty and do not change any more: no character is split. Also for `stop_strings`.
            **options: as of `generate`, but no beams and nothing to record.

        Returns:
            A generator of strings, or of int32 `[rows]`.

        Raises:
            UnsupportedError: as `generate`.
            ValueError: as `generate`; an option that has no settled tokens; text of several rows. All of them at once,
                before anything is computed.
        """
        from easydel.generation import stream

        return stream(self, input_ids, attention_mask, tokenizer=tokenizer, **options)

    def generate_many(
        self, prompts: Sequence[Any], *, batch_size: int = 16, progress: bool = False, **options: Any
    ) -> list[np.ndarray]:
        """Continue any number of prompts of any lengths, `batch_size` at a time.

        A row is given to the next prompt as soon as its answer ends. Sizes are fixed by the longest prompt and answer,
        so a handful of programs serve all.

        Args:
            prompts: int `[seq]` each, without padding.
            batch_size: answers that are written side by side.
            progress: whether a bar is shown.
            **options: those of `generate` that do not look back at a row's tokens: lengths, sampling, suppressed tokens
                and the cache's kind. `max_new_tokens` and `seed` may be lists, one for each prompt; one `seed` is the
                first prompt's, the next has the next.

        Returns:
            For each prompt, in order, what `generate` would add to it alone: int32 `[new]`, the end-of-text token
            included. Where two tokens are equally likely up to rounding they may differ.

        Raises:
            UnsupportedError: an option that is not offered here, or a model without a cache or with an encoder.
            ValueError: prompts or options that do not fit.
        """
        from easydel.generation import generate_many

        return generate_many(self, prompts, batch_size=batch_size, progress=progress, **options)

    def iterate_many(
        self, prompts: Sequence[Any], *, batch_size: int = 16, **options: Any
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Do what `generate_many` does and yield each answer as it ends, with its prompt's place in the list.

        Those that may become longest begin first.
        """
        from easydel.generation import iterate_many

        return iterate_many(self, prompts, batch_size=batch_size, **options)
