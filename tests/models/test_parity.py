"""Every family of the table against transformers: the forward pass, its loss and its gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.pairs import Jitted, as_torch, close, int32, load_ours, pad, pair
from tests.models.table import cases

FORWARD = 1e-4  # float32 in two libraries: sums in another order, through a dozen products
SAME = 1e-5  # the same sums here, arranged otherwise


@pytest.mark.parametrize(("family", "variant"), cases())
def test_logits_hidden_states_and_attentions(family: str, variant: str) -> None:
    case = pair(family, variant)
    for length in case.variant.lengths:
        ids = case.ids(2, length)
        options = {"output_hidden_states": True, "output_attentions": True}
        got, want = case.run(input_ids=ids, **options), case.theirs(input_ids=ids, **options)
        close(got.logits, want.logits, FORWARD, "logits")
        for name in ("hidden_states", "attentions"):
            assert len(got[name]) == len(want[name]), name
            for layer, (one, other) in enumerate(zip(got[name], want[name], strict=True)):
                close(one, other, FORWARD, f"{name}[{layer}]")


@pytest.mark.parametrize(("family", "variant"), cases("padding"))
def test_padded_equals_alone(family: str, variant: str) -> None:
    case = pair(family, variant)
    rows = [case.ids(1, length, seed=length)[0] for length in (5, 11, 8)]
    (left, left_mask), (right, right_mask) = (pad(rows, 11, left=left) for left in (True, False))
    ids, mask = np.concatenate([left, right]), np.concatenate([left_mask, right_mask])
    logits = np.asarray(case.run(input_ids=ids, attention_mask=mask).logits)
    alone = case.run(input_ids=rows[0][None]).logits[0]
    for index in range(6):
        kept = logits[index][mask[index] == 1]
        close(kept, case.theirs(input_ids=rows[index % 3][None]).logits[0], FORWARD, f"row {index} and transformers")
        if index % 3 == 0:
            close(kept, alone, SAME, f"row {index} and alone")


@pytest.mark.parametrize(("family", "variant"), cases("thorough"))
def test_base_model_loads_the_same_checkpoint(family: str, variant: str) -> None:
    case = pair(family, variant)
    base = load_ours(case.family, "base", case.folder)
    ids = case.ids(2, 13)
    want = case.theirs(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    close(Jitted(base)(input_ids=ids).last_hidden_state, want, FORWARD)


@pytest.mark.parametrize(("family", "variant"), cases("thorough"))
def test_positions_embeddings_and_segments(family: str, variant: str) -> None:
    case = pair(family, variant)
    ids = case.ids(2, 12)
    positions = np.sort(np.random.default_rng(1).permutation(40)[:12])[None].repeat(2, 0).astype(np.int32)
    # With a mask of ones: without, transformers reads jumps of the positions as borders of packed sequences.
    want = case.theirs(input_ids=ids, position_ids=positions, attention_mask=np.ones_like(ids)).logits
    close(case.run(input_ids=ids, position_ids=positions).logits, want, FORWARD, "position_ids")
    plain = case.theirs(input_ids=ids).logits
    assert (plain - want).abs().max() > 1e-2, "positions have no effect"

    embeds = case.hf.get_input_embeddings().weight.detach().numpy()[ids]
    close(case.run(inputs_embeds=embeds).logits, plain, FORWARD, "inputs_embeds")

    segments = np.array([[0] * 5 + [1] * 7, [3] * 9 + [1] * 3], np.int32)
    packed = case.run(input_ids=ids, segment_ids=segments).logits
    for row, border in ((0, 5), (1, 9)):
        for part in (slice(0, border), slice(border, 12)):
            alone = case.theirs(input_ids=ids[row : row + 1, part]).logits[0]
            close(packed[row, part], alone, FORWARD, f"row {row}, segment {part}")


@pytest.mark.parametrize(("family", "variant"), cases("thorough"))
def test_loss_and_gradients(family: str, variant: str) -> None:
    case = pair(family, variant)
    ids, mask = pad([case.ids(1, 14)[0], case.ids(1, 9, seed=1)[0]], 14, left=False)
    labels = np.where((mask == 0) | (np.random.default_rng(2).random(ids.shape) < 0.2), -100, ids).astype(np.int32)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}

    case.hf.zero_grad()
    want = case.hf(**as_torch(inputs)).loss
    want.backward()
    loss, gradients = case.run.gradient(**inputs)
    assert loss.dtype == jnp.float32
    close(loss, want, 1e-5, "loss")
    logits = case.run(input_ids=ids, attention_mask=mask).logits
    close(case.ours.compute_loss(labels=int32(labels), logits=logits)[0], want, 1e-5, "compute_loss")

    named = nnx.clone(case.ours).merge_params_dict(gradients).to_torch()
    largest = max(float(p.grad.abs().max()) for p in case.hf.parameters())
    for name, parameter in case.hf.named_parameters():
        # A gradient that is next to nothing is compared with the others' size.
        scale = max(float(parameter.grad.abs().max()), 1e-3 * largest)
        error = float((named[name] - parameter.grad).abs().max()) / scale
        assert error <= FORWARD, f"{name}: relative error {error:.2e}"


def test_padding_token_s_embedding_is_not_trained() -> None:
    """transformers' embedding takes no gradient at `padding_idx`, wherever the token stands."""
    case = pair("llama", "gqa", "causal-lm", '{"pad_token_id": 7}')
    ids = case.ids(2, 12)
    ids[:, 3] = 7
    case.hf.zero_grad()
    case.hf(**as_torch({"input_ids": ids, "labels": ids})).loss.backward()
    _, gradients = case.run.gradient(input_ids=ids, labels=ids)
    close(gradients["model"]["embed_tokens"]["embedding"], case.hf.get_input_embeddings().weight.grad, FORWARD)


