"""What LoRA adapters are to be like."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (arXiv:2106.09685): `W x` becomes `W x + scale · B A x`, with `A` and `B` of a low rank.

    Attributes:
        rank: of the adapters.
        alpha: `scale` is `alpha / rank`, or `alpha / sqrt(rank)`.
        pattern: regular expression on module paths; `None`: all linear layers and experts but the head.
        dropout: rate, of the adapters' inputs in training; embeddings have none, their inputs are ids.
        use_rslora: scale by `alpha / sqrt(rank)` (rsLoRA, arXiv:2312.03732).
        use_dora: learn the magnitude of each output's weights apart from their direction (DoRA, arXiv:2402.09353).
        rank_pattern: regular expression on module paths → rank of those layers, the first that is found wins.
        alpha_pattern: likewise their alpha.
        embeddings: whether the pattern chooses embeddings, too.
        fused: layers that are one tensor in Hugging Face's files (GPT-2's q, k and v) share one `A`, as one layer does.
        modules_to_save: regular expressions on module paths; those modules are trained whole, and saved with the
            adapters.

    Raises:
        ValueError: a rank below 1, a dropout outside of `[0, 1)`, an alpha that is no finite number, or a pattern that
            is no regular expression.
    """

    rank: int = 8
    alpha: float = 16
    pattern: str | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    embeddings: bool = False
    fused: bool = False
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_rank("lora_rank", self.rank)
        _check_alpha("lora_alpha", self.alpha)
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"lora_dropout={self.dropout!r}: expected a rate of at least 0 and below 1")
        for name in ("use_rslora", "use_dora", "embeddings", "fused"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected True or False")
        _check_pattern("lora_pattern", self.pattern)
        if isinstance(self.modules_to_save, str) or not isinstance(self.modules_to_save, Sequence):
            raise ValueError(f"modules_to_save={self.modules_to_save!r}: expected a list of regular expressions")
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))
        for each in self.modules_to_save:
            _check_pattern("modules_to_save", each)
        checks: dict[str, Any] = {"rank_pattern": _check_rank, "alpha_pattern": _check_alpha}
        for name, check in checks.items():
            values = getattr(self, name)
            if not isinstance(values, Mapping):
                raise ValueError(f"{name}={values!r}: expected a mapping of regular expressions of module paths")
            for pattern, value in values.items():
                _check_pattern(name, pattern)
                check(f"{name}[{pattern!r}]", value)
            object.__setattr__(self, name, dict(values))  # nobody else's

    def rank_of(self, path: str) -> int:
        """Return the rank of the layer at a path."""
        return _first(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float:
        """Return the alpha of the layer at a path."""
        return _first(self.alpha_pattern, path, self.alpha)

    def scale_of(self, path: str) -> float:
        """Return what `B A x` is multiplied by in the layer at a path."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as what `json` can write."""
        return asdict(self) | {"modules_to_save": list(self.modules_to_save)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Read what `to_dict` gave.

        Raises:
            ValueError: unknown fields, or values as for the constructor.
        """
        known = {each.name for each in fields(cls)}
        if unknown := sorted(content.keys() - known):
            raise ValueError(f"LoraConfig has no field {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**content)


def _first(patterns: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    return next((value for pattern, value in patterns.items() if re.search(pattern, path)), otherwise)


def _check_rank(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: the rank of an adapter must be an integer of at least 1")


def _check_alpha(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: expected a finite number")


def _check_pattern(name: str, value: Any) -> None:
    if value is None and name == "lora_pattern":
        return
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r}: expected a regular expression of module paths")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{name}: {value!r} is not a regular expression: {error}") from error
