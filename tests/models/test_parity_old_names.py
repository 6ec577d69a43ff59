"""Checkpoints as older programs wrote them, and backbones moved under heads and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import easydel
from tests.models.inputs import as_torch
from tests.models.pairs import Jitted, Pair, close, load_hf, pair
from tests.models.table import FAMILIES

BERT = FAMILIES["bert"]
PRE_TRAINING = {"cls.seq_relationship.weight": torch.zeros(2, 32), "cls.seq_relationship.bias": torch.zeros(2)}
POOLER = {"bert.pooler.dense.weight": torch.zeros(32, 32), "bert.pooler.dense.bias": torch.zeros(32)}
BUFFER = {"bert.embeddings.position_ids": torch.arange(64)[None]}


def bert(task: str) -> Pair:
    return pair("bert", "tied", task, num_hidden_layers=1)


def old(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def write(folder: Path, config: Any, tensors: dict[str, torch.Tensor], **fields: Any) -> None:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_diff_dict() | fields))


def test_a_checkpoint_as_first_published(tmp_path: Path) -> None:
    """Other names of norms, the other half of pre-training, a pooler, a buffer, settings of torch in the config."""
    case = bert("masked-lm")
    tensors = {old(name): tensor for name, tensor in case.hf.state_dict().items()} | PRE_TRAINING | POOLER | BUFFER
    del tensors["cls.predictions.decoder.bias"]  # came later
    assert any(name.endswith("gamma") for name in tensors)
    write(tmp_path, case.hf.config, tensors, gradient_checkpointing=False, position_embedding_type="absolute")
    inputs = case.inputs(case.ids(2, 9))
    ours = easydel.AutoEasyDeLModelForMaskedLM.from_pretrained(tmp_path)
    assert ours.config.gradient_checkpointing == "none"
    want = load_hf(BERT, "masked-lm", tmp_path)(**as_torch(inputs)).logits
    torch.testing.assert_close(want, case.theirs(**inputs).logits, rtol=0, atol=0)
    close(Jitted(ours)(**inputs).logits, want, 1e-4)


def test_the_decoder_s_bias_may_be_the_one_that_was_written(tmp_path: Path) -> None:
    case = bert("masked-lm")
    tensors = dict(case.hf.state_dict())
    del tensors["cls.predictions.bias"]
    write(tmp_path, case.hf.config, tensors)
    inputs = case.inputs(case.ids(2, 9))
    ours = easydel.BertForMaskedLM.from_pretrained(tmp_path)
    close(Jitted(ours)(**inputs).logits, case.theirs(**inputs).logits, 1e-4)


def test_a_name_in_both_spellings_is_reported(tmp_path: Path) -> None:
    case = bert("masked-lm")
    tensors = dict(case.hf.state_dict()) | {"bert.embeddings.LayerNorm.gamma": torch.ones(32)}
    write(tmp_path, case.hf.config, tensors)
    with pytest.raises(easydel.CheckpointError, match=r"unexpected +bert.embeddings.LayerNorm.gamma"):
        easydel.BertForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("task", "prefix"),
    [("sequence-classification", ""), ("token-classification", "bert."), ("question-answering", "")],
)
def test_a_backbone_goes_under_a_new_head(task: str, prefix: str, tmp_path: Path) -> None:
    base = bert("base")
    tensors = {f"{prefix}{old(name)}": tensor for name, tensor in base.hf.state_dict().items()}
    write(tmp_path, base.hf.config, tensors)
    cls = getattr(easydel, BERT.class_name(task, "ours"))
    with pytest.raises(easydel.CheckpointError, match="allow_new"):
        cls.from_pretrained(tmp_path)
    inputs = base.inputs(base.ids(2, 9))
    head = cls.from_pretrained(tmp_path, allow_new=["^(classifier|qa_outputs)"])
    head.save_pretrained(tmp_path / "head")
    again = load_hf(BERT, task, tmp_path / "head")
    own, other = (model(**kind) for model, kind in ((Jitted(head), inputs), (again, as_torch(inputs))))
    name = "start_logits" if task == "question-answering" else "logits"
    close(own[name], other[name], 1e-4, "transformers reads what was saved")

    has_pooler = task == "sequence-classification"
    back = easydel.BertModel.from_pretrained(tmp_path / "head", allow_new=() if has_pooler else ["pooler"])
    out, want = Jitted(back)(**inputs), base.theirs(**inputs)
    close(out.last_hidden_state, want.last_hidden_state, 1e-4)
    if has_pooler:
        close(out.pooler_output, want.pooler_output, 1e-4)


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_embeddings_come_from_any_backbone(prefix: str, tmp_path: Path) -> None:
    base = bert("base")
    write(tmp_path, base.hf.config, {f"{prefix}{name}": tensor for name, tensor in base.hf.state_dict().items()})
    inputs = base.inputs(base.ids(2, 9))
    model = easydel.AutoEasyDeLModelForEmbedding.from_pretrained(tmp_path)
    close(Jitted(model)(**inputs).last_hidden_state, base.theirs(**inputs).last_hidden_state, 1e-4)
    model.save_pretrained(tmp_path / "saved")
    again = easydel.AutoEasyDeLModelForEmbedding.from_pretrained(tmp_path / "saved")
    close(Jitted(again)(**inputs).embeddings, Jitted(model)(**inputs).embeddings, 1e-6)


def test_other_heads_are_named_when_a_backbone_takes_their_place(tmp_path: Path) -> None:
    case = bert("masked-lm")
    write(tmp_path, case.hf.config, dict(case.hf.state_dict()) | POOLER)
    with pytest.warns(UserWarning, match=r"does not use these tensors of other task heads: cls\.predictions"):
        easydel.BertForSequenceClassification.from_pretrained(tmp_path, allow_new=["^classifier"])
