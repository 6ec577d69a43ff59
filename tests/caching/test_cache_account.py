"""`Cache`: the account of slots, tokens and positions, and growing."""

from __future__ import annotations

import numpy as np
import pytest

from easydel.caching import AttentionCache, Cache
from easydel.layers import AttentionMask


def empty(batch: int, length: int, starts: list[int] | None = None) -> Cache:
    layer = AttentionCache.create(batch, length, 2, 4, np.float32)
    return Cache.create((layer, layer), batch, length, np.asarray(starts or [0] * batch, np.int32))


def test_positions_count_tokens_only() -> None:
    cache = empty(3, 8, [2, 0, 0])
    mask = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]])
    cache, new, positions = cache.extend(mask, 3, 4)
    np.testing.assert_array_equal(new, [[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]])
    np.testing.assert_array_equal(positions, [[0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 1, 1]])
    cache, new, positions = cache.extend(None, 3, 2)
    assert np.asarray(new).all()
    np.testing.assert_array_equal(positions, [[2, 3], [3, 4], [2, 3]])
    assert int(cache.index) == 6
    np.testing.assert_array_equal(np.asarray(cache.valid).sum(axis=1), [4, 5, 4])
    assert not np.asarray(cache.valid)[:, 6:].any()


def test_starts_hold_across_several_calls() -> None:
    cache, positions = empty(2, 6, [3, 0]), []
    for _ in range(5):
        cache, _, position = cache.extend(None, 2, 1)
        positions.append(np.asarray(position)[:, 0])
    np.testing.assert_array_equal(np.stack(positions, axis=1), [[0, 0, 0, 0, 1], [0, 1, 2, 3, 4]])


def test_of_a_full_width_mask_the_last_columns_count() -> None:
    first, _, _ = empty(1, 8).extend(np.array([[0, 1, 1]]), 1, 3)
    full = first.extend(np.array([[0, 1, 1, 1, 0]]), 1, 2)
    new = first.extend(np.array([[1, 0]]), 1, 2)
    for one, other in zip(full[1:], new[1:], strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(full[0].valid, new[0].valid)


@pytest.mark.parametrize(
    ("mask", "batch", "length", "match"),
    [
        (None, 3, 1, "batch_size=2"),
        (None, 2, 4, "1 more|4 more do not fit"),
        (np.ones((2, 2)), 2, 3, "does not cover"),
        (np.ones((2, 3)), 2, 1, "width 3"),
    ],
)
def test_what_does_not_fit_raises(mask: np.ndarray | None, batch: int, length: int, match: str) -> None:
    cache, _, _ = empty(2, 8).extend(None, 2, 5)
    with pytest.raises(ValueError, match=match):
        cache.extend(mask, batch, length)


def test_a_recurrent_model_s_account_has_no_length() -> None:
    cache = Cache.create((), 2, None, np.asarray([1, 0], np.int32))
    assert cache.max_length is None
    for _ in range(3):
        cache, new, positions = cache.extend(None, 2, 4)
    assert np.asarray(new).all()
    np.testing.assert_array_equal(positions, [[7, 8, 9, 10], [8, 9, 10, 11]])
    assert cache.grow(100).index == 12


def test_keys_are_written_at_the_offset_and_nothing_else_changes() -> None:
    layer = AttentionCache.create(2, 6, 2, 4, np.float32)
    key, value = np.random.default_rng(0).normal(size=(2, 2, 3, 2, 4)).astype(np.float32)
    updated, keys, values, mask = layer.extend(key, value, AttentionMask(offset=np.int32(2)))
    for got, seen, want in ((updated.key, keys, key), (updated.value, values, value)):
        np.testing.assert_array_equal(got[:, 2:5], want)
        assert not np.asarray(got)[:, [0, 1, 5]].any()
        assert not np.asarray(seen)[:, :6].any(), "what was there before is not what came first"
        np.testing.assert_array_equal(seen[:, 6:], want)
    np.testing.assert_array_equal(mask.key_slots, [0, 1, -1, -1, -1, -1, 2, 3, 4])
    assert not np.asarray(layer.key).any(), "the old cache was changed"


def test_first_tokens_see_one_another_only() -> None:
    layer = AttentionCache.create(2, 6, 2, 4, np.float32)
    key = np.ones((2, 3, 2, 4), np.float32)
    valid = np.asarray([[False, True, True, False, False, False]] * 2)
    updated, keys, _, mask = layer.extend(key, key, AttentionMask(key_valid=valid))
    assert keys.shape[1] == mask.key_valid.shape[1] == 3
    np.testing.assert_array_equal(updated.key[:, :3], key)
    assert not np.asarray(updated.key)[:, 3:].any()


def test_the_cache_keeps_its_dtype() -> None:
    ones = np.ones((1, 1, 1, 2), np.float32)
    layer, keys, _, _ = AttentionCache.create(1, 4, 1, 2, "bfloat16").extend(
        ones, ones, AttentionMask(offset=np.int32(0))
    )
    assert str(layer.key.dtype) == str(layer.value.dtype) == "bfloat16"
    assert keys.dtype == np.float32


def test_grow() -> None:
    cache, _, _ = empty(2, 4, [1, 0]).extend(None, 2, 3)
    key = np.random.default_rng(0).normal(size=(2, 3, 2, 4)).astype(np.float32)
    cache = cache.with_layers(tuple(layer.extend(key, key, AttentionMask())[0] for layer in cache.layers))
    grown = cache.grow(9)
    assert grown.max_length == 9
    assert int(grown.index) == 3
    np.testing.assert_array_equal(grown.valid[:, :4], cache.valid)
    assert not np.asarray(grown.valid)[:, 4:].any()
    for layer in grown.layers:
        assert layer.key.shape == (2, 9, 2, 4)
        np.testing.assert_array_equal(layer.key[:, :3], key)
        np.testing.assert_array_equal(layer.value[:, :3], key)
    np.testing.assert_array_equal(grown.extend(None, 2, 1)[2], [[2], [3]])
    assert cache.grow(4).max_length == 4
    with pytest.raises(ValueError, match="cannot grow to 3"):
        cache.grow(3)
