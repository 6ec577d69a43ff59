"""Models with an encoder: labels that make the decoder's inputs, an encoder run once, and how generation begins."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch

import easydel
from easydel import CompilationCounter
from easydel.outputs import BaseModelOutput
from tests.models.inputs import MASKED, as_torch, pad
from tests.models.pairs import Jitted, Pair, close, pair
from tests.models.table import FAMILIES

WITH_ENCODER = [name for name, family in FAMILIES.items() if family.main_task == "seq2seq"]
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(params=WITH_ENCODER)
def case(request: pytest.FixtureRequest) -> Pair:
    return pair(request.param, FAMILIES[request.param].main.name)


def prompts(case: Pair) -> tuple[np.ndarray, np.ndarray]:
    return pad(case.rows((7, 3, 5)), 7, left=False)


@pytest.mark.parametrize("family", WITH_ENCODER)
def test_labels_shifted_right_are_the_decoder_s_inputs(family: str) -> None:
    case = pair(family, FAMILIES[family].main.name, decoder_start_token_id=5, pad_token_id=2)
    ids, mask = prompts(case)
    labels = case.ids(3, 6, seed=1)
    labels[0, 2] = labels[1, 4:] = MASKED
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    want, got = case.theirs(**inputs), case.run(**inputs)
    close(got.logits, want.logits, 1e-4, "logits")
    close(got.loss, want.loss, 1e-5, "loss")
    close(case.ours.compute_loss(**inputs)[0], want.loss, 1e-5, "compute_loss")
    np.testing.assert_array_equal(case.ours.shift_right(labels)[0], [5, *labels[0, :2], 2, *labels[0, 3:5]])


def test_encoder_outputs_stand_for_the_encoder(case: Pair) -> None:
    ids, mask = prompts(case)
    inputs = case.inputs(ids, mask)
    whole = case.ours(**inputs, output_hidden_states=True)
    encoded = case.ours.base_model.encode(ids, mask, output_hidden_states=True)
    del inputs["input_ids"]
    for given in (encoded, encoded.last_hidden_state, (encoded.last_hidden_state,)):
        close(case.ours(**inputs, encoder_outputs=given).logits, whole.logits, 1e-6)
    again = case.ours(**inputs, encoder_outputs=encoded, output_hidden_states=True)
    assert len(again.encoder_hidden_states) == len(whole.encoder_hidden_states)
    assert case.ours.get_encoder() is case.ours.base_model.encoder
    assert case.ours.get_decoder() is case.ours.base_model.decoder


def test_a_used_cache_stands_for_the_encoder_and_keeps_its_mask(case: Pair) -> None:
    ids, mask = prompts(case)
    target = case.ids(3, 5, seed=3)
    want = case.run(input_ids=ids, attention_mask=mask, decoder_input_ids=target)
    cache = case.ours.init_operations_cache(3, 5)
    first = case.run(input_ids=ids, attention_mask=mask, decoder_input_ids=target[:, :2], cache=cache)
    rest = case.run(decoder_input_ids=target[:, 2:], cache=first.cache)
    close(np.concatenate([first.logits, rest.logits], axis=1), want.logits, 1e-5)
    assert first.encoder_last_hidden_state is not None
    assert rest.encoder_last_hidden_state is None
    assert len(first.cache.layers) == len(case.ours.get_decoder().layers), "the encoder keeps nothing"


def test_given_decoder_tokens_are_continued(case: Pair) -> None:
    ids, mask = prompts(case)
    first = np.full((3, 1), case.hf.config.decoder_start_token_id, np.int32)
    start = np.concatenate([first, case.ids(3, 4, seed=4)], axis=1)
    with torch.no_grad():
        want = case.hf.generate(**as_torch(
            {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": start}
        ), **GREEDY, pad_token_id=0)  # fmt: skip
    got = case.ours.generate(ids, attention_mask=mask, decoder_input_ids=start, **GREEDY).sequences
    np.testing.assert_array_equal(got, want.numpy())
    padded, kept = pad(list(start), 7, left=True)
    got = case.ours.generate(
        ids, attention_mask=mask, decoder_input_ids=padded, decoder_attention_mask=kept, **GREEDY
    ).sequences
    np.testing.assert_array_equal(got[:, 2:], want.numpy())


def test_padded_prompts_are_answered_as_alone(case: Pair) -> None:
    ids, mask = prompts(case)
    together = np.asarray(case.ours.generate(ids, attention_mask=mask, **GREEDY).sequences)
    for row, keep, answer in zip(ids, mask, together, strict=True):
        alone = case.ours.generate(row[None, keep == 1], **GREEDY).sequences
        np.testing.assert_array_equal(alone[0], answer)


def test_streams_samples_and_starts(case: Pair) -> None:
    ids, mask = prompts(case)
    sampled = {"max_new_tokens": 6, "temperature": 1.3, "top_k": 12}
    one, same, other = (
        np.asarray(case.ours.generate(ids, attention_mask=mask, seed=seed, **sampled).sequences) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    steps = list(case.ours.stream(ids, mask, seed=1, **sampled))
    np.testing.assert_array_equal(np.stack(steps, axis=1), one[:, 1:])
    started = case.ours.generate(ids, attention_mask=mask, decoder_start_token_id=7, **GREEDY).sequences
    assert (np.asarray(started)[:, 0] == 7).all()
    capped = case.ours.generate(ids, attention_mask=mask, max_length=9, do_sample=False).sequences
    assert capped.shape == (3, 9), "max_length counts the decoder's tokens"


def test_few_compilations_for_many_lengths(case: Pair) -> None:
    case.ours.generate(case.ids(1, 3), **GREEDY)
    with CompilationCounter() as counter:
        for length in (1, 9, 20, 32):
            case.ours.generate(case.ids(1, length), **GREEDY)
    assert counter.count == 0


def test_what_does_not_fit_is_refused(case: Pair) -> None:
    ids = jax.device_put(case.ids(2, 6))
    embeds = np.zeros((2, 6, case.ours.config.hidden_size), np.float32)
    encoded = BaseModelOutput(last_hidden_state=np.zeros((3, 4, case.ours.config.hidden_size), np.float32))
    for match, inputs in (
        ("neither", {"decoder_input_ids": ids}),
        ("decoder_input_ids or decoder_inputs_embeds, got neither", {"inputs_embeds": embeds}),
        ("3 rows", {"encoder_outputs": encoded, "decoder_input_ids": ids}),
        ("encoder_outputs must be", {"encoder_outputs": [encoded.last_hidden_state], "decoder_input_ids": ids}),
        ("attention_mask", {"input_ids": ids, "decoder_input_ids": ids, "attention_mask": np.ones((2, 4))}),
        ("attention_mask", {"input_ids": ids, "decoder_input_ids": ids, "decoder_attention_mask": np.ones((2, 4))}),
    ):
        with pytest.raises(ValueError, match=match):
            case.ours(**inputs)
    with pytest.raises(ValueError, match="3 rows"):
        case.ours.generate(ids, decoder_input_ids=case.ids(3, 1))
    with pytest.raises(ValueError, match="token ids must lie"):
        case.ours.prepare_inputs_for_call(input_ids=ids, decoder_input_ids=ids + 1000)


@pytest.mark.parametrize("family", WITH_ENCODER)
def test_an_unknown_start_is_named(family: str) -> None:
    entry = FAMILIES[family]
    cls = getattr(easydel, entry.class_name("seq2seq", "ours"))
    model = cls(cls.config_class(**{**entry.config, "decoder_start_token_id": None}))
    ids: Any = np.ones((1, 3), np.int32)
    for run in (lambda: model(input_ids=ids, labels=ids), lambda: model.generate(ids)):
        with pytest.raises(ValueError, match="decoder_start_token_id is not set"):
            run()


def test_sharded_generation_equals_unsharded(case: Pair, tmp_path: Any) -> None:
    ids = case.ids(4, 7)
    model = type(case.ours).from_pretrained(case.folder, sharding_axis_dims=(2, 2, 1, 2, 1), auto_shard_model=True)
    np.testing.assert_array_equal(model.generate(ids, **GREEDY).sequences, case.ours.generate(ids, **GREEDY).sequences)


@pytest.mark.parametrize("family", WITH_ENCODER)
def test_auto_class(family: str) -> None:
    case = pair(family, FAMILIES[family].main.name)
    model = easydel.AutoEasyDeLModelForSeq2SeqLM.from_pretrained(case.folder)
    assert type(model) is type(case.ours)
    inputs = case.inputs(case.ids(1, 4))
    close(Jitted(model)(**inputs).logits, case.run(**inputs).logits, 0)
