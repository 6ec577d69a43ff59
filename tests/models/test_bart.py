"""What only BART has: classes on the decoder, a bias of the logits, forced tokens, positions, inputs of its own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import easydel
from tests.models.inputs import as_torch, int32, pad
from tests.models.pairs import Jitted, Pair, close, load_hf, load_ours, pair, same_outputs, write

ONE = {"encoder_layers": 1, "decoder_layers": 1}  # what is proved here, one layer shows
LABELS = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}


@pytest.fixture
def case() -> Pair:
    return pair("bart", "gelu")


def classifier(**fields: Any) -> Pair:
    return pair("bart", "gelu", "sequence-classification", **ONE, eos_token_id=2, **LABELS, **fields)


def test_a_sequence_is_classified_by_its_last_end_of_text() -> None:
    case = classifier()
    ids, mask = pad([np.r_[row, 2] for row in case.rows((8, 3, 5))], 9, left=False, token=1)
    ids[:, 1] = 2  # two in each row: the last one counts
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": np.array([1, 0, 1], np.int32)}
    got, want = case.run(**inputs), case.theirs(**inputs)
    close(got.loss, want.loss, 1e-5)
    close(got.logits, want.logits, 1e-4)
    whole = {"input_ids": ids[:1], "output_hidden_states": True, "output_attentions": True}
    assert len(same_outputs(case.run(**whole), case.theirs(**whole), 1e-4)) == 7
    without = case.run(input_ids=np.where(np.arange(3)[:, None] == 1, 9, ids), attention_mask=mask).logits
    assert np.isnan(without[1]).all()
    assert np.isfinite(without[0]).all()
    with pytest.raises(ValueError, match="no input_ids"):
        case.ours(inputs_embeds=np.zeros((1, 4, 32), np.float32), decoder_input_ids=int32(ids[:1, :4]))


def test_dropout_before_the_classifier() -> None:
    others = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    case = classifier(classifier_dropout=0.5, **others)
    pure, params, ids = case.ours.pure_transform_fn(), case.ours.params, np.r_[case.ids(1, 5)[0], 2][None]
    one, same, other = (pure(params, {"input_ids": ids}, rngs=jax.random.key(seed)).logits for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(np.asarray(one - other)).max() > 1e-3


def test_places_of_answers() -> None:
    case = pair("bart", "gelu", "question-answering", **ONE)
    places = {"start_positions": np.array([0, 3, 8], np.int32), "end_positions": np.array([2, 40, 8], np.int32)}
    inputs = {"input_ids": case.ids(3, 9)}
    close(case.run(**inputs, **places).loss, case.theirs(**inputs, **places).loss, 1e-5)
    assert {"start_logits", "end_logits"} <= set(same_outputs(case.run(**inputs), case.theirs(**inputs), 1e-4))


def test_the_decoder_reads_the_encoder_s_tokens_where_it_is_given_none(case: Pair) -> None:
    inputs = {"input_ids": case.ids(2, 9)}
    close(case.run(**inputs).logits, case.theirs(**inputs).logits, 1e-4)


def test_the_bias_of_the_logits_goes_through_files(case: Pair, tmp_path: Path) -> None:
    hf = copy.deepcopy(case.hf)
    hf.final_logits_bias.copy_(3 * torch.randn(1, 96, generator=torch.Generator().manual_seed(1)))
    write(hf, tmp_path)
    ours = load_ours(case.family, case.task, tmp_path)
    inputs = case.inputs(case.ids(2, 9))
    with torch.no_grad():
        want = hf(**as_torch(inputs)).logits
    close(Jitted(ours)(**inputs).logits, want, 1e-4)
    assert float((want - case.theirs(**inputs).logits).abs().max()) > 1
    ours.save_pretrained(tmp_path / "again")
    again = load_hf(case.family, case.task, tmp_path / "again")
    torch.testing.assert_close(again.final_logits_bias, hf.final_logits_bias, rtol=0, atol=0)
    copy.deepcopy(case.hf).load_state_dict(ours.to_torch(), strict=True)
    assert "final_logits_bias" not in ours.params, "it is not trained"

    ours.resize_token_embeddings(100)
    logits = Jitted(ours)(**inputs).logits
    close(logits[..., :96], want, 1e-4)
    np.testing.assert_array_equal(ours.final_logits_bias.get_value()[0, 96:], 0)

    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["final_logits_bias"]  # files need not have it
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    close(Jitted(load_ours(case.family, case.task, tmp_path))(**inputs).logits, want - hf.final_logits_bias, 1e-4)


@pytest.mark.parametrize("options", [{}, {"forced_bos_token_id": 7}, {"forced_bos_token_id": 7, "num_beams": 3}])
def test_first_and_last_tokens_are_forced(case: Pair, options: dict[str, int]) -> None:
    """The last one by the config, which generation reads as transformers' does."""
    ids, mask = pad(case.rows((7, 3, 5)), 7, left=False)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    tensors = as_torch({"input_ids": ids, "attention_mask": mask})
    want = copy.deepcopy(case.hf).generate(**tensors, **options).numpy()
    got = np.asarray(case.ours.generate(ids, attention_mask=mask, **options).sequences)
    np.testing.assert_array_equal(got, want)
    assert set(got[:, -1]) == {2} == set(got[:, 0])  # forced_eos_token_id and decoder_start_token_id
    assert set(got[:, 1]) == {7} or "forced_bos_token_id" not in options


