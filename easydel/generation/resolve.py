"""Keywords over `generation_config.json` over defaults, and nothing ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from easydel.errors import UnsupportedError
from easydel.generation.options import DEFAULT_NEW_TOKENS, GenerationOptions
from easydel.paths import nearest

# Options of transformers that are not offered → the value that means "off", which may be given.
_NEUTRAL: dict[str, Any] = {
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "return_dict_in_generate": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "use_cache": True,
}
# Entries of a generation_config.json that say nothing about what is generated here.
_IRRELEVANT = {"transformers_version", "bos_token_id", "decoder_start_token_id"}
# Given without do_sample, they mean sampling.
_KNOBS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Only beam search looks at them → the value that means nothing.
_OF_BEAMS = {"length_penalty": 1.0, "early_stopping": False}


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(_id(i) for i in (value if isinstance(value, Sequence | np.ndarray) else (value,)))


def _id(value: Any) -> int:
    if isinstance(value, bool | str) or int(value) != value or value < 0:
        raise ValueError("token ids are integers, at least 0")
    return int(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool | str) or int(value) != value:
        raise ValueError("expected an integer")
    return int(value)


def _real(value: Any) -> float:
    if isinstance(value, bool | str) or not np.isfinite(value):
        raise ValueError("expected a finite number")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ValueError("expected True or False")
    return bool(value)


def _words(value: Any) -> tuple[tuple[int, ...], ...]:
    words = tuple(_ids(word) for word in value if isinstance(word, Sequence | np.ndarray))
    if len(words) != len(value) or not all(words):
        raise ValueError("expected a list of lists of token ids, none of them empty")
    return words


def _biases(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    # In JSON it is a list of pairs, for there keys are strings.
    pairs = value.items() if isinstance(value, Mapping) else value
    found = tuple((_ids(sequence), float(bias)) for sequence, bias in pairs)
    if not all(sequence for sequence, _ in found):
        raise ValueError("expected a dict of tuples of token ids, none of them empty, to numbers")
    return tuple(dict(found).items())


def _decay(value: Any) -> tuple[int, float]:
    start, factor = value
    return _whole(start), _real(factor)


def _strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(string, str) for string in strings):
        raise ValueError("expected a string or a list of strings")
    return strings


def _functions(value: Any) -> tuple[Callable[..., Any], ...]:
    functions = tuple(value) if isinstance(value, Sequence) else (value,)
    if not all(callable(function) for function in functions):
        raise ValueError("expected a list of functions")
    return functions


def _as_is(value: Any) -> Any:
    return value


# Name → what is made of a value, where both names are the same.
_READ: dict[str, Callable[[Any], Any]] = {
    "max_time": _real,
    "temperature": _real,
    "top_k": lambda value: _whole(value) or None,  # 0 means "off", as in transformers
    "top_p": _real,
    "min_p": _real,
    "typical_p": _real,
    "epsilon_cutoff": _real,
    "eta_cutoff": _real,
    "repetition_penalty": _real,
    "encoder_repetition_penalty": _real,
    "frequency_penalty": _real,
    "presence_penalty": _real,
    "no_repeat_ngram_size": _whole,
    "encoder_no_repeat_ngram_size": _whole,
    "bad_words_ids": _words,
    "sequence_bias": _biases,
    "suppress_tokens": _ids,
    "begin_suppress_tokens": _ids,
    "forced_bos_token_id": _id,
    "forced_eos_token_id": _ids,
    "exponential_decay_length_penalty": _decay,
    "remove_invalid_values": _flag,
    "renormalize_logits": _flag,
    "num_beams": _whole,
    "length_penalty": _real,
    "early_stopping": _as_is,
    "num_return_sequences": _whole,
    "stop_strings": _strings,
    "tokenizer": _as_is,
    "logits_processor": _functions,
    "stopping_criteria": _functions,
    "output_scores": _flag,
    "output_logits": _flag,
    "seed": _whole,
}
_LENGTHS = ("max_new_tokens", "max_length", "min_new_tokens", "min_length")
_OFFERED = {
    *(*_READ, *_LENGTHS),
    *("do_sample", "eos_token_id", "pad_token_id", "cache_implementation", "cache_config"),
}
_OF_CALLS = {"tokenizer", "logits_processor", "stopping_criteria", "seed"}
# Ways to lay a cache out that change no number: here it has a fixed size, and a window's where there is one.
_LAYOUTS = ("dynamic", "static", "sliding_window", "hybrid", "hybrid_chunked")
_FROM_CONFIG = ("eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id")


def resolve_options(
    given: Mapping[str, Any], stored: Mapping[str, Any], model_config: Any, prompt_length: int
) -> GenerationOptions:
    """Merge keywords with a model's stored generation settings.

    Args:
        given: keywords of the call; `None` means not given.
        stored: the content of `generation_config.json`.
        model_config: read for token ids that neither names, and for `vocab_size`.
        prompt_length: columns of the prompt, for `max_length` and `min_length`.

    Raises:
        UnsupportedError: an option that is not offered has a value that would change the result; it is named.
        ValueError: a value of the wrong kind or out of its range, or one that would be without effect.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    stored = {name: value for name, value in stored.items() if value is not None}
    _refuse(asked, "", asked)
    _refuse(stored, " (from generation_config.json)", asked)
    merged = {name: value for name in _FROM_CONFIG if (value := getattr(model_config, name, None)) is not None}
    merged |= {name: value for name, value in stored.items() if name in _OFFERED - _OF_CALLS} | asked
    read = {name: _value(name, merged[name], make) for name, make in _READ.items() if name in merged}
    _refuse_without_beams(asked, read)
    eos = _value("eos_token_id", merged.get("eos_token_id", ()), _ids)
    pad = merged.get("pad_token_id", eos[0] if eos else 0)
    sampling = (
        merged["do_sample"] if "do_sample" in asked else any(n in asked for n in _KNOBS) or stored.get("do_sample")
    )
    longest = _longest(asked, stored, prompt_length)
    options = GenerationOptions(
        max_new_tokens=longest,
        min_new_tokens=_shortest(asked, stored, prompt_length, longest),
        do_sample=bool(sampling),
        eos_token_ids=eos,
        pad_token_id=_value("pad_token_id", pad, _whole),
        cache_dtype=_cache_dtype(
            merged.get("cache_implementation"), merged.get("cache_config"), "cache_config" in asked
        ),
        **read,
    )
    _check_vocabulary(options, getattr(model_config, "vocab_size", None))
    return options


