"""`generate` and `stream`: prompts in, tokens out."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from easydel.caching import Cache
from easydel.calls import refuse_shapes, takes
from easydel.distributed import warn, whole
from easydel.errors import UnsupportedError
from easydel.generation.loop import cached_loop
from easydel.generation.options import GenerationOptions
from easydel.generation.prefix import feed_of, fitting, grown
from easydel.generation.prompts import SHORTEST_PROMPT, align, bucket, cache_slots, check_prompt, rows_for
from easydel.generation.recompute import recompute_loop
from easydel.generation.resolve import resolve_options
from easydel.generation.results import output_of
from easydel.generation.search import Progress, Search, source_of
from easydel.generation.streaming import Advance, check_stream, check_streamer, feed, finish, looks, steps_of
from easydel.generation.text_pieces import text_of
from easydel.generation.written import Written
from easydel.outputs import GenerationOutput
from easydel.structure import split_again


def generate(
    model: Any,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    streamer: Any = None,
    cache: Cache | None = None,
    **options: Any,
) -> GenerationOutput:
    """Continue prompts; see `EasyGenerationMixin.generate`."""
    started = time.monotonic()
    prompt, resolved = prepare(model, input_ids, attention_mask, options)
    if streamer is not None:
        check_streamer(streamer, resolved)
    advance = _start(model, prompt, resolved, cache)
    if streamer is not None:
        rows = len(prompt.ids) * resolved.num_return_sequences
        progress = feed(streamer, prompt.ids, looks(advance, resolved, started), rows)
    elif resolved.max_time is not None:  # the clock is on the host: back to it after each token
        progress = finish(looks(advance, resolved, started))
    else:
        progress = advance(resolved.max_new_tokens, True)
    return output_of(progress, prompt.ids, resolved)


def stream(
    model: Any,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    tokenizer: Any = None,
    cache: Cache | None = None,
    **options: Any,
) -> Generator[Any]:
    """Yield tokens or text as they are made; see `EasyGenerationMixin.stream`."""
    started = time.monotonic()
    if tokenizer is not None:
        options["tokenizer"] = tokenizer  # for stop strings
    prompt, resolved = prepare(model, input_ids, attention_mask, options)
    rows = len(prompt.ids) * resolved.num_return_sequences
    check_stream(tokenizer, resolved, rows)
    steps = steps_of(looks(_start(model, prompt, resolved, cache), resolved, started), rows)
    return steps if tokenizer is None else (piece for piece in text_of(steps, tokenizer) if piece)


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

    def with_rows(self, rows: int) -> Prompt:
        """Return the prompts and so many more, copies of the first, that there are `rows`."""
        chosen = np.r_[np.arange(len(self.ids)), np.zeros(rows - len(self.ids), int)]
        return Prompt(self.ids[chosen], self.mask[chosen], {name: x[chosen] for name, x in self.context.items()})

    def source(self, width: int) -> np.ndarray | None:
        """Return what is answered to, int32 `[batch, n]` with -1 for padding: an encoder's tokens, or the prompt."""
        if not self.context:
            return source_of(*align(self.ids, self.mask, width, left=True))
        if "input_ids" not in self.context:
            return None
        ids = self.context["input_ids"]
        return source_of(ids, np.asarray(self.context.get("attention_mask", np.ones_like(ids)), bool))


def prepare(
    model: Any, input_ids: Any, attention_mask: Any, options: dict[str, Any]
) -> tuple[Prompt, GenerationOptions]:
    """Return a checked prompt and resolved options; `generation_config` is taken out of `options`."""
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


def _start(model: Any, prompt: Prompt, options: GenerationOptions, cache: Cache | None) -> Advance:
    """Split the model once and return the function that makes tokens."""
    parts = split_again(model)
    vocab = getattr(model.config, "vocab_size", None)
    needs_source = options.encoder_repetition_penalty != 1 or options.encoder_no_repeat_ngram_size
    is_cached = takes(model, "cache")
    if cache is not None:
        cache = fitting(cache, model, prompt, options)
    count = len(prompt.ids)
    given = prompt.with_rows(rows_for(count)) if is_cached and _can_add_rows(options, cache) else prompt
    # Behind a context there is nearly always one token: room for many would be computed in vain.
    width = bucket(int(prompt.mask.sum(axis=1).max()), 1 if prompt.context else SHORTEST_PROMPT)
    source = given.source(width) if needs_source else None
    search = Search.create(options, given.ids, given.mask, vocab, source)
    if is_cached:
        live = np.arange(len(given.ids)) < count
        advance = _with_cache(parts, given, live, options, search, cache)
    else:
        advance = _with_recompute(model, parts, prompt, options, search)

    def checked(limit: int, is_end: bool) -> Progress:
        try:
            return advance(limit, is_end)
        except TypeError as error:
            refuse_shapes(model, "generation", error)
            raise

    return checked


