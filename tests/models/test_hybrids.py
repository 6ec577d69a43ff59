"""What is the hybrids' own: caches of two kinds in one block, and where transformers' cached steps differ."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from easydel.caching import AttentionCache, Cache, CombinedCache, QuantizedStates, RecurrentCache
from tests.models.inputs import pad
from tests.models.pairs import close, load_ours, pair
from tests.models.test_parity_generate import ours, theirs

SAME = 1e-5  # the same sums here, arranged otherwise


def test_a_block_keeps_a_state_beside_keys_and_values() -> None:
    model = pair("falcon_h1", "gated").ours
    short, long = (model.init_operations_cache(2, length) for length in (8, 80))
    assert [type(part) for part in short.layers[0].parts] == [RecurrentCache, AttentionCache]
    assert short.max_length == 8
    sizes = [[sum(x.nbytes for x in jax.tree.leaves(part)) for part in c.layers[0].parts] for c in (short, long)]
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] == 10 * sizes[0][1]
    small = model.init_operations_cache(2, 8, dtype="int8").layers[0]
    assert isinstance(small.parts[1].key, QuantizedStates)
    assert str(small.parts[0].state.dtype) == "float32"


def test_such_a_cache_grows_moves_and_is_not_cut(tmp_path: Path) -> None:
    case = pair("falcon_h1", "gated")
    ids = case.ids(1, 9)
    want = np.asarray(case.run(input_ids=ids).logits)
    cache = case.run(input_ids=ids[:, :6], cache=case.ours.init_operations_cache(1, 8)).cache
    assert isinstance(cache.layers[0], CombinedCache)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(3)
    cache.crop(6).save(tmp_path)
    again = Cache.load(tmp_path).grow(12).shift(2).repeat(2)
    rest = case.run(input_ids=np.repeat(ids[:, 6:], 2, axis=0), cache=again)
    for row in rest.logits:
        close(row, want[0, 6:], SAME)


@pytest.mark.parametrize(("family", "variant"), [("bamba", "attention_first"), ("falcon_h1", "gated")])
def test_limited_steps(family: str, variant: str) -> None:
    """Cached tokens are those of transformers' uncached runs: its cached steps do not limit the time step."""
    case = pair(family, variant, time_step_limit=[0.5, 0.9])
    ids, mask = pad(case.rows((7, 3, 5)), 7, left=True)
    np.testing.assert_array_equal(
        ours(case, ids, mask, max_new_tokens=12), theirs(case, ids, mask, use_cache=False, max_new_tokens=12)
    )


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """Published files of Qwen3-Next hold them; transformers' model does not."""
    case = pair("qwen3_next", "gated")
    tensors = load_file(case.folder / "model.safetensors")
    save_file(tensors | {"mtp.layers.0.mlp.gate.weight": np.zeros((4, 32), np.float32)}, tmp_path / "model.safetensors")
    shutil.copy(case.folder / "config.json", tmp_path)
    model = load_ours(case.family, case.task, tmp_path)
    assert all(
        (one == two).all() for one, two in zip(*map(jax.tree.leaves, (model.params, case.ours.params)), strict=True)
    )