def _value(name: str, value: Any, make: Callable[[Any], Any]) -> Any:
    try:
        return make(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the generation option {name}={value!r} cannot be read: {error}") from error


def _longest(asked: Mapping[str, Any], stored: Mapping[str, Any], prompt_length: int) -> int:
    for source in (asked, stored):
        if "max_new_tokens" in source:
            return _value("max_new_tokens", source["max_new_tokens"], _whole)
        if "max_length" in source:
            if source["max_length"] <= prompt_length:
                raise ValueError(f"max_length={source['max_length']} leaves no room after a prompt of {prompt_length}")
            return _value("max_length", source["max_length"], _whole) - prompt_length
    return DEFAULT_NEW_TOKENS


def _shortest(asked: Mapping[str, Any], stored: Mapping[str, Any], prompt_length: int, longest: int) -> int:
    for source in (asked, stored):
        if "min_new_tokens" in source:
            return _value("min_new_tokens", source["min_new_tokens"], _whole)
        if "min_length" in source:
            least = _value("min_length", source["min_length"], _whole)
            if not 0 <= least <= prompt_length + longest:
                raise ValueError(f"min_length must be in [0, {prompt_length + longest}], got {least}")
            return max(least - prompt_length, 0)
    return 0


def _cache_dtype(implementation: str | None, config: Any, is_asked: bool) -> str | None:
    """Return `"int8"` for a quantized cache; `is_asked` says whether the call itself names its config."""
    if implementation is None or implementation in _LAYOUTS:
        if is_asked:
            raise ValueError(f"cache_config={config!r} is of cache_implementation='quantized', got {implementation!r}")
        return None
    if implementation != "quantized":
        raise UnsupportedError(
            f"cache_implementation={implementation!r} is not supported (offered: quantized, {', '.join(_LAYOUTS)})"
        )
    if config is not None and config != {"nbits": 8}:
        raise UnsupportedError(
            f"cache_config={config!r} is not supported: a quantized cache holds int8, with a scale for each head of "
            "each position; pass cache_config={'nbits': 8}, or none"
        )
    return "int8"


def _refuse(options: Mapping[str, Any], where: str, asked: Mapping[str, Any]) -> None:
    offered = _OFFERED - _OF_CALLS if where else _OFFERED
    for name, value in options.items():
        if name in offered or name.startswith("_") or name in _IRRELEVANT or (where and name in asked):
            continue
        if name in _NEUTRAL and value == _NEUTRAL[name]:
            continue
        if where and value in (False, [], {}):
            continue
        near = nearest(name, offered, 1)
        hint = f"; pass {name}={_NEUTRAL[name]!r} to go without it" if where and name in _NEUTRAL else ""
        hint = hint or (f"; did you mean {near[0]}?" if near and name not in _NEUTRAL else "")
        raise UnsupportedError(
            f"the generation option {name}={value!r}{where} is not supported{hint} "
            f"(offered: {', '.join(sorted(offered))})"
        )


def _refuse_without_beams(asked: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    for name, off in _OF_BEAMS.items():
        if name in asked and read[name] != off and read.get("num_beams", 1) == 1:
            raise ValueError(f"{name}={read[name]!r} has no effect without beams: pass num_beams too, or leave it out")


def _check_vocabulary(options: GenerationOptions, vocab_size: int | None) -> None:
    if vocab_size is None:
        return
    for name, ids in (
        ("bad_words_ids", [i for word in options.bad_words_ids for i in word]),
        ("sequence_bias", [i for sequence, _ in options.sequence_bias for i in sequence]),
        ("suppress_tokens", options.suppress_tokens),
        ("begin_suppress_tokens", options.begin_suppress_tokens),
        ("forced_bos_token_id", [i for i in (options.forced_bos_token_id,) if i is not None]),
        ("forced_eos_token_id", options.forced_eos_token_id),
    ):
        if outside := [i for i in ids if i >= vocab_size]:
            raise ValueError(f"{name} must lie in [0, {vocab_size}), got {outside}")