def _can_add_rows(options: GenerationOptions, cache: Cache | None) -> bool:
    """Whether rows may be added that nobody asked for: not where they would be seen, or were made elsewhere."""
    seen = options.logits_processor or options.stopping_criteria or options.output_scores or options.output_logits
    return not seen and cache is None


def _records(options: GenerationOptions) -> int:
    return bucket(options.max_new_tokens, 8) if options.output_scores or options.output_logits else 0


def _with_cache(
    parts: Any, given: Prompt, live: np.ndarray, options: GenerationOptions, search: Search, cache: Cache | None
) -> Advance:
    structure, params, other = parts
    seed = np.uint32(options.seed)
    if given.context:
        width = bucket(int(given.mask.sum(axis=1).max()), 1)
        loop = cached_loop(
            structure, cache_slots(width + options.max_new_tokens), options.cache_dtype, _records(options)
        )
        prompt, kept = align(given.ids, given.mask, width, left=True)

        def prefill(search: Search) -> Progress:
            return loop.prefill(params, other, prompt, kept, given.context, live, seed, search)
    else:
        pieces, feed = feed_of(given.ids, given.mask, options.max_new_tokens, cache)
        loop = cached_loop(structure, pieces.slots, options.cache_dtype, _records(options))
        room = None if cache is None else grown(cache, pieces.slots)

        def prefill(search: Search) -> Progress:
            return loop.prefill_in_pieces(pieces.sizes, params, other, feed, room, live, seed, search)

    progress: Progress | None = None

    def advance(limit: int, is_end: bool) -> Progress:
        nonlocal progress
        now = replace(search, max_new_tokens=np.int32(limit)) if is_end else search
        made = 0 if progress is None else int(progress.written.step)
        if progress is None:
            progress, made = prefill(now), 1
        if limit > made:
            progress = loop.decode(params, other, progress, now, np.int32(limit))
        return progress

    return advance


def _with_recompute(model: Any, parts: Any, given: Prompt, options: GenerationOptions, search: Search) -> Advance:
    structure, params, other = parts
    if options.cache_dtype is not None:
        raise UnsupportedError(
            f"{type(model).__name__} takes no cache that could be {options.cache_dtype}: leave out cache_implementation"
        )
    warn(f"{type(model).__name__} takes no cache: generate() runs the whole prefix again for every token", stacklevel=5)
    loop = recompute_loop(structure, takes(model, "attention_mask"), _records(options))
    seed = np.uint32(options.seed)
    lengths = given.mask.sum(axis=1).astype(np.int32)
    width = bucket(int(lengths.max()) + options.max_new_tokens, SHORTEST_PROMPT)
    written = _written(given, width, search.pad_token_id)
    unseen = loop.padding_is_unseen(params, other, align(given.ids, given.mask, width, left=False)[0], lengths)
    if not unseen and len(set(lengths.tolist())) > 1:
        raise ValueError(
            f"{type(model).__name__} lets padding change its results: prompts of different lengths {lengths.tolist()} "
            "need a model that is causal or honours attention_mask; generate them one by one"
        )
    progress: Progress | None = None

    def advance(limit: int, is_end: bool) -> Progress:
        nonlocal progress
        now = replace(search, max_new_tokens=np.int32(limit)) if is_end else search
        if unseen:
            progress = progress or loop.prefill(params, other, written, seed, now)
            progress = loop.decode(params, other, progress, now, np.int32(limit))
            return progress
        while progress is None or (int(progress.written.step) < limit and not bool(whole(progress.finished).all())):
            progress = loop.go_exactly(params, other, written, progress, seed, now)
        return progress

    return advance


def _written(prompt: Prompt, capacity: int, pad_token_id: Any) -> Written:
    """Return prompts in a buffer of `capacity` columns, on the host."""
    width = int(prompt.mask.sum(axis=1).max())
    ids, mask = align(prompt.ids, prompt.mask, width, left=True)
    tokens = np.full((len(ids), capacity), pad_token_id, np.int32)
    tokens[:, :width] = ids
    return Written(tokens, (width - mask.sum(axis=1)).astype(np.int32), np.int32(width), np.int32(0))
