"""`generate` and `stream`: prompts in, tokens out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from easydel.calls import refuse_shapes, takes
from easydel.errors import UnsupportedError
from easydel.generation.loop import Progress, begin, cached_loop
from easydel.generation.options import GenerationOptions, resolve_options
from easydel.generation.prompts import SHORTEST_CACHE, SHORTEST_PROMPT, align, bucket, check_prompt
from easydel.generation.recompute import Prefix, recompute_loop
from easydel.generation.sampling import Sampler
from easydel.outputs import GenerationOutput
from easydel.structure import split_again

# Runs until `limit` tokens are made or every row has ended.
Advance = Callable[[int], Progress]


def generate(model: Any, input_ids: Any, attention_mask: Any = None, **options: Any) -> GenerationOutput:
    """Continue prompts; see `EasyGenerationMixin.generate`."""
    prompt, resolved = _prepare(model, input_ids, attention_mask, options)
    progress = _start(model, prompt, resolved)(resolved.max_new_tokens)
    new = np.asarray(progress.tokens)[:, : int(progress.step)]
    # device_put compiles nothing, jnp.asarray a program for each new shape.
    return GenerationOutput(sequences=jax.device_put(np.concatenate([prompt.ids, new], axis=1)))


def stream(model: Any, input_ids: Any, attention_mask: Any = None, **options: Any) -> Iterator[np.ndarray]:
    """Yield the tokens of each step as they are made; see `EasyGenerationMixin.stream`."""
    prompt, resolved = _prepare(model, input_ids, attention_mask, options)
    advance = _start(model, prompt, resolved)
    for made in range(1, resolved.max_new_tokens + 1):
        progress = advance(made)
        yield np.asarray(progress.current)
        if np.asarray(progress.finished).all():
            return


@dataclass(frozen=True)
class Prompt:
    """What is continued.

    Attributes:
        ids: int32 `[batch, seq]`.
        mask: bool `[batch, seq]`, false where one is padding.
        context: what else the first forward pass is given, such as the inputs of an encoder.
    """

    ids: np.ndarray
    mask: np.ndarray
    context: dict[str, np.ndarray]


def _prepare(
    model: Any, input_ids: Any, attention_mask: Any, options: dict[str, Any]
) -> tuple[Prompt, GenerationOptions]:
    if not getattr(model, "can_generate", True):
        raise UnsupportedError(
            f"generate() is not supported by {type(model).__name__} ({model.model_task}): it predicts no next token"
        )
    context: dict[str, np.ndarray] = {}
    if hasattr(model, "generation_inputs"):  # a model that continues something else than it is given
        input_ids, attention_mask, context = model.generation_inputs(input_ids, attention_mask, options)
    ids, mask = check_prompt(input_ids, attention_mask, getattr(model.config, "vocab_size", None))
    defaults = options.pop("generation_config", None) or model.generation_config
    stored = {} if defaults is None else defaults.to_diff_dict()
    resolved = resolve_options(options, stored, model.config, ids.shape[1])
    tokens, longest = int(mask.sum(axis=1).max()), getattr(model, "longest_sequence", None)
    if longest is not None and tokens + resolved.max_new_tokens > longest:
        raise ValueError(
            f"{type(model).__name__} has {longest} positions; a prompt of {tokens} tokens and "
            f"max_new_tokens={resolved.max_new_tokens} do not fit: shorten the one or lower the other"
        )
    return Prompt(ids, mask, context), resolved


def _start(model: Any, prompt: Prompt, options: GenerationOptions) -> Advance:
    """Split the model once and return the function that makes tokens."""
    parts = split_again(model)
    if takes(model, "cache"):
        advance = _with_cache(parts, prompt, options)
    else:
        advance = _with_recompute(model, parts, prompt.ids, prompt.mask, options)

    def checked(limit: int) -> Progress:
        try:
            return advance(limit)
        except TypeError as error:
            refuse_shapes(model, "generation", error)
            raise

    return checked


def _with_cache(parts: Any, given: Prompt, options: GenerationOptions) -> Advance:
    structure, params, other = parts
    # Behind a context there is nearly always one token: room for many would be computed in vain.
    width = bucket(int(given.mask.sum(axis=1).max()), 1 if given.context else SHORTEST_PROMPT)
    loop = cached_loop(structure, bucket(width + options.max_new_tokens, SHORTEST_CACHE), options.cache_dtype)
    sampler = Sampler.create(options)
    prompt, kept = align(given.ids, given.mask, width, left=True)
    progress: Progress | None = None

    def advance(limit: int) -> Progress:
        nonlocal progress
        if progress is None:
            progress = loop.prefill(params, other, prompt, kept, given.context, np.uint32(options.seed), sampler)
        if limit > 1:
            progress = loop.decode(params, other, progress, sampler, np.int32(limit))
        return progress

    return advance


def _with_recompute(model: Any, parts: Any, ids: np.ndarray, mask: np.ndarray, options: GenerationOptions) -> Advance:
    structure, params, other = parts
    if options.cache_dtype is not None:
        raise UnsupportedError(
            f"{type(model).__name__} takes no cache that could be {options.cache_dtype}: leave out cache_implementation"
        )
    warnings.warn(
        f"{type(model).__name__} takes no cache: generate() runs the whole prefix again for every token",
        stacklevel=5,
    )
    loop = recompute_loop(structure, takes(model, "attention_mask"))
    sampler = Sampler.create(options)
    lengths = mask.sum(axis=1).astype(np.int32)
    width = bucket(int(lengths.max()) + options.max_new_tokens, SHORTEST_PROMPT)
    prompt, _ = align(ids, mask, width, left=False)
    if loop.padding_is_unseen(params, other, prompt, lengths):
        progress = begin(Prefix(*jax.device_put((prompt, lengths))), len(ids), width, np.uint32(options.seed))

        def advance(limit: int) -> Progress:
            nonlocal progress
            progress = loop.decode(params, other, progress, sampler, np.int32(limit))
            return progress

        return advance

    if len(set(lengths.tolist())) > 1:
        raise ValueError(
            f"{type(model).__name__} lets padding change its results: prompts of different lengths {lengths.tolist()} "
            "need a model that is causal or honours attention_mask; generate them one by one"
        )
    steps = loop.run_exactly(params, other, prompt, int(lengths[0]), sampler, options.seed, options.max_new_tokens)

    def advance_exactly(limit: int) -> Progress:
        for progress in steps:
            if int(progress.step) >= limit or bool(progress.finished.all()):
                return progress
        return progress

    return advance_exactly
