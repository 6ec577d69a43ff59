"""What the numbers of a checkpoint's config may be, checked before anything is built from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from easydel.errors import CheckpointError
from easydel.hub.report import short

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "num_heads", "state_size", "n_groups", "conv_kernel", "chunk_size", "expand",
    "type_vocab_size",
)  # fmt: skip
COUNTS = ("num_hidden_layers", "sliding_window")
POSITIVE = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "logits_scaling")
NOT_NEGATIVE = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps", "initializer_range",
    "attention_dropout", "residual_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob",
    "classifier_dropout",
)  # fmt: skip
# No model comes near them; beyond, building for shapes alone would take memory or minutes.
LARGEST_SIZE, LARGEST_HEAD, SHARED_LAYERS = 2**40, 2**14, 128


_SPECIAL = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def decode_floats(value: Any) -> Any:
    """Turn transformers' way to write what JSON has no number for, `{"__float__": "Infinity"}`, back into floats."""
    if isinstance(value, Mapping):
        tag = value.get("__float__") if len(value) == 1 else None
        if isinstance(tag, str) and tag in _SPECIAL:
            return _SPECIAL[tag]
        return {key: decode_floats(item) for key, item in value.items()}
    return [decode_floats(item) for item in value] if isinstance(value, list) else value


def check_content(content: Mapping[str, Any], file: Path, overridden: Mapping[str, Any]) -> None:
    """Raise unless every number that `content` (of `config.json`) gives is one a model can have.

    Fields that are absent or null are left to the config class, and so are those the caller overrides.

    Raises:
        CheckpointError: names the file, the field, what was got and what is expected.
    """
    given = {name: value for name, value in content.items() if value is not None and name not in overridden}
    for name in (*SIZES, *COUNTS):
        least = 0 if name in COUNTS else 1
        if name in given and not (type(given[name]) is int and least <= given[name] <= LARGEST_SIZE):
            _refuse(file, name, given[name], f"a whole number from {least} on")
    for name in (*POSITIVE, *NOT_NEGATIVE):
        zero = name in NOT_NEGATIVE
        if name in given and not (_finite(given[name]) and (given[name] > 0 or (zero and given[name] == 0))):
            _refuse(file, name, given[name], f"a finite number, {'not negative' if zero else 'positive'}")
    for name in ("rope_parameters", "rope_scaling"):
        if name in given and not isinstance(given[name], Mapping):
            _refuse(file, name, given[name], "an object")
        for path, value in _numbers(given.get(name, {}), name):
            if not _finite(value):
                _refuse(file, path, value, "a finite number")
    theta = given.get("rope_theta", 1.0)
    if not _finite(theta) or theta <= 0:
        _refuse(file, "rope_theta", theta, "a positive number")


def check_config(config: Any, file: Path) -> None:
    """Raise unless the sizes of a config that came from `file` fit each other.

    Raises:
        CheckpointError: names the file and the fields.
    """
    heads, groups = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        _refuse(file, "num_key_value_heads", groups, f"a divisor of num_attention_heads={heads}")
    kinds, layers = getattr(config, "layer_types", None), getattr(config, "num_hidden_layers", None)
    if isinstance(kinds, list | tuple) and isinstance(layers, int) and len(kinds) != layers:
        _refuse(file, "layer_types", f"{len(kinds)} entries", f"one for each of num_hidden_layers={layers}")
    rope, hidden = getattr(config, "rope_parameters", None), getattr(config, "hidden_size", None)
    if not isinstance(rope, Mapping) or not isinstance(heads, int) or not isinstance(hidden, int):
        return
    size = getattr(config, "head_dim", None) or hidden // heads
    if not 0 < size <= LARGEST_HEAD:
        _refuse(file, "head_dim", size, f"1 to {LARGEST_HEAD} (hidden_size={hidden}, num_attention_heads={heads})")
    for path, value in _numbers(rope, "rope_parameters"):
        name = path.rpartition(".")[2]
        if name in ("rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings") and value <= 0:
            _refuse(file, path, value, "a positive number")
        if name == "partial_rotary_factor" and value > 1:
            _refuse(file, path, value, "at most 1")
    part = rope.get("partial_rotary_factor") or 1.0
    if int(size * part) % 2:
        _refuse(file, "head_dim", size, "an even number of rotated features: rotary positions turn them in pairs")


def check_depth(config: Any, tensors: int, file: Path) -> None:
    """Raise if the config asks for far more layers than the checkpoint can hold: building them could take for ever."""
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > max(SHARED_LAYERS, tensors):
        _refuse(file, "num_hidden_layers", layers, f"no more than the {tensors} tensors of the checkpoint")


def _refuse(file: Path, name: str, got: object, expected: str) -> None:
    raise CheckpointError(f"{file}: {name} is {short(got)}, expected {expected}; correct the file or fetch it again")


def _finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= LARGEST_SIZE if isinstance(value, int) else math.isfinite(value)


def _numbers(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of what should be a number in rope parameters: all but names and switches."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{path}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, path)
    elif not isinstance(value, bool) and value is not None and path.rpartition(".")[2] not in ("rope_type", "type"):
        yield path, value
