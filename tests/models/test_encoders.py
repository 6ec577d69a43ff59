"""What encoders have besides BERT's: positions after padding, poolings, dropout before a classifier, other heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file

import easydel
from tests.models.inputs import int32, pad
from tests.models.pairs import Jitted, close, load_ours, pair
from tests.models.table import FAMILIES

LABELS = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}


def test_roberta_s_padding_token_has_the_position_of_padding() -> None:
    """Wherever it stands, and whether or not a mask says that it is padding."""
    case = pair("roberta", "untied")
    ids = case.ids(3, 12)
    ids[0, :4] = ids[1, 8:] = ids[2, 5] = 1
    close(case.run(input_ids=ids).logits, case.theirs(input_ids=ids).logits, 1e-4)
    mask = (ids != 1).astype(np.int32)
    got, want = case.run(input_ids=ids, attention_mask=mask), case.theirs(input_ids=ids, attention_mask=mask)
    close(got.logits, want.logits, 1e-4)


def test_roberta_has_fewer_positions_than_its_table_has_rows() -> None:
    case = pair("roberta", "untied")
    assert np.isfinite(case.run(input_ids=case.ids(1, 62)).logits).all()
    with pytest.raises(ValueError, match="has 62 positions; 63 tokens do not fit"):
        case.ours(input_ids=int32(case.ids(1, 63)))


def test_roberta_as_first_published(tmp_path: Path) -> None:
    """With a pooler and a buffer, and without the names that repeat another."""
    case = pair("roberta", "tied")
    tensors = load_file(case.folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head.decoder")}
    more = {"roberta.embeddings.position_ids": torch.arange(64)[None]}
    more |= {"roberta.pooler.dense.weight": torch.zeros(32, 32), "roberta.pooler.dense.bias": torch.zeros(32)}
    save_file(tensors | more, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((case.folder / "config.json").read_text())
    ids = case.ids(2, 9)
    close(Jitted(load_ours(case.family, case.task, tmp_path))(input_ids=ids).logits, case.run(input_ids=ids).logits, 0)
    assert easydel.RobertaModel.from_pretrained(tmp_path).pooler.kernel.shape == (32, 32)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "modernbert"])
def test_a_row_padded_left_is_classified_by_its_first_token(family: str) -> None:
    case = pair(family, FAMILIES[family].main.name, "sequence-classification", num_hidden_layers=1)
    rows = case.rows((9, 4, 6))
    ids, mask = pad(rows, 9, left=True)
    got = case.run(input_ids=ids, attention_mask=mask).logits
    for index, row in enumerate(rows):
        close(got[index], case.theirs(input_ids=row[None]).logits[0], 1e-4, f"row {index}")


def test_modernbert_classifies_by_the_mean() -> None:
    case = pair("modernbert", "tied", "sequence-classification", classifier_pooling="mean", num_hidden_layers=1)
    for left in (True, False):
        ids, mask = pad(case.rows((9, 4, 6)), 9, left=left)
        given = {"input_ids": ids, "attention_mask": mask}
        close(case.run(**given).logits, case.theirs(**given).logits, 1e-4, f"left={left}")


@pytest.mark.parametrize(
    ("family", "task", "field"),
    [
        ("roberta", "sequence-classification", "classifier_dropout"),
        ("roberta", "token-classification", "hidden_dropout_prob"),
        ("distilbert", "sequence-classification", "seq_classif_dropout"),
        ("distilbert", "token-classification", "dropout"),
        ("distilbert", "question-answering", "qa_dropout"),
        ("modernbert", "sequence-classification", "classifier_dropout"),
        ("modernbert", "token-classification", "classifier_dropout"),
        ("modernbert", "question-answering", "classifier_dropout"),
    ],
)
def test_dropout_before_a_classifier(family: str, task: str, field: str) -> None:
    entry = FAMILIES[family]
    cls = getattr(easydel, entry.class_name(task, "ours"))
    rates = dict.fromkeys(entry.dropout, 0.0) | {field: 0.5}
    model = cls(cls.config_class(**{**entry.config, "num_hidden_layers": 1, "layer_types": None, **rates}))
    assert model.dropout.rate == 0.5
    pure, given = model.pure_transform_fn(), {"input_ids": int32(np.arange(4, 13)[None])}
    one, same, other = (np.asarray(pure(model.params, given, rngs=jax.random.key(seed)).logits) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_distilbert_s_sinusoidal_positions_are_transformers() -> None:
    fields = {**FAMILIES["distilbert"].config, "sinusoidal_pos_embds": True}
    theirs = transformers.DistilBertModel(transformers.DistilBertConfig(**fields))
    ours = easydel.DistilBertModel(easydel.DistilBertConfig(**fields))
    want = theirs.embeddings.position_embeddings.weight.detach()
    np.testing.assert_allclose(ours.embed_positions.embedding.get_value(), want, atol=1e-6)


@pytest.mark.parametrize("cutoff", [1.0, 3.0])
def test_modernbert_draws_no_weight_beyond_the_cutoff(cutoff: float) -> None:
    fields: dict[str, Any] = {**FAMILIES["modernbert"].config, "vocab_size": 500, "initializer_cutoff_factor": cutoff}
    theirs = transformers.ModernBertModel(transformers.ModernBertConfig(**fields)).state_dict()
    ours = easydel.ModernBertModel(easydel.ModernBertConfig(**fields), rngs=nnx.Rngs(0)).to_torch()
    for name in ("embeddings.tok_embeddings.weight", "layers.1.mlp.Wi.weight", "layers.1.mlp.Wo.weight"):
        deviation = 0.01 if name.endswith("Wo.weight") else 0.02  # 0.02 / sqrt(2 * 2 layers)
        assert 0.9 * cutoff * deviation < float(ours[name].abs().max()) <= cutoff * deviation * 1.0001, name
        assert abs(float(ours[name].std() / theirs[name].std()) - 1) < 0.1, name


@pytest.mark.parametrize(("family", "left_out"), [("distilbert", "vocab_projector.bias"), ("modernbert", None)])
def test_a_backbone_goes_from_pre_training_under_a_new_head(family: str, left_out: str | None) -> None:
    case = pair(family, FAMILIES[family].main.name)
    cls = getattr(easydel, case.family.class_name("sequence-classification", "ours"))
    new = ["^(pre_classifier|classifier)"]
    if left_out is None:
        model = cls.from_pretrained(case.folder, allow_new=new)
    else:
        with pytest.warns(UserWarning, match=f"other task heads: .*{left_out}"):
            model = cls.from_pretrained(case.folder, allow_new=new)
    ids = case.ids(2, 9)
    states = case.theirs(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    close(Jitted(model.base_model)(input_ids=ids).last_hidden_state, states, 1e-4)


@pytest.mark.parametrize("family", ["distilbert", "modernbert"])
def test_types_of_tokens_are_refused_where_there_are_none(family: str) -> None:
    case = pair(family, FAMILIES[family].main.name)
    with pytest.raises(ValueError, match="has no token types"):
        case.ours(input_ids=int32(case.ids(1, 4)), token_type_ids=int32(np.ones((1, 4))))
