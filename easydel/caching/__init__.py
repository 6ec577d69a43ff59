"""Caches: what layers keep between calls, as pytrees that are updated without mutation."""

from easydel.caching.attention import AttentionCache
from easydel.caching.cache import Cache, LayerCache, caching_layers
from easydel.caching.combined import CombinedCache
from easydel.caching.cross import CrossAttentionCache, EncoderDecoderCache
from easydel.caching.latent import LatentCache
from easydel.caching.quantized import QuantizedStates
from easydel.caching.recurrent import RecurrentCache
from easydel.caching.sliding import SlidingCache
from easydel.caching.stacked import StackedCaches

__all__ = [
    "AttentionCache",
    "Cache",
    "CombinedCache",
    "CrossAttentionCache",
    "EncoderDecoderCache",
    "LatentCache",
    "LayerCache",
    "QuantizedStates",
    "RecurrentCache",
    "SlidingCache",
    "StackedCaches",
    "caching_layers",
]