def test_attention_mechanisms_agree() -> None:
    case = pair("llama", "gqa")
    rows = [case.ids(1, length, seed=length)[0] for length in (19, 11, 1)]
    ids, mask = pad(rows, 19, left=True)
    results = {}
    for mechanism in ("vanilla", "auto", "sdpa", "blockwise"):
        model = load_ours(case.family, "causal-lm", case.folder, attn_mechanism=mechanism, attn_block_size=4)
        results[mechanism] = np.asarray(Jitted(model)(input_ids=ids, attention_mask=mask).logits)[mask == 1]
        close(results[mechanism], results["vanilla"], SAME, mechanism)


def test_remat_policies_agree() -> None:
    case = pair("llama", "head_dim")
    ids = case.ids(2, 9)
    want_loss, want = case.run.gradient(input_ids=ids, labels=ids)
    for policy in ("full", "dots_no_batch", "dots"):
        model = load_ours(case.family, "causal-lm", case.folder, gradient_checkpointing=policy)
        loss, gradients = Jitted(model).gradient(input_ids=ids, labels=ids)
        close(loss, want_loss, SAME, policy)
        named = nnx.clone(case.ours).merge_params_dict(gradients).to_torch()
        for name, tensor in nnx.clone(case.ours).merge_params_dict(want).to_torch().items():
            close(named[name], tensor, SAME, f"{policy}: {name}")


def test_attention_dropout_is_active_in_training_only() -> None:
    case = pair("llama", "gqa", "causal-lm", '{"attention_dropout": 0.5}')
    ids = case.ids(2, 9)
    close(case.run(input_ids=ids).logits, case.theirs(input_ids=ids).logits, FORWARD)
    pure, params = case.ours.pure_transform_fn(), case.ours.params
    draw = jax.jit(lambda key: pure(params, {"input_ids": int32(ids)}, rngs=key).logits)
    one, same, other = (draw(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(np.asarray(one - other)).max() > 1e-2


def test_dropout_keys_are_the_only_source_of_chance() -> None:
    case = pair("llama", "gqa", "causal-lm", '{"attention_dropout": 0.5}')
    pure, inputs = case.ours.pure_transform_fn(), {"input_ids": int32(case.ids(1, 4))}
    one, same = (pure(case.ours.params, inputs, rngs=jax.random.key(0)).logits for _ in range(2))
    np.testing.assert_array_equal(one, same)
