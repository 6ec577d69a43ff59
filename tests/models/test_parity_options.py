"""Every family of the table: what may be computed in several ways comes to the same, and dropout is for training."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from tests.models.inputs import int32, pad
from tests.models.pairs import Jitted, Pair, close, load_ours, pair
from tests.models.table import FAMILIES, cases

FORWARD = 1e-4  # float32 in two libraries: sums in another order, through a dozen products
SAME = 1e-5  # the same sums here, arranged otherwise


@functools.cache
def logits_of(family: str, variant: str, mechanism: str) -> np.ndarray:
    case = pair(family, variant)
    ids, mask = pad(case.rows((19, 11, 1)), 19, left=True)
    model = load_ours(case.family, case.task, case.folder, attn_mechanism=mechanism, attn_block_size=4)
    return np.asarray(Jitted(model)(**case.inputs(ids, mask)).logits)[mask == 1]


@pytest.mark.proof("mechanisms")
@pytest.mark.parametrize(("family", "variant"), cases("mechanisms"))
def test_attention_mechanisms_agree(family: str, variant: str) -> None:
    want = logits_of(family, variant, "vanilla")
    for mechanism in ("auto", "blockwise"):
        close(logits_of(family, variant, mechanism), want, SAME, mechanism)


@pytest.mark.proof("sdpa")
@pytest.mark.parametrize(("family", "variant"), cases("sdpa"))
def test_jax_s_own_attention_agrees(family: str, variant: str) -> None:
    close(logits_of(family, variant, "sdpa"), logits_of(family, variant, "vanilla"), SAME)


@pytest.mark.proof("remat")
@pytest.mark.parametrize(("family", "variant"), cases("remat"))
def test_remat_changes_no_gradient(family: str, variant: str) -> None:
    check_remat(pair(family, variant), "full")


def test_remat_policies_agree() -> None:
    """What a policy keeps does not depend on the family: one with all biases stands for all."""
    for policy in ("full", "dots_no_batch", "dots"):
        check_remat(pair("llama", "head_dim"), policy)


def check_remat(case: Pair, policy: str) -> None:
    inputs = case.labelled(case.ids(2, 9))
    want_loss, want = case.run.gradient(**inputs)
    model = load_ours(case.family, case.task, case.folder, gradient_checkpointing=policy)
    loss, gradients = Jitted(model).gradient(**inputs)
    close(loss, want_loss, SAME, policy)
    named, wanted = (nnx.clone(case.ours).merge_params_dict(tree).to_torch() for tree in (gradients, want))
    for name, tensor in wanted.items():
        if name.endswith(case.family.cancelled):  # what is left is rounding: next to nothing beside its weight's
            largest = float(wanted[name.removesuffix("bias") + "weight"].abs().max())
            assert max(float(g.abs().max()) for g in (named[name], tensor)) <= SAME * largest, f"{policy}: {name}"
        else:
            close(named[name], tensor, SAME, f"{policy}: {name}")


@pytest.mark.proof("dropout")
@pytest.mark.parametrize(("family", "variant"), cases("dropout"))
def test_dropout_is_active_in_training_only(family: str, variant: str) -> None:
    rates = FAMILIES[family].dropout
    for rate in rates:
        case = pair(family, variant, **(dict.fromkeys(rates, 0.0) | {rate: 0.5}))
        inputs = case.inputs(case.ids(2, 9))
        close(case.run(**inputs).logits, case.theirs(**inputs).logits, FORWARD)
        pure, params = case.ours.pure_transform_fn(), case.ours.params
        draw = jax.jit(lambda key, pure=pure, params=params, inputs=inputs: pure(params, inputs, rngs=key).logits)
        one, same, other = (draw(jax.random.key(seed)) for seed in (0, 0, 1))
        np.testing.assert_array_equal(one, same)
        assert np.abs(np.asarray(one - other)).max() > 1e-2, rate


def test_dropout_keys_are_the_only_source_of_chance() -> None:
    case = pair("llama", "gqa", attention_dropout=0.5)
    pure, inputs = case.ours.pure_transform_fn(), {"input_ids": int32(case.ids(1, 4))}
    one, same = (pure(case.ours.params, inputs, rngs=jax.random.key(0)).logits for _ in range(2))
    np.testing.assert_array_equal(one, same)
