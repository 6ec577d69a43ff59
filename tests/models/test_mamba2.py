"""What is Mamba 2's own, and where transformers' results depend on how they are asked for."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.models.inputs import as_torch, pad
from tests.models.pairs import Jitted, close, load_hf, load_ours, pair
from tests.models.test_parity_generate import ours, theirs

SAME = 1e-5  # the same sums here, arranged otherwise


def test_positions_have_no_effect() -> None:
    case = pair("mamba2", "grouped")
    ids = case.ids(2, 9)
    moved = case.run(input_ids=ids, position_ids=ids).logits
    np.testing.assert_array_equal(moved, case.run(input_ids=ids).logits)


def test_there_are_no_attention_weights() -> None:
    out = pair("mamba2", "grouped").run(input_ids=pair("mamba2", "grouped").ids(1, 4), output_attentions=True)
    assert out.attentions is None


def test_bias_with_padding() -> None:
    """Each row of a padded batch gets the tokens that transformers gives it alone."""
    case = pair("mamba2", "biased")
    rows = case.rows((7, 3, 5))
    got = ours(case, *pad(rows, 7, left=True))[:, 7:]
    for tokens, row in zip(got, rows, strict=True):
        alone = theirs(case, row[None], np.ones_like(row[None]))
        np.testing.assert_array_equal(tokens, alone[0, len(row) :])


def test_limited_steps() -> None:
    """Cached tokens are those of transformers' uncached runs: its cached steps do not limit the time step."""
    case = pair("mamba2", "limited_steps")
    ids, mask = pad(case.rows((7, 3, 5)), 7, left=True)
    want = theirs(case, ids, mask, use_cache=False)
    np.testing.assert_array_equal(ours(case, ids, mask), want)
    assert (theirs(case, ids, mask) != want).any(), (
        "transformers' runs agree now: the reason to keep this apart has lapsed"
    )


@pytest.mark.parametrize("wide", [False, True])
def test_residuals_in_float32(wide: bool) -> None:
    case = pair("mamba2", "grouped", residual_in_fp32=wide)
    model = load_ours(case.family, case.task, case.folder, dtype="bfloat16")
    hf = load_hf(case.family, case.task, case.folder, dtype=torch.bfloat16)
    inputs = case.inputs(case.ids(2, 9)) | {"output_hidden_states": True}
    got = Jitted(model)(**inputs).hidden_states
    want = hf(**as_torch(inputs)).hidden_states
    assert [str(h.dtype) for h in got[:-1]] == [str(h.dtype).removeprefix("torch.") for h in want[:-1]]
    assert str(got[0].dtype) == ("float32" if wide else "bfloat16")


def test_the_cache_is_of_one_size() -> None:
    model = pair("mamba2", "grouped").ours

    def size(cache: object) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))

    short, long = (model.init_operations_cache(2, length) for length in (1, 1_000_000))
    assert short.valid is None
    assert size(short) == size(long) == size(short.grow(10**9))
    layer = (
        2 * (3 * (64 + 2 * 2 * 12) + 8 * 8 * 12) * 4
    )  # rows · (window · channels + heads · head_dim · state) · float32
    assert size(long) == 2 * layer + 4 + 2 * 4 + 2 * 4  # two layers; index, seen and starts


def test_a_masked_token_changes_nothing_in_a_step() -> None:
    case = pair("mamba2", "grouped")
    ids = case.ids(2, 6)
    cache = case.run(input_ids=ids[:, :5], cache=case.ours.init_operations_cache(2, 8)).cache
    after = case.run(input_ids=ids[:, :1], attention_mask=np.zeros((2, 1), np.int32), cache=cache).cache
    for old, new in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(after.layers), strict=True):
        np.testing.assert_array_equal(old, new)


def test_packed_and_padded_at_once() -> None:
    case = pair("mamba2", "grouped")
    one, two = case.rows((5, 7))
    gap = np.zeros(2, np.int32)
    ids = np.concatenate([gap, one, gap, two, gap])[None]
    segments = np.repeat([9, 4, 4, 6, 6], [2, 5, 2, 7, 2])[None].astype(np.int32)
    mask = np.repeat([0, 1, 0, 1, 0], [2, 5, 2, 7, 2])[None].astype(np.int32)
    logits = case.run(input_ids=ids, segment_ids=segments, attention_mask=mask).logits[0]
    close(logits[2:7], case.run(input_ids=one[None]).logits[0], SAME)
    close(logits[9:16], case.run(input_ids=two[None]).logits[0], SAME)


@pytest.mark.parametrize("length", [8, 16, 20])
def test_flops_are_the_formula(length: int) -> None:
    """Projections, head, and of each chunk: C·B, weights·x, C·state and what is written."""
    model = pair("mamba2", "grouped").ours
    c, chunk = model.config, 8
    inner, states, places = c.num_heads * c.head_dim, c.n_groups * c.state_size, -(-length // chunk) * chunk
    projections = length * c.hidden_size * (2 * inner + 2 * states + c.num_heads + inner)
    chunks = places * (chunk * states + chunk * inner + 2 * inner * c.state_size)
    want = 2 * (c.num_hidden_layers * (projections + chunks) + length * c.hidden_size * c.vocab_size)
    assert model._flop(c, 1, length) == want
    assert model.flops_per_token(1, length) == want / length


@pytest.mark.parametrize("written", ['{"__float__": "Infinity"}', "Infinity"])  # by transformers 5, and before
def test_a_limit_without_end_is_read(written: str, tmp_path: Path) -> None:
    case = pair("mamba2", "grouped")
    text = re.sub(r'\{\s*"__float__": "Infinity"\s*\}', written, (case.folder / "config.json").read_text())
    assert written in text
    (tmp_path / "config.json").write_text(text)
    assert case.ours.config == type(case.ours.config).from_pretrained(tmp_path)
    shutil.copy(case.folder / "model.safetensors", tmp_path)
    assert load_ours(case.family, case.task, tmp_path).config == case.ours.config


def test_half_precision_keeps_a_float32_state() -> None:
    case = pair("mamba2", "grouped")
    half = load_ours(case.family, case.task, case.folder, dtype="bfloat16")
    cache = half(input_ids=jnp.asarray(case.ids(1, 5)), cache=half.init_operations_cache(1, 8)).cache
    assert {str(layer.state.dtype) for layer in cache.layers} == {"float32"}
    assert {str(layer.window.dtype) for layer in cache.layers} == {"bfloat16"}
