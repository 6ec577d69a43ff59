"""What is Phi-3's own: a cache that is long enough for its rotation to change says so."""

from __future__ import annotations

import warnings

import pytest

from tests.models.pairs import pair


def test_a_cache_past_the_original_length_warns() -> None:
    model = pair("phi3", "longrope").ours
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.init_operations_cache(batch_size=1, max_length=16).max_length == 16
    with pytest.warns(UserWarning, match="original_max_position_embeddings=16"):
        model.init_operations_cache(batch_size=1, max_length=17)
