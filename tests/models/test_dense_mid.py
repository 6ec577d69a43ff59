"""What the configs of these families fill in where transformers' own cannot go on."""

from __future__ import annotations

import pytest

import easydel


def test_nemotron_has_as_many_keys_as_queries_unless_told_otherwise() -> None:
    assert easydel.NemotronConfig(num_attention_heads=6).num_key_value_heads == 6
    assert easydel.NemotronConfig(num_attention_heads=6, num_key_value_heads=2).num_key_value_heads == 2


def test_exaone_4_without_a_window_is_full_everywhere() -> None:
    config = easydel.Exaone4Config(num_hidden_layers=3, sliding_window=None)
    assert config.layer_types == ["full_attention"] * 3
    with pytest.raises(ValueError, match="sliding_window_pattern='LLLG' does not say which layers slide"):
        easydel.Exaone4Config(sliding_window_pattern="LLLG")
