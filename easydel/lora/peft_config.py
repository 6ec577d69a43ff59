"""PEFT's `adapter_config.json`: every field is read, known to be without effect, or refused by name.

The fields are those of `peft.LoraConfig` 0.21; an older version wrote fewer of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from easydel.distributed import warn
from easydel.errors import CheckpointError, UnsupportedError
from easydel.hub.report import short

ALL_LINEAR = "all-linear"

WITHOUT_EFFECT = (
    "auto_mapping",  # which class of transformers to load
    "fan_in_fan_out",  # how the base stores its weight; the adapter's matrices are the same
    "inference_mode",  # whether PEFT trains it
    "megatron_core",  # read with megatron_config only
    "peft_type",  # checked apart
    "peft_version",
    "qalora_group_size",  # read with use_qalora only
    "runtime_config",  # where DoRA's norms are computed
)
"""Fields that say nothing of what an adapter computes."""

REFUSED: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none",),
    "corda_config": (None,),
    "ensure_weight_tying": (False,),
    "eva_config": (None,),
    # Others change the base's weights, which the file does not hold.
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "loftq_config": ({}, None),
    "lora_bias": (False,),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
    "velora_config": (None,),
}
"""Fields of what is not offered here → values that ask for nothing."""


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_name, value))


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_table(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(_is_pattern(key) and check(item) for key, item in value.items())


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


_NAMES_OR_PATTERN = (lambda v: v is None or _is_names(v) or _is_pattern(v), "a list of names or a regular expression")
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "an integer of at least 1"),
    "lora_alpha": (_is_number, "a finite number"),
    "lora_dropout": (lambda v: _is_number(v) and 0 <= v < 1, "a rate of at least 0 and below 1"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "target_modules": _NAMES_OR_PATTERN,
    "exclude_modules": _NAMES_OR_PATTERN,
    "target_parameters": (lambda v: v is None or _is_names(v), "a list of names"),
    "modules_to_save": (lambda v: v is None or _is_names(v), "a list of names"),
    "layers_to_transform": (
        lambda v: v is None or type(v) is int or (isinstance(v, list) and all(type(n) is int for n in v)),
        "an integer or a list of integers",
    ),
    "layers_pattern": (
        lambda v: v is None or _is_pattern(v) or (isinstance(v, list) and all(map(_is_pattern, v))),
        "a name or a list of names",
    ),
    "rank_pattern": (lambda v: v is None or _is_table(v, _is_rank), "names → integers of at least 1"),
    "alpha_pattern": (lambda v: v is None or _is_table(v, _is_number), "names → finite numbers"),
    "base_model_name_or_path": (lambda v: v is None or _is_name(v), "a name"),
    "revision": (lambda v: v is None or _is_name(v), "a name"),
    "task_type": (lambda v: v is None or _is_name(v), "a name"),
}


@dataclass(frozen=True)
class PeftConfig:
    """What is read of an `adapter_config.json`; names and defaults are PEFT's.

    Attributes:
        r: rank.
        lora_alpha: the scale is `lora_alpha / r`, or `lora_alpha / sqrt(r)`.
        lora_dropout: rate, in training.
        use_rslora: scale by `1 / sqrt(r)`.
        use_dora: learn magnitudes.
        target_modules: ends of names of modules, a regular expression on whole names, or `"all-linear"`.
        exclude_modules: likewise, of those that are left out.
        target_parameters: ends of names of parameters (experts).
        modules_to_save: ends of names of modules that are trained whole.
        layers_to_transform: numbers of the layers that `target_modules` means.
        layers_pattern: names of the list of layers.
        rank_pattern: ends of names, as regular expressions → rank.
        alpha_pattern: likewise, alpha.
        base_model_name_or_path: what the adapter was trained on.
        revision: of it.
        task_type: `"CAUSAL_LM"` or another of PEFT's.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None

    @classmethod
    def from_dict(cls, content: Any, where: str) -> Self:
        """Read the content of an `adapter_config.json`.

        Args:
            content: of the file.
            where: the file, for messages.

        Raises:
            CheckpointError: no JSON object, or fields of another type; all are listed.
            UnsupportedError: something that PEFT offers and this library does not, by its name.
        """
        if not isinstance(content, dict):
            raise CheckpointError(f"{where}: expected a JSON object, got {short(content)}; fetch the file again")
        kind = content.get("peft_type")
        if not isinstance(kind, str):
            raise CheckpointError(f"{where}: peft_type={short(kind)}, expected a name: is it an adapter's config?")
        if kind != "LORA":
            raise UnsupportedError(f"{where}: peft_type={short(kind)} is not supported; 'LORA' is")
        _refuse(content, where)
        known = {each.name for each in fields(cls)}
        problems = [
            f"{name}={short(content[name])}: expected {_CHECKS[name][1]}"
            for name in sorted(known & content.keys())
            if not _CHECKS[name][0](content[name])
        ]
        if problems:
            raise CheckpointError(f"{where}: values that cannot be used:\n  " + "\n  ".join(problems))
        return cls(**{name: content[name] for name in known & content.keys()})

    def rank_of(self, name: str) -> int:
        """Return the rank for a module, by its whole name."""
        return int(_by_pattern(self.rank_pattern, name, self.r))

    def alpha_of(self, name: str) -> float:
        """Return the alpha for a module, by its whole name."""
        return float(_by_pattern(self.alpha_pattern, name, self.lora_alpha))


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, otherwise)


def _refuse(content: Mapping[str, Any], where: str) -> None:
    """Raise for fields of what is not offered here."""
    asked = {
        name: content[name] for name, idle in REFUSED.items() if name in content and not _is_in(content[name], idle)
    }
    if asked:
        listed = ", ".join(f"{name}={short(value)}" for name, value in asked.items())
        raise UnsupportedError(f"{where}: {listed} is not supported: such an adapter computes what is not offered here")
    unknown = sorted(content.keys() - {*REFUSED, *WITHOUT_EFFECT, *_CHECKS})
    if used := [name for name in unknown if content[name] is not None]:
        raise UnsupportedError(
            f"{where}: fields of a version of PEFT that is not known here are not supported: "
            + ", ".join(f"{name}={short(content[name])}" for name in used)
        )
    if unknown:
        warn(
            f"{where}: was written by a newer version of PEFT; its fields {', '.join(unknown)} are not known here, "
            "but null",
            stacklevel=6,
        )


def _is_in(value: Any, idle: tuple[Any, ...]) -> bool:
    return any(type(value) is type(each) and value == each for each in idle)
