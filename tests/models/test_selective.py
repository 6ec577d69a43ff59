"""What is Mamba's own, and where transformers' results depend on how they are asked for."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from easydel.caching import AttentionCache, RecurrentCache
from tests.models.inputs import pad
from tests.models.pairs import close, load_ours, pair
from tests.models.test_parity_generate import ours, theirs

SAME = 1e-5  # the same sums here, arranged otherwise


@pytest.mark.parametrize(("family", "variant"), [("mamba", "silu"), ("jamba", "mixed")])
def test_positions_have_no_effect(family: str, variant: str) -> None:
    case = pair(family, variant)
    ids = case.ids(2, 9)
    np.testing.assert_array_equal(case.run(input_ids=ids, position_ids=ids).logits, case.run(input_ids=ids).logits)


def test_there_are_no_attention_weights() -> None:
    case = pair("mamba", "silu")
    assert case.run(input_ids=case.ids(1, 4), output_attentions=True).attentions is None


def test_bias_with_padding() -> None:
    """Each row of a padded batch gets the tokens that transformers gives it alone: it convolves the padding's bias."""
    case = pair("mamba", "biased")
    rows = case.rows((7, 3, 5))
    got = ours(case, *pad(rows, 7, left=True))[:, 7:]
    for tokens, row in zip(got, rows, strict=True):
        alone = theirs(case, row[None], np.ones_like(row[None]))
        np.testing.assert_array_equal(tokens, alone[0, len(row) :])


def test_the_cache_is_of_one_size() -> None:
    model = pair("mamba", "silu").ours

    def size(cache: object) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))

    short, long = (model.init_operations_cache(2, length) for length in (1, 1_000_000))
    assert short.valid is None
    assert size(short) == size(long) == size(short.grow(10**9))
    layer = 2 * (3 * 64 + 64 * 8) * 4  # rows · (window · channels + channels · state_size) · float32
    assert size(long) == 2 * layer + 4 + 2 * 4 + 2 * 4  # two layers; index, seen and starts


def test_a_mixed_model_keeps_what_each_layer_needs() -> None:
    cache = pair("jamba", "mixed").ours.init_operations_cache(2, 50)
    assert [type(layer) for layer in cache.layers] == [RecurrentCache, AttentionCache]
    assert cache.max_length == 50
    assert cache.layers[0].state.shape == (2, 64, 1, 8)
    assert cache.layers[1].key.shape == (2, 50, 2, 8)


def test_balancing_loss_counts_the_layers_with_experts() -> None:
    case = pair("jamba", "mixed", output_router_logits=True, router_aux_loss_coef=0.5)
    inputs = case.labelled(*pad(case.rows((12, 7)), 12, left=False))
    got, want = case.run(**inputs), case.theirs(**inputs)
    close(got.auxiliary_loss, want.aux_loss, SAME)
    close(got.loss, want.loss, SAME)
    assert len(got.router_logits) == 1


def test_a_masked_token_changes_nothing_in_a_step() -> None:
    case = pair("mamba", "silu")
    ids = case.ids(2, 6)
    cache = case.run(input_ids=ids[:, :5], cache=case.ours.init_operations_cache(2, 8)).cache
    after = case.run(input_ids=ids[:, :1], attention_mask=np.zeros((2, 1), np.int32), cache=cache).cache
    for old, new in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(after.layers), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(("family", "variant"), [("mamba", "biased"), ("jamba", "mixed")])
def test_packed_and_padded_at_once(family: str, variant: str) -> None:
    case = pair(family, variant)
    one, two = case.rows((5, 7))
    gap = np.zeros(2, np.int32)
    ids = np.concatenate([gap, one, gap, two, gap])[None]
    segments = np.repeat([9, 4, 4, 6, 6], [2, 5, 2, 7, 2])[None].astype(np.int32)
    mask = np.repeat([0, 1, 0, 1, 0], [2, 5, 2, 7, 2])[None].astype(np.int32)
    logits = case.run(input_ids=ids, segment_ids=segments, attention_mask=mask).logits[0]
    close(logits[2:7], case.run(input_ids=one[None]).logits[0], SAME)
    close(logits[9:16], case.run(input_ids=two[None]).logits[0], SAME)


def test_a_checkpoint_as_first_published(tmp_path: Path) -> None:
    case = pair("mamba", "silu")
    tensors = load_file(case.folder / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((case.folder / "config.json").read_text())
    again = load_ours(case.family, case.task, tmp_path)
    for new, old in zip(jax.tree.leaves(again.params), jax.tree.leaves(case.ours.params), strict=True):
        np.testing.assert_array_equal(new, old)


def test_half_precision_keeps_a_float32_state() -> None:
    case = pair("mamba", "silu")
    half = load_ours(case.family, case.task, case.folder, dtype="bfloat16")
    ids, cache = jnp.asarray(case.ids(1, 5)), half.init_operations_cache(1, 8)
    after = jax.eval_shape(lambda cache: half(input_ids=ids, cache=cache).cache, cache)
    assert {str(layer.state.dtype) for layer in after.layers} == {"float32"}
    assert {str(layer.window.dtype) for layer in after.layers} == {"bfloat16"}
