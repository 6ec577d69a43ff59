"""Attention: who sees whom (mask), how it is computed (mechanisms), and the layer."""

from easydel.layers.attention.layer import Attention
from easydel.layers.attention.mask import AttentionMask
from easydel.layers.attention.mechanisms import attend

__all__ = ["Attention", "AttentionMask", "attend"]
