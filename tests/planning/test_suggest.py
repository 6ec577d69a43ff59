"""Meshes that are suggested fit, and what does not fit is said."""

from __future__ import annotations

import pytest

from easydel import LlamaConfig, MixtralConfig, suggest_mesh
from easydel.planning.suggest import _meshes
from tests.models.table import FAMILIES

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "scan_layers": True,
}


def test_with_room_nothing_is_gathered_or_recomputed():
    (best,) = suggest_mesh(LlamaConfig(**SHAPE), 8, "80GB", sequence_length=16, count=1)
    assert best.axes["fsdp"] == best.axes["ep"] == 1
    assert best.plan.flops_per_step["recomputation"][best.remat] == 0
    assert best.plan.fits(80 * 10**9)


def test_with_little_room_parameters_are_split():
    """Parameters, gradients and AdamW's moments take 2.3 MB on one device."""
    room = 1_500_000
    found = suggest_mesh(LlamaConfig(**SHAPE), 8, room, sequence_length=16, remat="full", count=2)
    assert all(suggestion.plan.fits(room) and suggestion.axes["dp"] < 8 for suggestion in found)
    per_row = [suggestion.collective_bytes / suggestion.plan.batch_size for suggestion in found]
    assert per_row == sorted(per_row)


def test_what_fits_nowhere_is_refused_with_what_is_missing():
    with pytest.raises(ValueError, match=r"no mesh of 8 devices with 1\.0 kB .*lacks at least .*kB"):
        suggest_mesh(LlamaConfig(**SHAPE), 8, "1KB", sequence_length=16)


def test_axes_divide_what_they_split():
    for axes in _meshes(LlamaConfig(**SHAPE), 64, 0):
        assert axes["tp"] in (1, 2)  # two key/value heads
        assert axes["ep"] == 1
    mixtral = list(_meshes(MixtralConfig(**FAMILIES["mixtral"].config), 8, 8))
    assert {axes["ep"] for axes in mixtral} > {1}
    with pytest.raises(ValueError, match="batch_size=3"):
        suggest_mesh(LlamaConfig(**SHAPE), 8, "1GB", batch_size=3)


@pytest.mark.parametrize(
    ("devices", "memory", "words"), [(0, "1GB", "devices"), (8, "much", "memory='much'"), (8, -1, "memory=-1")]
)
def test_bad_questions_are_refused(devices, memory, words):
    with pytest.raises(ValueError, match=words):
        suggest_mesh(LlamaConfig(**SHAPE), devices, memory)
