"""Language models with an encoder: they write an answer to what they read."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from easydel.caching import Cache
from easydel.generation.prompts import SHORTEST_PROMPT, align, bucket, check_prompt
from easydel.infra.forward import check_length
from easydel.models.inputs import shift_right, token_of
from easydel.models.tasks.vocabulary import VocabularyTask
from easydel.outputs import Seq2SeqLMOutput


class Seq2SeqLM(VocabularyTask):
    """Predicts the decoder's next token: `lm_head` on the backbone, or the embedding if `tie_word_embeddings`.

    `labels` are the tokens the decoder should write, int32 `[batch, target]`; -100 masks one. Without decoder inputs
    they also give those: the labels shifted right behind `decoder_start_token_id`, masked ones as `pad_token_id`.
    """

    output_class = Seq2SeqLMOutput

    def _add_head(self, rngs: nnx.Rngs) -> None:
        if not self.config.tie_word_embeddings:
            self.lm_head = self._linear(self.config.vocab_size, rngs, roles=(None, "vocab"))

    def __call__(  # type: ignore[override]  # it takes what a backbone with an encoder takes
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        labels: jax.Array | None = None,
        loss_config: Any = None,
        **inputs: Any,
    ) -> Seq2SeqLMOutput:
        """Run the backbone and the head; arguments are the backbone's, and `labels`, which give `.loss`."""
        if labels is not None and decoder_input_ids is None and inputs.get("decoder_inputs_embeds") is None:
            decoder_input_ids = self.shift_right(labels)
        out = self.base_model(
            input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids, **inputs
        )
        return Seq2SeqLMOutput(**self.logits_fields(out.last_hidden_state, loss_config), **out.carried())

    def compute_loss(self, *, labels: Any, logits: Any = None, config: Any = None, **inputs: Any) -> tuple[Any, Any]:
        """Compute the loss; as in the forward pass, labels also give the decoder's inputs where nothing else does."""
        beginnings = ("decoder_input_ids", "decoder_inputs_embeds")
        if logits is None and all(inputs.get(name) is None for name in beginnings):
            inputs["decoder_input_ids"] = self.shift_right(labels)
        return super().compute_loss(labels=labels, logits=logits, config=config, **inputs)

    def shift_right(self, labels: jax.Array) -> jax.Array:
        """Return the decoder's inputs for labels `[batch, target]`: at each place the label before it."""
        return shift_right(self.config, labels)

    # ------------------------------------------------------------------ generation
    def generation_inputs(
        self, input_ids: Any, attention_mask: Any, options: dict[str, Any]
    ) -> tuple[np.ndarray, Any, dict[str, np.ndarray]]:
        """Say how a generation begins.

        Args:
            input_ids: of the encoder, `[batch, source]`.
            attention_mask: 0 where one of them is padding.
            options: of `generate`; those about the beginning are taken out: `decoder_input_ids`,
                `decoder_attention_mask`, `decoder_start_token_id`.

        Returns:
            The decoder's first tokens `[batch, prompt]`, their mask, and what else the first forward pass is given:
            the encoder's inputs, padded to one of few lengths.

        Raises:
            ValueError: the encoder has fewer positions than there are tokens, or the decoder's first token is unknown.
        """
        ids, mask = check_prompt(input_ids, attention_mask, self.config.vocab_size)
        longest = int(mask.sum(axis=1).max())
        check_length(self, longest)
        ids, mask = align(ids, mask, bucket(longest, SHORTEST_PROMPT), left=False)
        prompt, prompt_mask = options.pop("decoder_input_ids", None), options.pop("decoder_attention_mask", None)
        start = options.pop("decoder_start_token_id", None)
        if prompt is None:
            sources = (self.generation_config, self.config)
            start = token_of(self.config, "decoder_start_token_id", *sources) if start is None else int(start)
            prompt = np.full((len(ids), 1), start, np.int32)
        elif len(prompt) != len(ids):
            raise ValueError(f"decoder_input_ids have {len(prompt)} rows, input_ids have {len(ids)}")
        return prompt, prompt_mask, {"input_ids": ids, "attention_mask": mask}

    def next_token_logits(
        self, target: jax.Array, target_mask: Any, cache: Cache, /, **context: Any
    ) -> tuple[jax.Array, Cache]:
        """Return the logits after the decoder's last token, `[batch, vocab]`, and the updated cache.

        Args:
            target: the decoder's new tokens, int32 `[batch, seq]`.
            target_mask: 0 where one is padding.
            cache: of the decoder.
            **context: at the first call the encoder's inputs.
        """
        out = self.base_model(decoder_input_ids=target, decoder_attention_mask=target_mask, cache=cache, **context)
        return self.compute_logits(out.last_hidden_state[:, -1]), out.cache
