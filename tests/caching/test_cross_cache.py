"""The cache of a decoder block: its own part grows, the encoder's stays."""

from __future__ import annotations

import jax
import numpy as np

from easydel.caching import AttentionCache, Cache, CrossAttentionCache, EncoderDecoderCache, RecurrentCache


def test_only_its_own_part_grows() -> None:
    states = np.ones((2, 7, 2, 4), np.float32)
    cross = CrossAttentionCache(states, states, np.ones((2, 7), bool))
    layer = EncoderDecoderCache(AttentionCache.create(2, 3, 2, 4, np.float32), cross)
    cache = Cache.create((layer,), 2, 3, np.zeros(2, np.int32)).grow(9)
    assert cache.max_length == 9
    assert cache.layers[0].own.key.shape[1] == 9
    assert cache.layers[0].cross.key is states
    assert layer.keeps_slots


def test_empty_it_holds_no_arrays() -> None:
    assert jax.tree.leaves(CrossAttentionCache()) == []


def test_beside_a_recurrent_state_there_is_no_longest_sequence() -> None:
    own = RecurrentCache.create(2, 3, 6, (2, 4, 5), np.float32)
    layer = EncoderDecoderCache(own, CrossAttentionCache())
    assert not layer.keeps_slots
    assert layer.grow(10**9).own is own
