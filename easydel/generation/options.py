"""What `generate` is asked to do: keywords over `generation_config.json` over defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from easydel.errors import UnsupportedError
from easydel.paths import nearest

DEFAULT_NEW_TOKENS = 20

# Options of transformers that are not offered yet → the value that means "off", which may be given.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_length": 0,
    "early_stopping": False,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "return_dict_in_generate": True,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "use_cache": True,
}
# Entries of a generation_config.json that say nothing about what is generated here.
_IRRELEVANT = {"transformers_version", "bos_token_id", "use_cache", "decoder_start_token_id"}


@dataclass(frozen=True)
class GenerationOptions:
    """Resolved options.

    Attributes:
        max_new_tokens: most tokens to add.
        min_new_tokens: end-of-text tokens are suppressed before as many are added.
        do_sample: draw tokens; otherwise take the likeliest.
        temperature: logits are divided by it (sampling).
        top_k: keep the k likeliest tokens (sampling); `None`: all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches it (sampling); `None`: all.
        eos_token_ids: a row ends after one of them.
        pad_token_id: fills a row after its end.
        seed: of the random draws.
        cache_dtype: `"int8"`: keys and values are kept so; `None`: in the model's dtype.
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    seed: int = 0
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, f"in [0, {self.max_new_tokens}]"),
            ("temperature", self.temperature > 0, "positive (use do_sample=False for greedy search)"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
        ):
            if not good:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")


def resolve_options(
    given: Mapping[str, Any], stored: Mapping[str, Any], model_config: Any, prompt_length: int
) -> GenerationOptions:
    """Merge keywords with a model's stored generation settings.

    Args:
        given: keywords of the call; `None` means not given.
        stored: the content of `generation_config.json`.
        model_config: read for token ids that neither names.
        prompt_length: columns of the prompt, for `max_length`.

    Raises:
        UnsupportedError: an option that is not offered has a value that would change the result; it is named.
        ValueError: a value out of its range.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    _refuse(asked, "", asked)
    _refuse({k: v for k, v in stored.items() if v is not None}, " (from generation_config.json)", asked)

    def pick(name: str, default: Any = None) -> Any:
        for source in (asked, stored):
            if source.get(name) is not None:
                return source[name]
        value = getattr(model_config, name, None)
        return default if value is None else value

    knobs = any(name in asked for name in ("temperature", "top_k", "top_p"))
    top_k = pick("top_k")
    eos = pick("eos_token_id", ())
    eos_ids = tuple(int(i) for i in (eos if isinstance(eos, list | tuple) else (eos,)))
    pad = pick("pad_token_id", eos_ids[0] if eos_ids else 0)
    return GenerationOptions(
        max_new_tokens=_new_tokens(asked, stored, prompt_length),
        min_new_tokens=int(pick("min_new_tokens", 0)),
        do_sample=bool(asked["do_sample"]) if "do_sample" in asked else knobs or bool(stored.get("do_sample")),
        temperature=float(pick("temperature", 1.0)),
        top_k=int(top_k) or None if top_k is not None else None,  # 0 means "off", as in transformers
        top_p=None if pick("top_p") is None else float(pick("top_p")),
        eos_token_ids=eos_ids,
        pad_token_id=int(pad),
        seed=int(asked.get("seed", 0)),
        cache_dtype=_cache_dtype(pick("cache_implementation"), pick("cache_config"), "cache_config" in asked),
    )


_OFFERED = {
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "eos_token_id",
    "pad_token_id",
    "seed",
    "cache_implementation",
    "cache_config",
}
# Ways to lay a cache out that change no number: here it has a fixed size, and a window's where there is one.
_LAYOUTS = ("dynamic", "static", "sliding_window", "hybrid", "hybrid_chunked")


def _new_tokens(asked: Mapping[str, Any], stored: Mapping[str, Any], prompt_length: int) -> int:
    for source in (asked, stored):
        if source.get("max_new_tokens") is not None:
            return int(source["max_new_tokens"])
        if source.get("max_length") is not None:
            if int(source["max_length"]) <= prompt_length:
                raise ValueError(f"max_length={source['max_length']} leaves no room after a prompt of {prompt_length}")
            return int(source["max_length"]) - prompt_length
    return DEFAULT_NEW_TOKENS


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
    for name, value in options.items():
        if name in _OFFERED or name.startswith("_") or name in _IRRELEVANT or (where and name in asked):
            continue
        if name in _NEUTRAL and value == _NEUTRAL[name]:
            continue
        if where and value in (False, [], {}):
            continue
        near = nearest(name, _OFFERED, 1)
        hint = f"; pass {name}={_NEUTRAL[name]!r} to go without it" if where and name in _NEUTRAL else ""
        hint = hint or (f"; did you mean {near[0]}?" if near and name not in _NEUTRAL else "")
        raise UnsupportedError(
            f"the generation option {name}={value!r}{where} is not supported{hint} "
            f"(offered: {', '.join(sorted(_OFFERED))})"
        )
