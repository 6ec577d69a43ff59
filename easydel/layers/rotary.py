"""Rotary position embeddings (arXiv:2104.09864) with every scaling that transformers knows.

The scalings change the inverse frequencies; they are computed once, in float32 like transformers' own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easydel.errors import UnsupportedError

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


class RotaryEmbedding:
    """Cosines and sines of positions. Holds settings only (static, hashable), no variables.

    Args:
        parameters: `config.rope_parameters`: `rope_type`, `rope_theta` and what the type needs.
        head_dim: size of a head; `partial_rotary_factor` of it is rotated.
        max_position_embeddings: the longest sequence the unscaled frequencies were made for.
        partial: whether the family heeds `partial_rotary_factor`. If not, heads are rotated whole, and a scaled
            `rope_type` with a factor below one is refused.

    Raises:
        UnsupportedError: an unknown `rope_type`, or a partial rotation that the family does not have.
        ValueError: a parameter that the type needs is missing.
    """

    def __init__(
        self, parameters: Mapping[str, Any], *, head_dim: int, max_position_embeddings: int, partial: bool = True
    ) -> None:
        settings = {key: value for key, value in parameters.items() if value is not None}
        self.rope_type = settings.get("rope_type", settings.get("type", "default"))
        if self.rope_type not in ROPE_TYPES:
            raise UnsupportedError(f"rope_type {self.rope_type!r} is not supported; known: {', '.join(ROPE_TYPES)}")
        if "rope_theta" not in settings:
            raise ValueError(f"rope_parameters lack 'rope_theta': got {dict(parameters)}")
        factor = settings.get("partial_rotary_factor", 1.0)
        if not partial and factor != 1 and self.rope_type != "default":
            raise UnsupportedError(
                f"partial_rotary_factor={factor} with rope_type {self.rope_type!r} is not supported by this family"
            )
        self.dim = int(head_dim * factor) if partial else head_dim
        self.max_position_embeddings = max_position_embeddings
        # A tuple: the object is part of a module's static, hashable structure.
        self._items = tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in settings.items()))
        try:
            self._inverse_frequencies()
        except KeyError as error:
            raise ValueError(f"rope_type {self.rope_type!r} needs rope_parameters[{error}]: got {settings}") from error

    @property
    def settings(self) -> dict[str, Any]:
        """The rope parameters that are set."""
        return dict(self._items)

    def _key(self) -> tuple[Any, ...]:
        return self.dim, self.max_position_embeddings, self._items

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RotaryEmbedding) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __call__(self, positions: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Return cosines and sines, `[batch, seq, dim]` in `dtype`, of int32 positions `[batch, seq]`."""
        inverse, scaling = self.frequencies(positions)
        angles = positions[..., None].astype(jnp.float32) * inverse
        cosines, sines = ((of(angles) * scaling).astype(dtype) for of in (jnp.cos, jnp.sin))
        return jnp.concatenate([cosines, cosines], axis=-1), jnp.concatenate([sines, sines], axis=-1)

    def frequencies(self, positions: jax.Array) -> tuple[jax.Array | np.ndarray, Any]:
        """Return inverse frequencies, float32 `[dim / 2]`, and the factor of cosines and sines, at these positions."""
        frequencies, scaling = self._inverse_frequencies()
        inverse: jax.Array | np.ndarray = frequencies
        if self.rope_type == "dynamic":
            inverse = self._dynamic(jnp.max(positions) + 1)
        elif self.rope_type == "longrope":
            longest = jnp.max(positions) + 1
            original = self.settings["original_max_position_embeddings"]
            inverse = jnp.where(longest > original, self._longrope("long_factor")[0], frequencies)
        return inverse, scaling

    def _inverse_frequencies(self) -> tuple[np.ndarray, float]:
        """Return the inverse frequencies, float32 `[dim / 2]`, and the factor of cosines and sines."""
        if self.rope_type == "linear":
            return self._default() / np.float32(self.settings["factor"]), 1.0
        if self.rope_type == "yarn":
            return self._yarn()
        if self.rope_type == "longrope":
            return self._longrope("short_factor")
        if self.rope_type == "llama3":
            return self._llama3(), 1.0
        if self.rope_type == "dynamic":
            _ = self.settings["factor"]
        return self._default(), 1.0

    def _powers(self) -> np.ndarray:
        base = np.float32(self.settings["rope_theta"])
        return base ** (np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim))

    def _default(self) -> np.ndarray:
        return np.float32(1.0) / self._powers()

    def _dynamic(self, length: jax.Array) -> jax.Array:
        """NTK scaling whose base grows with the sequence once it is longer than the original."""
        settings, longest = self.settings, self.max_position_embeddings
        length = jnp.maximum(length, longest).astype(jnp.float32)
        growth = settings["factor"] * length / longest - (settings["factor"] - 1)
        base = settings["rope_theta"] * growth ** (self.dim / (self.dim - 2))
        return 1.0 / base ** (jnp.arange(0, self.dim, 2, dtype=jnp.float32) / self.dim)

    def _llama3(self) -> np.ndarray:
        """Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated."""
        settings, plain = self.settings, self._default()
        low, high = settings["low_freq_factor"], settings["high_freq_factor"]
        original = settings["original_max_position_embeddings"]
        wavelength = 2 * math.pi / plain
        keep = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
        return ((1 - keep) * plain / settings["factor"] + keep * plain).astype(np.float32)

    def _longrope(self, which: str) -> tuple[np.ndarray, float]:
        """LongRoPE (arXiv:2402.13753): a factor per frequency, one set for short and one for long sequences."""
        settings = self.settings
        original = settings["original_max_position_embeddings"]
        factor = settings.get("factor", self.max_position_embeddings / original)
        scaling = settings.get("attention_factor")
        if scaling is None:
            scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        factors = np.asarray(settings[which], np.float32)
        if factors.shape != (self.dim // 2,):
            raise ValueError(f"longrope: {which} needs {self.dim // 2} numbers, got {factors.size}")
        return np.float32(1.0) / (factors * self._powers()), scaling

    def _yarn(self) -> tuple[np.ndarray, float]:
        """YaRN (arXiv:2309.00071): slow frequencies are interpolated, fast ones kept, a ramp between."""
        settings = self.settings
        original = settings["original_max_position_embeddings"]
        factor = settings.get("factor", self.max_position_embeddings / original)

        def dimension(rotations: float) -> float:
            turns = math.log(original / (rotations * 2 * math.pi))
            return self.dim * turns / (2 * math.log(settings["rope_theta"]))

        low, high = dimension(settings.get("beta_fast") or 32), dimension(settings.get("beta_slow") or 1)
        if settings.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        width = high - low or 0.001
        ramp = np.clip((np.arange(self.dim // 2, dtype=np.float32) - low) / width, 0.0, 1.0)
        plain = self._default()
        return (plain / np.float32(factor) * ramp + plain * (1 - ramp)).astype(np.float32), _yarn_scaling(
            settings, factor
        )


@dataclass(frozen=True)
class RotaryByKind:
    """Cosines and sines of positions for each kind of layer. Static and hashable, as `RotaryEmbedding` is.

    Attributes:
        kinds: pairs of a kind's name and its embedding.
    """

    kinds: tuple[tuple[str, RotaryEmbedding], ...]

    def __call__(self, positions: jax.Array, dtype: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Return for each kind what its embedding gives for int32 positions `[batch, seq]`."""
        return {kind: embedding(positions, dtype) for kind, embedding in self.kinds}


def _yarn_scaling(settings: Mapping[str, Any], factor: float) -> float:
    if settings.get("attention_factor") is not None:
        return settings["attention_factor"]

    weight, weight_all = settings.get("mscale"), settings.get("mscale_all_dim")
    return _magnitude(factor, weight) / _magnitude(factor, weight_all) if weight and weight_all else _magnitude(factor)


def _magnitude(factor: float, weight: float = 1.0) -> float:
    """Return by how much queries and keys must grow where positions are stretched by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def attention_magnitude(parameters: Mapping[str, Any]) -> float:
    """Return the factor of all of attention's products in families that heed `mscale_all_dim` of `rope_parameters`.

    `mscale_all_dim` is the weight with which queries and keys grow whole, the features that are not rotated included;
    cosines and sines are divided by as much (DeepSeek-V2, arXiv:2405.04434, section 3.1.4).

    Raises:
        ValueError: there is no `factor` by which positions are stretched.
    """
    weight = parameters.get("mscale_all_dim")
    if not weight or parameters.get("rope_type", "default") == "default":
        return 1.0
    if parameters.get("factor") is None:
        raise ValueError(f"rope_parameters with mscale_all_dim={weight} need a 'factor', got {dict(parameters)}")
    return _magnitude(parameters["factor"], weight) ** 2


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Rotate heads.

    Args:
        x: `[batch, seq, heads, head_dim]`; its first `dim` features are rotated.
        cos: `[batch, seq, dim]`, the numbers of the first half once more in the second.
        sin: likewise.
        interleaved: which features turn together: each with its neighbour, or (by default) with the one half of `dim`
            further on.

    Returns:
        heads of the dtype they had; between, they are as wide as `cos` and `sin`.
    """
    dim = cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    if interleaved:
        cos, sin = cos[..., : dim // 2], sin[..., : dim // 2]
        first, second = turned[..., 0::2], turned[..., 1::2]
        pairs = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        turned = pairs.reshape(turned.shape)
    else:
        first, second = jnp.split(turned, 2, axis=-1)
        turned = turned * cos + jnp.concatenate([-second, first], axis=-1) * sin
    turned = turned.astype(x.dtype)
    return turned if rest.shape[-1] == 0 else jnp.concatenate([turned, rest], axis=-1)