def test_generation_settings_of_before_generation_config_json(case: Pair, tmp_path: Path) -> None:
    """The published summarisers were written with them in `config.json`."""
    write(case.hf, tmp_path)
    (tmp_path / "generation_config.json").unlink()
    old = {"num_beams": 3, "no_repeat_ngram_size": 2, "min_length": 5, "max_length": 12, "length_penalty": 2.0}
    old |= {"early_stopping": True, "forced_bos_token_id": 7, "eos_token_id": 9, "pad_token_id": 1}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | old))
    ids = case.ids(2, 6)
    want = load_hf(case.family, case.task, tmp_path).generate(torch.from_numpy(ids).long()).numpy()
    ours = load_ours(case.family, case.task, tmp_path)
    np.testing.assert_array_equal(ours.generate(ids).sequences, want)
    ours.save_pretrained(tmp_path / "again")
    again = load_hf(case.family, case.task, tmp_path / "again").generate(torch.from_numpy(ids).long()).numpy()
    np.testing.assert_array_equal(again, want)


def test_masked_tokens_amid_the_decoder_s_leave_the_others_as_they_are(case: Pair) -> None:
    source, ids = {"input_ids": case.ids(1, 6)}, case.ids(1, 8, seed=1)
    want = np.asarray(case.run(**source, decoder_input_ids=ids).logits)
    out = case.run(
        **source,
        decoder_input_ids=np.concatenate([ids[:, :3], ids[:, :3]], axis=1),
        decoder_attention_mask=int32([[1, 1, 1, 0, 0, 0]]),
        cache=case.ours.init_operations_cache(1, 16),
    )
    close(case.run(decoder_input_ids=ids[:, 3:], cache=out.cache).logits, want[:, 3:], 1e-5)


def test_sequences_longer_than_the_positions_are_refused(case: Pair) -> None:
    long, short = int32(case.ids(1, 65)), int32(case.ids(1, 4))
    for inputs in ({"input_ids": long}, {"input_ids": short, "decoder_input_ids": long}):
        with pytest.raises(ValueError, match="has 64 positions; 65 tokens do not fit"):
            case.ours(**inputs)
    with pytest.raises(ValueError, match="has 64 positions; 65 tokens do not fit"):
        case.ours.generate(long, max_new_tokens=2)
    with pytest.raises(ValueError, match="has 64 positions"):
        case.ours.generate(short, max_new_tokens=64)


def test_float16_that_overflows_stays_finite() -> None:
    model = easydel.BartModel(easydel.BartConfig(**pair("bart", "gelu").family.config)).half()
    block = model.encoder.layers[-1]
    block.output_norm.scale.set_value(6e4 * np.ones(32, np.float16))
    states = model.encode(int32([[5, 6, 7]])).last_hidden_state
    assert np.isfinite(np.asarray(states, np.float32)).all()
    assert float(np.abs(np.asarray(states, np.float32)).max()) > 6e4
