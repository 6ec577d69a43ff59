"""Logits processors: small pure functions `(tokens so far, scores) -> scores`, composed from the options.

Which of them there are is static, their numbers are traced: changing a number compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from easydel.generation.options import GenerationOptions
from easydel.generation.processors.biases import SequenceBias
from easydel.generation.processors.ends import ExponentialDecay, ForcedBos, ForcedEos, MinNewTokens
from easydel.generation.processors.finish import Own, RemoveInvalid, Renormalize
from easydel.generation.processors.ids import id_set
from easydel.generation.processors.ngrams import NoRepeatNgram, NoRepeatSourceNgram
from easydel.generation.processors.repetition import CountPenalty, RepetitionPenalty, SourceRepetitionPenalty
from easydel.generation.processors.suppression import BeginSuppressTokens, SuppressTokens
from easydel.generation.processors.warpers import Epsilon, Eta, MinP, Temperature, TopK, TopP, Typical
from easydel.generation.written import Written

__all__ = ["Processor", "apply", "processors_of"]

Processor = Callable[[Written, jax.Array], jax.Array]


def apply(processors: tuple[Processor, ...], written: Written, scores: jax.Array) -> jax.Array:
    """Return the scores, float32 `[rows, vocab]`, after all processors in turn."""
    for processor in processors:
        scores = processor(written, scores)
    return scores


def processors_of(options: GenerationOptions, source: np.ndarray | None) -> tuple[Processor, ...]:
    """Return the processors that options ask for, in transformers' order.

    Args:
        options: resolved.
        source: what is answered to, int32 `[rows, n]`, `NO_TOKEN` where one is padding; `None`: unknown.

    Raises:
        ValueError: an option about the source, and it is unknown.
    """
    if source is None:
        for name, off in (("encoder_repetition_penalty", 1.0), ("encoder_no_repeat_ngram_size", 0)):
            if getattr(options, name) != off:
                raise ValueError(f"{name}={getattr(options, name)} needs a model that is given input_ids")
    own = [Own(function) for function in options.logits_processor]
    last = [Renormalize()] if options.renormalize_logits else []
    return (*_of_tokens(options, source), *_of_ends(options), *own, *_of_sampling(options), *last)


def _of_tokens(options: GenerationOptions, source: Any) -> Iterator[Processor]:
    if options.sequence_bias:
        yield SequenceBias.create(dict(options.sequence_bias))
    if options.encoder_repetition_penalty != 1:
        yield SourceRepetitionPenalty(np.float32(options.encoder_repetition_penalty), source)
    if options.repetition_penalty != 1:
        yield RepetitionPenalty(np.float32(options.repetition_penalty))
    if options.frequency_penalty or options.presence_penalty:
        yield CountPenalty(np.float32(options.frequency_penalty), np.float32(options.presence_penalty))
    if options.no_repeat_ngram_size:
        yield NoRepeatNgram(options.no_repeat_ngram_size)
    if options.encoder_no_repeat_ngram_size:
        yield NoRepeatSourceNgram(source, options.encoder_no_repeat_ngram_size)
    # A row may always end, so end-of-text tokens are no bad words.
    bad = [word for word in options.bad_words_ids if word not in [(eos,) for eos in options.eos_token_ids]]
    if bad:
        yield SequenceBias.create(dict.fromkeys(bad, -np.inf))


def _of_ends(options: GenerationOptions) -> Iterator[Processor]:
    eos = id_set(options.eos_token_ids)
    if options.min_new_tokens:
        yield MinNewTokens(np.int32(options.min_new_tokens), eos)
    if options.forced_bos_token_id is not None:
        yield ForcedBos(np.int32(options.forced_bos_token_id))
    if options.forced_eos_token_id:
        yield ForcedEos(id_set(options.forced_eos_token_id), np.int32(options.max_new_tokens))
    if options.remove_invalid_values:
        yield RemoveInvalid()
    if options.exponential_decay_length_penalty is not None:
        start, factor = options.exponential_decay_length_penalty
        yield ExponentialDecay(np.int32(start), np.float32(factor), eos)
    if options.suppress_tokens:
        yield SuppressTokens(id_set(options.suppress_tokens))
    if options.begin_suppress_tokens:
        yield BeginSuppressTokens(id_set(options.begin_suppress_tokens), options.forced_bos_token_id is not None)


def _of_sampling(options: GenerationOptions) -> Iterator[Processor]:
    if not options.do_sample:
        return
    # Beams need one token beside the end-of-text tokens to go on with.
    least = 1 if options.num_beams == 1 else max(len(options.eos_token_ids), 1) + 1
    yield Temperature(np.float32(options.temperature))
    if options.top_k is not None:
        yield TopK(np.int32(options.top_k), least)
    if options.top_p is not None and options.top_p < 1:
        yield TopP(np.float32(options.top_p), least)
    if options.min_p is not None:
        yield MinP(np.float32(options.min_p), least)
    if options.typical_p < 1:
        yield Typical(np.float32(options.typical_p), least)
    if options.epsilon_cutoff:
        yield Epsilon(np.float32(options.epsilon_cutoff), least)
    if options.eta_cutoff:
        yield Eta(np.float32(options.eta_cutoff), least)
