"""Dropout that is off until a model is trained."""

from __future__ import annotations

from flax import nnx


def make_dropout(rate: float, rngs: nnx.Rngs | None) -> nnx.Dropout:
    """Return a dropout layer, off until `train()` or `rngs`; at rate 0 it never draws and keeps no keys."""
    return nnx.Dropout(rate, deterministic=True, rngs=rngs if rate else None)
