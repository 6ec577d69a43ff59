"""Attention: who sees whom (mask), what is added (bias), how it is computed (mechanisms), and the layers."""

from easydel.layers.attention.bias import AttentionBias, KeyBias, RelativePositions, alibi_slopes, counted
from easydel.layers.attention.cross import CrossAttention
from easydel.layers.attention.latent import LatentAttention
from easydel.layers.attention.layer import Attention
from easydel.layers.attention.mask import AttentionMask
from easydel.layers.attention.mechanisms import attend

__all__ = [
    "Attention",
    "AttentionBias",
    "AttentionMask",
    "CrossAttention",
    "KeyBias",
    "LatentAttention",
    "RelativePositions",
    "alibi_slopes",
    "attend",
    "counted",
]
