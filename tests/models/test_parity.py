"""Every family of the table against transformers: the forward pass, its loss and its gradients."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.inputs import as_torch, int32, pad
from tests.models.pairs import Jitted, close, load_hf, load_ours, pair, same_outputs
from tests.models.table import cases

FORWARD = 1e-4  # float32 in two libraries: sums in another order, through a dozen products
SAME = 1e-5  # the same sums here, arranged otherwise


@pytest.mark.proof("outputs")
@pytest.mark.proof("attentions", of="attentions")
@pytest.mark.parametrize(("family", "variant"), cases("outputs"))
def test_logits_hidden_states_and_attentions(family: str, variant: str) -> None:
    case = pair(family, variant)
    parts = ["hidden_states", "attentions"] if (family, variant) in cases("attentions") else ["hidden_states"]
    options = {f"output_{part}": True for part in parts}
    for length in case.variant.lengths:
        inputs = case.inputs(case.ids(2, length)) | options
        compared = same_outputs(case.run(**inputs), case.theirs(**inputs), FORWARD)
        for part in ("logits", *parts):
            assert any(name.endswith(part) for name in compared), f"{part} were not compared"


@pytest.mark.proof("padding")
@pytest.mark.parametrize(("family", "variant"), cases("padding"))
def test_padded_equals_alone(family: str, variant: str) -> None:
    case = pair(family, variant)
    rows = case.rows((5, 11, 8))
    (left, left_mask), (right, right_mask) = (pad(rows, 11, left=left) for left in (True, False))
    ids, mask = np.concatenate([left, right]), np.concatenate([left_mask, right_mask])
    logits = np.asarray(case.run(**case.inputs(ids, mask)).logits)
    alone = case.run(**case.inputs(rows[0][None])).logits[0]
    for index in range(6):
        kept = logits[index][mask[index] == 1]
        want = case.theirs(**case.inputs(rows[index % 3][None])).logits[0]
        close(kept, want, FORWARD, f"row {index} and transformers")
        if index % 3 == 0:
            close(kept, alone, SAME, f"row {index} and alone")


@pytest.mark.proof("base")
@pytest.mark.parametrize(("family", "variant"), cases("base"))
def test_base_model_loads_the_same_checkpoint(family: str, variant: str) -> None:
    case = pair(family, variant)
    theirs = load_hf(case.family, "base", case.folder)
    ours = load_ours(case.family, "base", case.folder, allow_new=case.family.new_in_base)
    inputs = case.inputs(case.ids(2, 13))
    want = theirs(**as_torch(inputs)).last_hidden_state
    close(Jitted(ours)(**inputs).last_hidden_state, want, FORWARD)


@pytest.mark.proof("positions")
@pytest.mark.parametrize(("family", "variant"), cases("positions"))
def test_positions(family: str, variant: str) -> None:
    case = pair(family, variant)
    ids = case.ids(2, 12)
    positions = np.sort(np.random.default_rng(1).permutation(40)[:12])[None].repeat(2, 0).astype(np.int32)
    # With a mask of ones: without, transformers reads jumps of the positions as borders of packed sequences.
    want = case.theirs(input_ids=ids, position_ids=positions, attention_mask=np.ones_like(ids)).logits
    close(case.run(input_ids=ids, position_ids=positions).logits, want, FORWARD)
    assert (case.theirs(input_ids=ids).logits - want).abs().max() > 1e-2, "positions have no effect"


@pytest.mark.proof("embeds")
@pytest.mark.parametrize(("family", "variant"), cases("embeds"))
def test_embeddings_in_place_of_tokens(family: str, variant: str) -> None:
    case = pair(family, variant)
    table = case.hf.get_input_embeddings().weight.detach().numpy()
    inputs = case.inputs(case.ids(2, 12))
    embeds = {name.replace("input_ids", "inputs_embeds"): table[ids] for name, ids in inputs.items()}
    close(case.run(**embeds).logits, case.theirs(**embeds).logits, FORWARD)


@pytest.mark.proof("segments")
@pytest.mark.parametrize(("family", "variant"), cases("segments"))
def test_packed_equals_alone(family: str, variant: str) -> None:
    case = pair(family, variant)
    ids, segments = case.ids(2, 12), np.array([[0] * 5 + [1] * 7, [3] * 9 + [1] * 3], np.int32)
    packed = case.run(input_ids=ids, segment_ids=segments).logits
    for row, border in ((0, 5), (1, 9)):
        for part in (slice(0, border), slice(border, 12)):
            alone = case.theirs(input_ids=ids[row : row + 1, part]).logits[0]
            close(packed[row, part], alone, FORWARD, f"row {row}, segment {part}")


@pytest.mark.proof("gradients")
@pytest.mark.parametrize(("family", "variant"), cases("gradients"))
def test_loss_and_gradients(family: str, variant: str) -> None:
    case = pair(family, variant)
    ids, mask = pad([case.ids(1, 14)[0], case.ids(1, 9, seed=1)[0]], 14, left=False)
    inputs = case.labelled(ids, mask)

    case.hf.zero_grad()
    want = case.hf(**as_torch(inputs)).loss
    want.backward()
    out, gradients = case.run.step(**inputs)
    assert out.loss.dtype == jnp.float32
    close(out.loss, want, 1e-5, "loss")
    close(case.ours.compute_loss(labels=int32(inputs["labels"]), logits=out.logits)[0], want, 1e-5, "compute_loss")

    named = nnx.clone(case.ours).merge_params_dict(gradients).to_torch()
    largest = max(float(p.grad.abs().max()) for p in case.hf.parameters() if p.grad is not None)
    for name, parameter in case.hf.named_parameters():
        if parameter.grad is None:  # the loss does not depend on it
            assert not named[name].any(), name
            continue
        # A gradient that is next to nothing is compared with the others' size.
        close(named[name], parameter.grad, FORWARD, name, least=1e-3 * largest)


@pytest.mark.proof("padding_token")
@pytest.mark.parametrize(("family", "variant"), cases("padding_token"))
def test_padding_token_s_embedding_is_not_trained(family: str, variant: str) -> None:
    """transformers' embedding takes no gradient at its `padding_idx`, if it has one, wherever the token stands."""
    case = pair(family, variant, pad_token_id=7)
    ids = case.ids(2, 12)
    ids[:, 3] = 7
    inputs = case.labelled(ids)
    case.hf.zero_grad()
    case.hf(**as_torch(inputs)).loss.backward()
    untrained = case.hf.get_input_embeddings().padding_idx == 7
    embedding = case.hf.get_input_embeddings().weight
    name = next(n for n, p in case.hf.named_parameters() if p is embedding)
    named = nnx.clone(case.ours).merge_params_dict(case.run.gradient(**inputs)[1]).to_torch()
    close(named[name], embedding.grad, FORWARD)
    assert case.hf.config.tie_word_embeddings or untrained != embedding.grad[7].any()
